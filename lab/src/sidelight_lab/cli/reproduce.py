"""``sidelight reproduce``: a table of the paper, or of your own, from one recipe."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli import options
from sidelight.errors import SidelightError
from sidelight_lab.cli.options import names, publish

if TYPE_CHECKING:
    from sidelight_lab.tables.reproduce import RecipeContext


_NAMES = """

\b
Names: toxicchat, sst2, emotion, imdb, wildguardmix (every row on one data set),
ood (trained on WildGuardMix, tested on ToxicChat), downcast, sensitivity,
fewshot, fewshot-sst2, fewshot-emotion, latency; own (every row on your own files)."""


@click.command(
    epilog=options.examples(
        "sidelight reproduce toxicchat --out results/toxicchat",
        "sidelight reproduce sst2 --out results/quick --only readout,tfidf --limit 500 --seeds 1",
        "sidelight reproduce own --train train.csv --test test.csv --label topic --out results/own",
        "sidelight reproduce my_table.toml --out results/mine --data ~/labelled",
    )
    + _NAMES
)
@click.argument("recipe")
@options.out
@click.option(
    "--data",
    "root",
    type=options.PATH,
    help="Folder with a folder for each data set. [default: SIDELIGHT_DATA, then the hub]",
)
@click.option("--train", help="File to train on, instead of the recipe's data set.")
@click.option("--test", help="File to test on; goes with --train.")
@click.option("--validation", help="[default: held out of --train]")
@options.text
@options.label
@options.positive
@click.option("--seeds", type=options.AT_LEAST_ONE, help="[default: the recipe's]")
@click.option(
    "--only", callback=names, metavar="ROW,ROW", help="Make only these rows of the recipe."
)
@options.limit
@click.option(
    "--cache",
    type=options.PATH,
    help="Folder for hidden states; they stay there. [default: the user's cache]",
)
@options.backbone
@options.as_json
def reproduce(
    recipe: str, runtime: options.Runtime, out: Path, as_json: bool, **given: Any
) -> None:
    """Make a table: RECIPE is a name (see below) or your own file that ends in .toml.

    The backbone runs once over the texts. Probes are stored when all of them are trained, and a
    baseline when it is fitted. Run the same command again after a kill, and it goes on; a row that
    changed in the recipe is made anew. Test data is opened once, after every row has its validation
    results; test_opened.json says when.
    """
    from sidelight_lab.tables.recipes import parse_recipe, recipe_text

    text = recipe_text(recipe)
    parsed = parse_recipe(text, name=recipe)
    if parsed.kind == "latency":
        refused = ("train", "test", "validation", "seeds", "only", "limit")
        useless = [f"--{name}" for name in refused if given[name] is not None]
        if useless:
            raise SidelightError(
                f"A latency table trains nothing and takes no {', '.join(useless)}. Leave it out; "
                "set lengths, batch sizes and texts in the recipe's [latency]."
            )
    if parsed.data == "own" and given["train"] is None:
        raise SidelightError("'own' is a table of your own files: give --train and --test.")
    if (given["train"] is None) != (given["test"] is None):
        raise SidelightError("--train and --test go together: a table needs both.")
    if given["only"] is not None:
        parsed = parsed.only(given["only"])
    if given["seeds"]:
        # The runs of a few-shot table are its draws.
        parsed = replace(parsed, seeds=given["seeds"], draws=given["seeds"])

    from sidelight.smollm2 import cache_root
    from sidelight_lab.datasets import from_files, load_data_set
    from sidelight_lab.tables.reproduce import RecipeContext

    def load(name: str) -> Any:
        if given["train"] is None:
            return load_data_set(name, root=given["root"])
        columns = {column: given[column] for column in ("text", "label", "positive")}
        return from_files(given["train"], given["test"], given["validation"], **columns)

    context = RecipeContext(
        parsed,
        text,
        out,
        runtime.load_backbone(),
        load=load,
        cache_root=given["cache"] or cache_root() / "activations",
        limit=given["limit"],
    )
    if parsed.kind == "latency":
        _time(context, as_json)
    else:
        _make_table(context, as_json)


def _make_table(context: "RecipeContext", as_json: bool) -> None:
    from sidelight_lab.tables.reproduce import reproduce

    table = reproduce(context)
    if as_json:
        click.echo(json.dumps(table.to_dict(), indent=2))
        return
    click.echo((context.directory / "table.md").read_text("utf-8"), nl=False)


def _time(context: "RecipeContext", as_json: bool) -> None:
    from sidelight_lab.bench.latency import compare_latency, latency_record
    from sidelight_lab.bench.measurement import conditions
    from sidelight_lab.bench.subjects import default_subjects, random_loads, text_loads

    recipe, backbone, out = context.recipe, context.backbone, context.directory
    wanted = recipe.latency
    loads = random_loads(backbone, wanted.tokens, batch_sizes=wanted.batch_sizes)
    if recipe.data:
        data = context.load(recipe.data)
        loads += text_loads(
            backbone,
            data.validation.items[: wanted.texts],
            batch_sizes=wanted.batch_sizes,
            max_tokens=recipe.max_tokens,
            title=f"{data.title} texts",
        )
    context.write_origin()
    where = conditions(backbone, {"rounds": wanted.repeats})
    subjects, device = default_subjects(backbone), backbone.device
    rows = compare_latency(subjects, loads, repeats=wanted.repeats, device=device)
    publish(latency_record(rows, where), out, as_json=as_json)
