"""``sidelight reproduce``: a table of the paper, or of your own, from one recipe."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from sidelight.cli import options
from sidelight.cli.runtime import Runtime
from sidelight.errors import SidelightError
from sidelight_lab.cli.options import names

_NAMES = """

\b
Names: toxicchat, sst2, emotion, imdb, wildguardmix (every row on one data set),
ood (trained on WildGuardMix, tested on ToxicChat), downcast, sensitivity,
fewshot, fewshot-sst2, fewshot-emotion; own (every row on your own files)."""


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
    help="Folder with one subfolder per data set. [default: SIDELIGHT_DATA, then the hub]",
)
@click.option("--train", help="Training file that replaces the recipe's data set.")
@click.option("--test", help="Test file; required with --train.")
@click.option("--validation", help="Validation file. [default: held out from --train]")
@options.text
@options.label
@options.positive
@click.option("--seeds", type=options.AT_LEAST_ONE, help="Number of seeds. [default: the recipe's]")
@click.option(
    "--only", callback=names, metavar="ROW,ROW", help="Run only these rows of the recipe."
)
@options.limit
@click.option(
    "--cache",
    type=options.PATH,
    help="Folder where hidden states are stored and kept. [default: the user's cache]",
)
@options.transformers
@options.as_json
def reproduce(recipe: str, runtime: Runtime, out: Path, as_json: bool, **options: Any) -> None:
    """Reproduce a table. RECIPE is a name (see below) or your own .toml file.

    The backbone runs once over the texts. Probes are stored when all of them are trained, and each
    baseline when it is fitted. Run the same command again to resume an interrupted run; rows that
    changed in the recipe are recomputed. Test data is opened once, after every row has validation
    results; test_opened.json records the time.
    """
    from sidelight_lab.tables.recipes import parse_recipe, recipe_text

    text = recipe_text(recipe)
    parsed = parse_recipe(text, name=recipe)
    if parsed.data == "own" and options["train"] is None:
        raise SidelightError(
            "'own' is a table of your own files. Name them with --train and --test."
        )
    if (options["train"] is None) != (options["test"] is None):
        raise SidelightError("A table needs both --train and --test. Give both options.")
    if options["only"] is not None:
        parsed = parsed.only(options["only"])
    if options["seeds"]:
        # The runs of a few-shot table are its draws.
        parsed = replace(parsed, seeds=options["seeds"], draws=options["seeds"])

    from sidelight.models.smollm2 import cache_root
    from sidelight_lab.datasets import from_files, load_data_set
    from sidelight_lab.tables.reproduce import RecipeContext
    from sidelight_lab.tables.reproduce import reproduce as make_table

    def load(name: str) -> Any:
        if options["train"] is None:
            return load_data_set(name, root=options["root"])
        columns = {column: options[column] for column in ("text", "label", "positive")}
        return from_files(options["train"], options["test"], options["validation"], **columns)

    context = RecipeContext(
        parsed,
        text,
        out,
        runtime.load_transformers(),
        load=load,
        cache_root=options["cache"] or cache_root() / "activations",
        limit=options["limit"],
    )
    table = make_table(context)
    if as_json:
        click.echo(json.dumps(table.to_dict(), indent=2))
        return
    click.echo((out / "table.md").read_text("utf-8"), nl=False)
