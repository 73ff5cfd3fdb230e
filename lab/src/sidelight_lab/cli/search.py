"""``sidelight search``: which options and settings do best on validation data."""

import csv
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli import options
from sidelight.storage import write_json, write_text

if TYPE_CHECKING:
    from sidelight_lab.search import Best, Trial

_SETTINGS = ("learning_rate", "weight_decay", "epochs", "batch_size")


@click.command(
    epilog=options.examples(
        "sidelight search --data train.jsonl --label toxicity --mechanism gate,attention "
        "--out search/toxicity",
        "sidelight search --data t.jsonl --validation v.jsonl --set keep_cache=true --out s",
    )
)
@options.training()
@options.mechanisms(
    default="readout", help="Mechanisms that `sidelight train` knows, with commas between them."
)
@click.option(
    "--trials",
    type=options.AT_LEAST_ONE,
    default=100,
    help="Trials of each mechanism, with those of an earlier run in the same folder.",
)
@click.option("--seed", type=int, default=0, help="Seed of everything random.")
@options.backbone
@options.as_json
def search(
    inputs: options.TrainingInputs,
    runtime: options.Runtime,
    assigned: dict[str, str],
    out: Path,
    as_json: bool,
    mechanisms: list[str],
    trials: int,
    seed: int,
) -> None:
    """Search options and settings of mechanisms on validation data.

    The backbone runs once over the texts. Every trial trains from its cached hidden states, and
    several trials share each read. Fewer than 1,000 rows without --validation are scored by folds,
    as `sidelight train` does. Run the same command again after a kill, and the search goes on.
    """
    # What is about training is searched.
    options.typed(assigned, {})
    # Before imports that take seconds: a wrong file or column is refused at once.
    training, validation = inputs.load()
    from sidelight.mechanisms.base import mechanism_spec

    for name in mechanisms:
        mechanism_spec(name)
    from sidelight.training.dataset import prepare
    from sidelight_lab.search import search_settings

    # Trials are scored as they are; training chooses the calibration.
    fit_options = replace(inputs.fit_options(), calibration="none")
    dataset = prepare(runtime.load_backbone(), training, validation, options=fit_options)
    for warning in dataset.warnings:
        click.echo(f"Warning: {warning}", err=True)
    found: dict[str, Best] = {}
    for name in mechanisms:
        found[name] = search_settings(
            dataset,
            name,
            trials=trials,
            seed=seed,
            storage=out / "journal.log",
            folds=dataset.folds,
            on_generation=lambda tried: _report(tried, trials),
        )
        write_search(found, out)
    if not inputs.keep_cache:
        for split in {dataset.training, dataset.validation}:
            split.states.remove()
    if as_json:
        click.echo((out / "best.json").read_text("utf-8"), nl=False)
        return
    click.echo(f"Saved to {out}: best.json, trials.csv. With `sidelight train --background none`:")
    for best in found.values():
        click.echo(f"{best.score:.4f}  {shlex.join(train_options(best))}")


def _report(trials: "tuple[Trial, ...]", wanted: int) -> None:
    from sidelight_lab.search import best_of

    done, best = f"{trials[0].spec.name}: {len(trials)} of {wanted} trials", best_of(trials)
    if best is None:
        click.echo(f"{done}, and all of them diverged", err=True)
        return
    rate = f"learning rate {best.settings.learning_rate:.2g}"
    click.echo(f"{done}, best score {best.score:.4f} ({rate})", err=True)


def train_options(best: "Best") -> list[str]:
    """What has ``sidelight train`` train this configuration."""
    name = best.spec.name
    words = ["--mechanism", name]
    for option, value in best.spec.options.items():
        words += ["--set", f"{name}.{option}={value}"]
    for setting in _SETTINGS:
        words += ["--set", f"{setting}={getattr(best.settings, setting)}"]
    return words


def write_search(found: "Mapping[str, Best]", directory: Path) -> None:
    """Writes ``trials.csv`` and ``best.json``."""
    text = StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["mechanism", "trial", "score", *_SETTINGS, "options"])
    for name, best in found.items():
        for trial in best.trials:
            settings = [getattr(trial.settings, setting) for setting in _SETTINGS]
            score = "diverged" if trial.score is None else trial.score
            chosen = json.dumps(dict(trial.spec.options))
            table.writerow([name, trial.number, score, *settings, chosen])
    described: dict[str, Any] = {
        "best": max(found, key=lambda name: found[name].score),
        "mechanisms": {
            name: {
                "score": best.score,
                "options": dict(best.spec.options),
                "settings": asdict(best.settings),
                "trials": len(best.trials),
            }
            for name, best in found.items()
        },
    }
    write_text(directory / "trials.csv", text.getvalue())
    write_json(directory / "best.json", described)
