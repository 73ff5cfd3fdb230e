"""``sidelight reproduce``: a table of the paper, or of your own, from one recipe."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli.options import (
    backbone_options,
    examples_epilog,
    json_option,
    label_option,
    limit_option,
    out_option,
    positive_option,
    text_option,
)
from sidelight.errors import SidelightError

if TYPE_CHECKING:
    from sidelight_lab.bench.latency_subjects import Load as LatencyLoad
    from sidelight_lab.tables.recipes import Recipe
    from sidelight_lab.tables.rows import Load, Tools


_NAMES = """

\b
Names: toxicchat, sst2, emotion, imdb, wildguardmix (every row on one data set),
ood (trained on WildGuardMix, tested on ToxicChat), downcast, sensitivity,
fewshot, fewshot-sst2, fewshot-emotion, latency; own (every row on files of yours)."""


@click.command(
    epilog=examples_epilog(
        "sidelight reproduce toxicchat --out results/toxicchat",
        "sidelight reproduce sst2 --out results/quick --only readout,tfidf --limit 500 --seeds 1",
        "sidelight reproduce sst2 --folds 3 --only readout,blend --seeds 1 --out results/folds",
        "sidelight reproduce own --train train.csv --test test.csv --label topic --out results/own",
        "sidelight reproduce my_table.toml --out results/mine --data ~/labelled",
    )
    + _NAMES
)
@click.argument("recipe")
@out_option
@click.option(
    "--data",
    "root",
    type=click.Path(path_type=Path),
    default=None,
    help="Folder with a folder for each data set. [default: SIDELIGHT_DATA, then the hub]",
)
@click.option(
    "--folds",
    type=click.IntRange(min=2),
    default=None,
    help="Cross-validate on the training texts instead; the test stays closed.",
)
@click.option("--train", default=None, help="File to train on, instead of the recipe's data set.")
@click.option("--test", default=None, help="File to test on; goes with --train.")
@click.option("--validation", default=None, help="[default: held out of --train]")
@text_option
@label_option
@positive_option
@click.option("--seeds", type=click.IntRange(min=1), default=None, help="[default: the recipe's]")
@click.option("--only", default=None, metavar="ROW,ROW", help="Rows of the recipe; others are not.")
@limit_option
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    default=None,
    help="Folder for activations, which stay there. [default: the user's cache]",
)
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Configurations tried for each probe that the recipe says to search.",
)
@backbone_options
@json_option
def reproduce(recipe: str, out: Path, as_json: bool, **given: Any) -> None:
    """Make a table: RECIPE is a name (see below) or your own file that ends in .toml.

    The backbone runs once over the texts. Probes are stored when all of them are trained, and a
    baseline when it is fitted, so a killed run goes on, and a row that was changed in the recipe is
    made anew. Test data is opened once, after every row has its validation results;
    test_opened.json says when.
    """
    from sidelight_lab.tables.recipes import parse_recipe, recipe_text

    text = recipe_text(recipe)
    parsed = parse_recipe(text, name=recipe)
    if parsed.kind == "latency":
        _require_latency_options(given)
        _latency(parsed, out, text, as_json, given)
        return
    if parsed.data == "own" and given["train"] is None:
        raise SidelightError("'own' is a table of your own files: give --train and --test.")
    chosen = _narrowed(parsed, given)
    if given["folds"]:
        _cross_validation(chosen, out, text, as_json, given)
        return
    _comparison(chosen, out, text, as_json, given)


def _require_latency_options(given: dict[str, Any]) -> None:
    """Refuses what a table of times has no use for, rather than leave it out in silence."""
    trained = ("folds", "train", "test", "validation", "seeds", "only", "limit")
    useless = [f"--{name}" for name in trained if given[name] is not None]
    if useless:
        raise SidelightError(
            f"A latency table trains nothing and takes no {', '.join(useless)}. Leave it out; "
            "lengths, batch sizes and texts stand in the recipe's [latency]."
        )


def _narrowed(recipe: "Recipe", given: dict[str, Any]) -> "Recipe":
    from dataclasses import replace

    if given["only"]:
        recipe = recipe.only([name.strip() for name in given["only"].split(",") if name.strip()])
    if given["seeds"]:
        # The runs of a few-shot table are its draws.
        recipe = replace(recipe, seeds=given["seeds"], draws=given["seeds"])
    return recipe


def _comparison(
    recipe: "Recipe", out: Path, text: str, as_json: bool, given: dict[str, Any]
) -> None:
    from sidelight.training.runs import console
    from sidelight_lab.tables.runner import reproduce as make
    from sidelight_lab.tables.writing import describe, grid, terminal

    made = make(recipe, out, text=text, tools=_tools(given), limit=given["limit"])
    if as_json:
        click.echo(json.dumps(describe(made), indent=2))
        return
    for figures in made.tables:
        console().print(terminal(grid(figures)))
    for note in made.notes:
        click.echo(note)
    click.echo(f"All columns: {out / 'table.md'}")


def _cross_validation(
    recipe: "Recipe", out: Path, text: str, as_json: bool, given: dict[str, Any]
) -> None:
    from dataclasses import asdict

    from sidelight_lab.tables.cross_validation import cross_validate, shown

    found = cross_validate(
        recipe, out, text=text, tools=_tools(given), folds=given["folds"], limit=given["limit"]
    )
    if as_json:
        click.echo(json.dumps([asdict(one) for one in found], indent=2))
        return
    click.echo(f"{found[0].score} on the folds: mean, row, and each")
    for one in found:
        click.echo(f"{shown(one.mean)}  {one.row}  ({', '.join(map(shown, one.folds))})")
    click.echo(f"Written to {out / 'cross_validation.md'}")


def _tools(given: dict[str, Any]) -> "Tools":
    from sidelight.backbone import load_backbone
    from sidelight.smollm2 import cache_root
    from sidelight_lab.tables.rows import Tools, searched

    return Tools(
        load_backbone(given["model"] or "smollm2", dtype=given["dtype"], device=given["device"]),
        _loader(given),
        searched(trials=given["trials"]),
        given["cache"] or cache_root() / "activations",
    )


def _loader(given: dict[str, Any]) -> "Load":
    from functools import partial

    from sidelight_lab.datasets.loading import from_files, load_data_set

    if (given["train"] is None) != (given["test"] is None):
        raise SidelightError("--train and --test go together: a table needs both.")
    if given["train"] is None:
        return partial(load_data_set, root=given["root"])
    columns = {name: given[name] for name in ("text", "label", "positive")}
    return lambda _name: from_files(given["train"], given["test"], given["validation"], **columns)


def _latency(recipe: "Recipe", out: Path, text: str, as_json: bool, given: dict[str, Any]) -> None:
    from sidelight.training.runs import console
    from sidelight_lab.bench.latency import Record, compare_latency, conditions, grids, plot_latency
    from sidelight_lab.bench.latency_subjects import default_subjects
    from sidelight_lab.tables.writing import environment, write_origin

    tools = _tools(given)
    backbone, repeats = tools.backbone, recipe.latency.repeats
    loads = _loads(recipe, tools)
    write_origin(out, recipe=text, environment=environment(backbone.fingerprint), notes=())
    where = conditions(backbone, repeats=repeats)
    rows = compare_latency(
        default_subjects(backbone), loads, repeats=repeats, device=backbone.device
    )
    record = Record(where, rows)
    record.save(out)
    plot_latency(rows, out / "plots")
    if as_json:
        click.echo(record.to_json())
        return
    for one in grids(rows):
        console().print(one.table())


def _loads(recipe: "Recipe", tools: "Tools") -> "list[LatencyLoad]":
    from sidelight_lab.bench.latency_subjects import prompt_load, synthetic_load

    sizes, wanted = recipe.latency.batch_sizes, recipe.latency
    loads = [
        synthetic_load(tools.backbone, batch_size=size, tokens=tokens)
        for size in sizes
        for tokens in wanted.tokens
    ]
    if not recipe.data:
        return loads
    data, encoder = tools.load(recipe.data), tools.backbone.encoder
    limit = min(recipe.max_tokens, encoder.max_tokens)
    prompts = [
        encoder.encode_any_length(item.messages, item.response).shortened(limit)
        for item in data.validation.items[: wanted.texts]
    ]
    title = f"{len(prompts)} {data.title} texts"
    return loads + [prompt_load(prompts, batch_size=size, title=title) for size in sizes]
