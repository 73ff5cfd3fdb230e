"""The picture of a search: how much a score depends on the learning rate, per mechanism.

What a search leaves in its folder: a table of all trials, the best of them, and a picture.
"""

import csv
from collections.abc import Mapping
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sidelight.plots import save_figure
from sidelight.storage import write_json, write_text
from sidelight_lab.search.trials import Best, Trial

# matplotlib leaves the types of **kwargs open.
# pyright: reportUnknownMemberType=false


_INK = "#222222"
# Okabe & Ito's palette, told apart with any colour vision.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_MARKERS = "osD^vP"


def draw_sensitivity(found: Mapping[str, Best], *, score: str) -> Figure:
    """Each trial's score over its learning rate, the best of each mechanism ringed.

    As the paper's Figure 3 (Meyoyan & Del Corro 2026), of all trials at once: the other settings
    of two neighbouring points differ too. Trainings that diverged are not drawn.

    Args:
        found: The best of each mechanism, by its name.
        score: Name of the score.
    """
    figure = Figure(figsize=(7.2, 4.4), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    for number, (name, best) in enumerate(found.items()):
        _draw(axes, name, best, number)
    axes.set(xscale="log", xlabel="Learning rate", ylabel=f"{score} on validation data")
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.02, 1), "alignment": "left"}
    axes.legend(title="best", frameon=False, fontsize=8, title_fontsize=8, **place)
    return figure


def _draw(axes: Axes, name: str, best: Best, number: int) -> None:
    colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
    points = [
        (trial.settings.learning_rate, trial.score)
        for trial in best.trials
        if trial.score is not None
    ]
    axes.scatter(
        [rate for rate, _ in points],
        [score for _, score in points],
        color=colour,
        marker=marker,
        s=22,
        alpha=0.7,
        linewidths=0,
        label=f"{best.score:.3f}  {name}",
    )
    axes.scatter(
        best.settings.learning_rate,
        best.score,
        facecolors="none",
        edgecolors=_INK,
        s=70,
        linewidths=1.2,
    )


SETTINGS = ("learning_rate", "weight_decay", "epochs", "batch_size")


def write_search(found: Mapping[str, Best], directory: Path, *, score: str) -> None:
    """Writes ``trials.csv``, ``best.json`` and ``sensitivity.png``, replacing earlier ones.

    Args:
        found: The best of each mechanism, by its name.
        directory: Where to write; made if absent.
        score: What is compared, for the picture.
    """
    write_text(directory / "trials.csv", _table(found))
    write_json(directory / "best.json", describe(found))
    save_figure(draw_sensitivity(found, score=score), directory / "sensitivity.png")


def describe(found: Mapping[str, Best]) -> dict[str, Any]:
    """The best of each mechanism, and which mechanism is ahead, as JSON values."""
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


def train_arguments(best: Best) -> list[str]:
    """The arguments of ``sidelight train`` that stand for a configuration."""
    name, settings = best.spec.name, asdict(best.settings)
    arguments = ["--mechanism", name]
    for option, value in best.spec.options.items():
        arguments += ["--set", f"{name}.{option}={value}"]
    for setting in SETTINGS:
        arguments += [f"--{setting.replace('_', '-')}", str(settings[setting])]
    return arguments


def _table(found: Mapping[str, Best]) -> str:
    text = StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["mechanism", "trial", "score", *SETTINGS, "options"])
    for name, best in found.items():
        table.writerows([name, *_cells(trial)] for trial in best.trials)
    return text.getvalue()


def _cells(trial: Trial) -> list[object]:
    settings = asdict(trial.settings)
    options = " ".join(f"{option}={value}" for option, value in trial.spec.options.items())
    score = "diverged" if trial.score is None else trial.score
    return [trial.number, score, *(settings[name] for name in SETTINGS), options]
