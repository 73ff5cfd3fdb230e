"""``sidelight search``: which options and settings do best on validation data.

It writes a table of all trials, the best of them, and a picture.
"""

import csv
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from sidelight.cli import options
from sidelight.storage import write_json, write_text
from sidelight_lab.cli.options import trials_option

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sidelight.types import MechanismSpec
    from sidelight_lab.search import Best, Trial
    from sidelight_lab.tables.writing import Grid

_SETTINGS = ("learning_rate", "weight_decay", "epochs", "batch_size")
_MARKERS = "osD^vP"
# Options that ``sidelight train`` needs as well, to train on what was searched on.
_SHARED = (
    "data", "text", "label", "response", "split", "missing_label", "positive", "validation",
    "validation_split", "limit", "max_tokens", "cache", "cache_budget", "memory", "model",
    "dtype", "device",
)  # fmt: skip


@click.command(
    epilog=options.examples(
        "sidelight search --data train.jsonl --label toxicity --mechanism gate,attention "
        "--out search/toxicity",
        "sidelight search --data t.jsonl --validation v.jsonl --trials 30 --keep-cache --out s",
    )
)
@options.training
@options.mechanisms(
    default="readout", help="Mechanisms that `sidelight train` knows, with commas between them."
)
@trials_option
@click.option(
    "--together",
    type=options.AT_LEAST_ONE,
    default=8,
    help="Trials that share one read of the hidden states; more take more memory.",
)
@click.option("--seed", type=int, default=0, help="Seed of everything random.")
@options.backbone
@options.as_json
def search(
    inputs: options.TrainingInputs,
    runtime: options.Runtime,
    out: Path,
    as_json: bool,
    **given: Any,
) -> None:
    """Search options and settings of mechanisms on validation data.

    The backbone runs once over the texts. Every trial trains from its cached hidden states, and
    several trials share each read. Fewer than 1,000 rows without --validation are scored by folds,
    as `sidelight train` does. Run the same command again after a kill, and the search goes on.
    """
    # Before imports that take seconds: a wrong file or column is refused at once.
    training, validation = inputs.load()
    from sidelight.mechanisms.base import mechanism_spec

    for name in given["mechanisms"]:
        mechanism_spec(name)
    from sidelight.training.dataset import prepare
    from sidelight.training.optimisation import score_name
    from sidelight.training.runs import console
    from sidelight_lab.search import search_settings

    # Trials are scored as they are; training chooses the calibration.
    fit_options = replace(inputs.fit_options(), calibration="none")
    dataset = prepare(runtime.load_backbone(), training, validation, options=fit_options)
    for warning in dataset.warnings:
        click.echo(f"Warning: {warning}", err=True)
    found: dict[str, Best] = {}
    for name in given["mechanisms"]:
        found[name] = search_settings(
            dataset,
            name,
            trials=given["trials"],
            seed=given["seed"],
            storage=out / "journal.log",
            folds=dataset.folds,
            generation=given["together"],
            on_generation=lambda trials: _report(trials, given["trials"]),
        )
        write_search(found, out, score=score_name(dataset.task))
    if not inputs.keep_cache:
        for split in {dataset.training, dataset.validation}:
            split.states.remove()
    if as_json:
        click.echo(json.dumps(_describe(found), indent=2))
        return
    console().print(_grid(found, score_name(dataset.task)).terminal())
    click.echo(f"Saved to {out}: best.json, trials.csv, sensitivity.png. To train the best:")
    for best in found.values():
        click.echo(_train_command(best, inputs, out))


def _report(trials: "tuple[Trial, ...]", wanted: int) -> None:
    from sidelight_lab.search import best_of

    done, best = f"{trials[0].spec.name}: {len(trials)} of {wanted} trials", best_of(trials)
    if best is None:
        click.echo(f"{done}, and all of them diverged", err=True)
        return
    rate = f"learning rate {best.settings.learning_rate:.2g}"
    click.echo(f"{done}, best score {best.score:.4f} ({rate})", err=True)


def _grid(found: "dict[str, Best]", score: str) -> "Grid":
    from sidelight_lab.tables.writing import Grid

    rows = [
        {
            "mechanism": name,
            "trials": str(len(best.trials)),
            score: f"{best.score:.4f}",
            "learning rate": f"{best.settings.learning_rate:.2g}",
            "decay": f"{best.settings.weight_decay:.2g}",
            "epochs": str(best.settings.epochs),
            "batch": str(best.settings.batch_size),
            "options": _describe_options(best.spec),
        }
        for name, best in found.items()
    ]
    lines = tuple(tuple(row.values()) for row in rows)
    return Grid("Best on validation data", tuple(rows[0]), lines)


def _train_command(best: "Best", inputs: options.TrainingInputs, out: Path) -> str:
    context = click.get_current_context()
    command = ["sidelight", "train"]
    for name in _SHARED:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            command += [f"--{name.replace('_', '-')}", str(context.params[name])]
    # Without it, the first of these commands would remove what the others read.
    if inputs.keep_cache:
        command.append("--keep-cache")
    name = best.spec.name
    # A search shows texts alone.
    command += ["--mechanism", name, "--background", "none"]
    for key, value in best.spec.options.items():
        command += ["--set", f"{name}.{key}={value}"]
    for setting in _SETTINGS:
        command += [f"--{setting.replace('_', '-')}", str(getattr(best.settings, setting))]
    return shlex.join([*command, "--out", str(out / name)])


def write_search(found: "Mapping[str, Best]", directory: Path, *, score: str) -> None:
    """Writes ``trials.csv``, ``best.json`` and ``sensitivity.png``."""
    from sidelight.plots import save_figure

    text = StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["mechanism", "trial", "score", *_SETTINGS, "options"])
    for name, best in found.items():
        for trial in best.trials:
            settings = [getattr(trial.settings, setting) for setting in _SETTINGS]
            shown = "diverged" if trial.score is None else trial.score
            table.writerow([name, trial.number, shown, *settings, _describe_options(trial.spec)])
    write_text(directory / "trials.csv", text.getvalue())
    write_json(directory / "best.json", _describe(found))
    save_figure(_draw_sensitivity(found, score=score), directory / "sensitivity.png")


def _describe(found: "Mapping[str, Best]") -> dict[str, Any]:
    """The best of each mechanism, and the best mechanism, as JSON values."""
    return {
        "best": max(found, key=lambda name: found[name].score),
        "mechanisms": {
            name: {
                "score": best.score,
                "options": dict(best.spec.options),
                "settings": asdict(best.settings),
                "trials": len(best.trials),
                "importance": dict(best.importance),
            }
            for name, best in found.items()
        },
    }


def _describe_options(spec: "MechanismSpec") -> str:
    return " ".join(f"{option}={value}" for option, value in spec.options.items())


def _draw_sensitivity(found: "Mapping[str, Best]", *, score: str) -> "Figure":
    """Each trial's score over its learning rate, the best of each mechanism ringed.

    Like the paper's Figure 3 (Meyoyan & Del Corro 2026) but of all trials at once, so the other
    settings of neighbouring points differ too. Trainings that diverged are not drawn.
    """
    from sidelight_lab.plots import COLOURS, LEGEND_BESIDE, new_axes

    figure, axes = new_axes(7.2, 4.4)
    for number, (name, best) in enumerate(found.items()):
        points = [(t.settings.learning_rate, t.score) for t in best.trials if t.score is not None]
        axes.scatter(
            *zip(*points, strict=True),
            color=COLOURS[number % len(COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            s=22,
            alpha=0.7,
            linewidths=0,
            label=f"{best.score:.3f}  {name}",
        )
        ring: dict[str, Any] = {"facecolors": "none", "edgecolors": "#222222", "linewidths": 1.2}
        axes.scatter(best.settings.learning_rate, best.score, s=70, **ring)
    axes.set(xscale="log", xlabel="Learning rate", ylabel=f"{score} on validation data")
    axes.legend(title="best", title_fontsize=8, alignment="left", **LEGEND_BESIDE)
    return figure
