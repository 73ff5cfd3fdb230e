"""``sidelight search``: which options and settings do best on validation data."""

import csv
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sidelight.cli import options
from sidelight.cli.runtime import Runtime
from sidelight.errors import SidelightError, warnings_ignored
from sidelight.storage import write_json, write_text
from sidelight_lab.cli.options import names

if TYPE_CHECKING:
    from sidelight_lab.search import Trial

_SETTINGS = ("learning_rate", "weight_decay", "epochs", "batch_size")


@click.command(
    epilog=options.examples(
        "sidelight search --data train.jsonl --label toxicity --mechanism gate,attention "
        "--out search/toxicity",
        "sidelight search --data t.jsonl --validation v.jsonl --set keep_cache=true --out s",
    )
)
@options.training()
@click.option(
    "--mechanism",
    "mechanisms",
    callback=names,
    default="readout",
    help="Comma-separated mechanisms of `sidelight train`.",
)
@click.option(
    "--trials",
    type=options.AT_LEAST_ONE,
    default=100,
    help="Number of trials per mechanism, counting trials from an earlier run in the same folder.",
)
@click.option("--seed", type=int, default=0, help="Random seed.")
@options.transformers
@options.as_json
def search(
    inputs: options.TrainingInputs,
    runtime: Runtime,
    assigned: dict[str, str],
    out: Path,
    as_json: bool,
    mechanisms: list[str],
    trials: int,
    seed: int,
) -> None:
    """Search options and settings of mechanisms on validation data.

    The backbone runs once over the texts. Every trial trains from its cached hidden states, and
    several trials share each read. With fewer than 1,000 rows and no --validation, trials are
    cross-fitted, as in `sidelight train`. Run the same command again to resume the search.
    """
    # What is about training is searched.
    options.typed(assigned, {})
    # Before imports that take seconds: a wrong file or column is refused at once.
    training, validation = inputs.load()
    from sidelight.probes.mechanisms.base import mechanism_names, mechanism_spec

    if not mechanisms:
        known = ", ".join(mechanism_names())
        raise SidelightError(
            f"No mechanism is named. Leave --mechanism out, or choose from: {known}."
        )
    for name in mechanisms:
        mechanism_spec(name)
    from sidelight.training.validation import choose_validation

    # Trials are scored as they are; training chooses the calibration.
    fit_options = replace(inputs.fit_options(), calibration="none")
    with warnings_ignored():
        choose_validation(training, validation, fit_options)
    from sidelight.training.preparing import prepare
    from sidelight_lab.search import best_of, search_settings

    with fit_options.temporary_states(out.resolve()) as states:
        run_options = replace(fit_options, cache_root=states)
        dataset = prepare(runtime.load_transformers(), training, validation, options=run_options)
        trials_of: dict[str, tuple[Trial, ...]] = {}
        for name in mechanisms:
            trials_of[name] = search_settings(
                dataset,
                name,
                trials=trials,
                seed=seed,
                storage=out / "journal.log",
                on_generation=lambda tried: _report(tried, trials),
            )
            write_search(trials_of, out)
    if as_json:
        click.echo((out / "best.json").read_text("utf-8"), nl=False)
        return
    click.echo(f"Saved to {out}: best.json, trials.csv. With `sidelight train --background none`:")
    for tried in trials_of.values():
        best = best_of(tried)
        click.echo(f"{best.score:.4f}  {shlex.join(train_options(best))}")


def _report(tried: "Sequence[Trial]", wanted: int) -> None:
    scores = [trial.score for trial in tried if trial.score is not None]
    best = f"best score {max(scores):.4f}" if scores else "all of them diverged"
    click.echo(f"{tried[0].spec.name}: {len(tried)} of {wanted} trials, {best}", err=True)


def train_options(trial: "Trial") -> list[str]:
    """What has ``sidelight train`` train this configuration."""
    options = {f"{trial.spec.name}.{option}": value for option, value in trial.spec.options.items()}
    options |= {setting: getattr(trial.settings, setting) for setting in _SETTINGS}
    assigned = (("--set", f"{name}={value}") for name, value in options.items())
    return ["--mechanism", trial.spec.name, *chain.from_iterable(assigned)]


def write_search(trials_of: "Mapping[str, Sequence[Trial]]", directory: Path) -> None:
    """Write ``trials.csv`` and ``best.json``."""
    from sidelight_lab.search import best_of

    text = StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["mechanism", "trial", "score", *_SETTINGS, "options"])
    for name, trials in trials_of.items():
        for trial in trials:
            settings = [getattr(trial.settings, setting) for setting in _SETTINGS]
            score = "diverged" if trial.score is None else trial.score
            options = json.dumps(dict(trial.spec.options))
            table.writerow([name, trial.number, score, *settings, options])
    best = {name: best_of(trials) for name, trials in trials_of.items()}
    description = {
        "best": max(best, key=lambda name: best[name].score or 0.0),
        "mechanisms": {
            name: {
                "score": trial.score,
                "options": dict(trial.spec.options),
                "settings": asdict(trial.settings),
                "trials": len(trials_of[name]),
            }
            for name, trial in best.items()
        },
    }
    write_text(directory / "trials.csv", text.getvalue())
    write_json(directory / "best.json", description)
