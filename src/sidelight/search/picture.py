"""The picture of a search: how much a score depends on the learning rate, per mechanism."""
# matplotlib leaves the types of **kwargs open.
# pyright: reportUnknownMemberType=false

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sidelight.search.trials import Best

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
