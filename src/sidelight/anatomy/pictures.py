"""Pictures of anatomies and of training curves. Knows arrays and files."""
# matplotlib leaves the types of **kwargs open.
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sidelight.anatomy.curves import Point
from sidelight.anatomy.examine import Anatomy
from sidelight.anatomy.tokens import GROUPS
from sidelight.plots import save_figure
from sidelight.training import score_name
from sidelight.types import Task

_INK, _MUTED = "#222222", "#8a8a8a"
# Okabe & Ito's palette, told apart with any colour vision.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8}
_DOTS: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1.2}
_VIEWS = {"drop": "all but this layer", "only": "this layer only", "from": "from this layer on"}


def plot_anatomy(anatomy: Anatomy, path: Path) -> Path:
    """Layers on the left, tokens on the right; what is used per class, then what ablation costs.

    Of many classes the six with most texts are drawn.
    """
    figure = _figure(11.0, 9.0, f"{anatomy.probe.name}: anatomy of {anatomy.probe.spec.name}")
    _draw_layer_use(anatomy, _axes(figure, 1), _axes(figure, 3))
    _draw_layer_ablation(anatomy, _axes(figure, 5))
    _draw_token_use(anatomy, _axes(figure, (2, 4)))
    _draw_token_ablation(anatomy, _axes(figure, 6))
    return save_figure(figure, path)


def plot_curves(points: Sequence[Point], path: Path, *, task: Task, over: str) -> Path:
    """A line per mechanism through the mean over draws; whiskers span lowest to highest.

    Args:
        points: Of ``sensitivity`` or ``learning_curve``.
        path: The file.
        task: Names the score.
        over: What the horizontal axis is, for example ``Learning rate``.
    """
    figure = _figure(6.4, 4.2, f"{_begun(score_name(task))} over {over.lower()}")
    axes = _axes(figure, 1, rows=1, columns=1)
    for place, name in enumerate(dict.fromkeys(point.mechanism for point in points)):
        at, middle, low, high = _spread([point for point in points if point.mechanism == name])
        spans = [middle - low, high - middle]
        colour = _COLOURS[place % len(_COLOURS)]
        axes.errorbar(at, middle, yerr=spans, color=colour, label=_escape(name), **_DOTS)
    axes.set(xlabel=over, ylabel=_begun(score_name(task)), xscale="log")
    axes.legend(**_LEGEND)
    return save_figure(figure, path)


def _draw_layer_use(anatomy: Anatomy, upper: Axes, lower: Axes) -> None:
    for name, colour in zip(_largest(anatomy), _COLOURS, strict=False):
        own = anatomy.use[name]
        has_weights = not np.isnan(own.layer_weights).any()
        shown = own.layer_weights if has_weights else own.layer_shares
        upper.plot(shown, color=colour, label=_escape(name), **_DOTS)
        upper.set(ylabel="Layer-stage weight" if has_weights else "Share of contributions")
        lower.plot(own.layer_effects, color=colour, **_DOTS)
    upper.set(ylim=(0, None), xlabel="Layer")
    upper.legend(**_LEGEND)
    lower.axhline(0, color=_MUTED, linewidth=1)
    lower.set(xlabel="Layer", ylabel="Contribution, logits")


def _draw_layer_ablation(anatomy: Anatomy, axes: Axes) -> None:
    for (view, label), colour in zip(_VIEWS.items(), _COLOURS, strict=False):
        axes.plot(anatomy.layers[view], color=colour, label=label, **_DOTS)
    axes.axhline(anatomy.score, color=_MUTED, linestyle="--", linewidth=1, label="all layers")
    axes.set(xlabel="Layer", ylabel=_begun(score_name(anatomy.probe.task)))
    # It may lie on a curve: what is behind its words must not show.
    axes.legend(**{**_LEGEND, "frameon": True, "framealpha": 1.0, "edgecolor": "none"})


def _draw_token_use(anatomy: Anatomy, axes: Axes) -> None:
    names = _largest(anatomy)
    height = 0.8 / len(names)
    for place, (name, colour) in enumerate(zip(names, _COLOURS, strict=False)):
        own = anatomy.use[name]
        at = np.arange(len(GROUPS)) + place * height
        axes.barh(at, own.token_shares, height * 0.9, color=colour, label=_escape(name))
        axes.plot(own.tokens, at, "|", color=_INK, markersize=14)
    axes.plot([], [], "|", color=_INK, label="share of tokens")
    axes.set_yticks(np.arange(len(GROUPS)) + 0.4 - height / 2, GROUPS)
    axes.invert_yaxis()
    axes.set(xlabel="Share of contributions", xlim=(0, 1))
    axes.legend(**_LEGEND)


def _draw_token_ablation(anatomy: Anatomy, axes: Axes) -> None:
    axes.barh(list(anatomy.tokens), list(anatomy.tokens.values()), color=_COLOURS[0])
    axes.axvline(anatomy.score, color=_MUTED, linestyle="--", linewidth=1)
    axes.invert_yaxis()
    axes.set(xlabel=_begun(score_name(anatomy.probe.task)), xlim=(0, 1))


def _spread(points: Sequence[Point]) -> Float[np.ndarray, "4 place"]:
    """Places, and the mean, lowest and highest score at each."""
    places = sorted({point.at for point in points})
    scores = [[point.score for point in points if point.at == at] for at in places]
    rows = [(at, np.mean(own), min(own), max(own)) for at, own in zip(places, scores, strict=True)]
    return np.array(rows).T


def _largest(anatomy: Anatomy) -> list[str]:
    ranked = sorted(anatomy.texts, key=lambda name: -anatomy.texts[name])
    return [name for name in anatomy.texts if name in ranked[: len(_COLOURS)]]


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(_escape(title), x=0.01, horizontalalignment="left", fontsize=11, color=_INK)
    return figure


def _begun(text: str) -> str:
    """With a capital letter, and AUPRC left as it is."""
    return text[:1].upper() + text[1:]


def _axes(figure: Figure, place: int | tuple[int, int], *, rows: int = 3, columns: int = 2) -> Axes:
    axes = figure.add_subplot(rows, columns, place)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _escape(text: str) -> str:
    # A dollar sign starts a formula in matplotlib, a leading underscore hides a legend's entry.
    return text.replace("$", r"\$").lstrip("_")
