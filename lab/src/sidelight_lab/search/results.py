"""The files of a search: a table of all trials, the best of them, and a picture."""

import csv
from collections.abc import Mapping
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sidelight.mechanisms.base import MechanismSpec
from sidelight.plots import save_figure
from sidelight.storage import write_json, write_text
from sidelight_lab.plots import COLOURS, LEGEND_BESIDE, new_axes
from sidelight_lab.search.trials import Best

_SETTINGS = ("learning_rate", "weight_decay", "epochs", "batch_size")
_MARKERS = "osD^vP"


def write_search(found: Mapping[str, Best], directory: Path, *, score: str) -> None:
    """Writes ``trials.csv``, ``best.json`` and ``sensitivity.png``."""
    text = StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["mechanism", "trial", "score", *_SETTINGS, "options"])
    for name, best in found.items():
        for trial in best.trials:
            settings = [getattr(trial.settings, setting) for setting in _SETTINGS]
            shown = "diverged" if trial.score is None else trial.score
            table.writerow([name, trial.number, shown, *settings, describe_options(trial.spec)])
    write_text(directory / "trials.csv", text.getvalue())
    write_json(directory / "best.json", describe(found))
    save_figure(_draw_sensitivity(found, score=score), directory / "sensitivity.png")


def describe(found: Mapping[str, Best]) -> dict[str, Any]:
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


def describe_options(spec: MechanismSpec) -> str:
    """The options of a mechanism on one line."""
    return " ".join(f"{option}={value}" for option, value in spec.options.items())


def train_arguments(best: Best) -> list[str]:
    """The arguments of ``sidelight train`` for a configuration."""
    name = best.spec.name
    arguments = ["--mechanism", name]
    for option, value in best.spec.options.items():
        arguments += ["--set", f"{name}.{option}={value}"]
    for setting in _SETTINGS:
        arguments += [f"--{setting.replace('_', '-')}", str(getattr(best.settings, setting))]
    return arguments


def _draw_sensitivity(found: Mapping[str, Best], *, score: str) -> Figure:
    """Each trial's score over its learning rate, the best of each mechanism ringed.

    Like the paper's Figure 3 (Meyoyan & Del Corro 2026) but of all trials at once, so the other
    settings of neighbouring points differ too. Trainings that diverged are not drawn.
    """
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
