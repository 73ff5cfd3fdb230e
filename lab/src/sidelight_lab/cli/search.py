"""``sidelight search``: which options and settings do best on validation data."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from sidelight.cli.options import (
    backbone_options,
    examples_epilog,
    json_option,
    load_labelled,
    mechanism_option,
    reading_options,
    training_options,
)

if TYPE_CHECKING:
    from rich.table import Table

    from sidelight.data.examples import Examples
    from sidelight.training.fit import Prepared
    from sidelight_lab.search.trials import Best, Trial


# What ``sidelight train`` has to be given as well, to train on what was searched on.
_SHARED = (
    "data", "text", "label", "response", "split", "missing_label", "positive", "validation",
    "validation_split", "limit", "max_tokens", "cache", "cache_budget", "model", "dtype", "device",
)  # fmt: skip


@click.command(
    epilog=examples_epilog(
        "sidelight search --data train.jsonl --label toxicity --mechanism gate,attention "
        "--out search/toxicity",
        "sidelight search --data t.jsonl --validation v.jsonl --trials 30 --keep-cache --out s",
    )
)
@training_options
@mechanism_option(default="readout", help="Any that `sidelight train` knows; several with commas.")
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Per mechanism, those of an earlier run in the same folder included.",
)
@click.option(
    "--together",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Trials trained from one read of the activations; more take more memory.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of all that is random.")
@backbone_options
@json_option
def search(out: Path, as_json: bool, **given: Any) -> None:
    """Search options and settings of mechanisms on validation data.

    The backbone runs once over the texts; every trial trains from what it showed, several from
    each read. Fewer than 1,000 rows without --validation are scored by folds, as `sidelight train`
    judges them. A killed search goes on where it stopped when the same command runs again.
    """
    # Before imports that take seconds: what is misspelt is told at once.
    _require_known(given["mechanisms"])
    training, validation = load_labelled(given)
    from sidelight.training.objective import score_name
    from sidelight.training.runs import check_folder, console
    from sidelight_lab.search.results import describe, write_search
    from sidelight_lab.search.trials import search_settings

    check_folder(out)
    prepared = _prepare(given, training, validation)
    dataset = prepared.dataset
    for warning in prepared.warnings:
        click.echo(f"Warning: {warning}", err=True)
    found: dict[str, Best] = {}
    for name in given["mechanisms"]:
        found[name] = search_settings(
            dataset,
            name,
            trials=given["trials"],
            seed=given["seed"],
            storage=out / "journal.log",
            folds=prepared.folds,
            generation=given["together"],
            on_generation=lambda trials: _say(trials, given["trials"]),
        )
        write_search(found, out, score=score_name(dataset.task))
    if not given["keep_cache"]:
        for split in {dataset.training, dataset.validation}:
            split.states.remove()
    if as_json:
        click.echo(json.dumps(describe(found), indent=2))
        return
    console().print(_table(found, score_name(dataset.task)))
    click.echo(f"Saved to {out}: best.json, trials.csv, sensitivity.png. To train the best:")
    for best in found.values():
        click.echo(_train_command(best, given, out))


def _require_known(names: list[str]) -> None:
    from sidelight.mechanisms.base import mechanism_spec

    for name in names:
        mechanism_spec(name)


def _prepare(
    given: dict[str, Any], training: "Examples", validation: "Examples | None"
) -> "Prepared":
    from sidelight.backbone import load_backbone
    from sidelight.training.fit import prepare

    backbone = load_backbone(
        given["model"] or "smollm2", dtype=given["dtype"], device=given["device"]
    )
    # Trials are scored as they are; what they would be calibrated with is chosen in training.
    options = replace(reading_options(given), calibration="none")
    return prepare(backbone, training, validation, options=options)


def _say(trials: "tuple[Trial, ...]", wanted: int) -> None:
    from sidelight_lab.search.trials import best_of

    if all(trial.score is None for trial in trials):
        click.echo(f"{len(trials)} of {wanted} trials, all of which diverged", err=True)
        return
    best = best_of(trials)
    click.echo(
        f"{best.spec.name}: {len(trials)} of {wanted} trials, best score {best.score:.4f} "
        f"(learning rate {best.settings.learning_rate:.2g})",
        err=True,
    )


def _table(found: "dict[str, Best]", score: str) -> "Table":
    from rich.table import Table

    titles = ("mechanism", "trials", score, "learning rate", "decay", "epochs", "batch", "options")
    table = Table(title="Best on validation data", title_justify="left")
    for title in titles:
        table.add_column(title)
    for name, best in found.items():
        settings = best.settings
        table.add_row(
            name,
            str(len(best.trials)),
            f"{best.score:.4f}",
            f"{settings.learning_rate:.2g}",
            f"{settings.weight_decay:.2g}",
            str(settings.epochs),
            str(settings.batch_size),
            " ".join(f"{option}={value}" for option, value in best.spec.options.items()),
        )
    return table


def _train_command(best: "Best", given: dict[str, Any], out: Path) -> str:
    from sidelight_lab.search.results import train_arguments

    context = click.get_current_context()
    command = ["sidelight", "train"]
    for name in _SHARED:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            command += [f"--{name.replace('_', '-')}", str(given[name])]
    # Or the first of these commands would remove what the others read.
    if given["keep_cache"]:
        command.append("--keep-cache")
    return shlex.join([*command, *train_arguments(best), "--out", str(out / best.spec.name)])
