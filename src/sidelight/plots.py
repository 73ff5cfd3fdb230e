"""Pictures of a probe on labelled rows: precision-recall, reliability and confusion.

Knows arrays and files. Draws on figures of its own, without a display or pyplot's global state.
"""

from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sidelight.metrics import (
    AnyArray,
    Confidences,
    Curve,
    Numbers,
    Predictions,
    Values,
    auprc,
    confusion_matrix,
    count,
    decide,
    ece,
    precision,
    recall,
    state_confidences,
    walk,
)
from sidelight.storage import replacing
from sidelight.types import Task

# matplotlib leaves the types of **kwargs open.
# pyright: reportUnknownMemberType=false


_DPI = 200
_INK, _MUTED, _FAINT = "#222222", "#8a8a8a", "#d0d0d0"
# Okabe & Ito's palette, told apart with any colour vision; black and yellow left out.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8, "title_fontsize": 8}
_NUMBERED_CLASSES = 30
_NAMED_CLASSES = 80
_NAME_LENGTH = 24
_UPRIGHT_CHARACTERS = 48
_CHARACTERS_PER_INCH = 10


def plot_report(
    task: Task,
    probabilities: Float[Values, "row output"],
    labels: Shaped[AnyArray, "..."],
    directory: Path,
    *,
    thresholds: tuple[float, ...],
    title: str,
) -> list[Path]:
    """Draws the three pictures that go with an evaluation.

    Args:
        task: The classes.
        probabilities: Calibrated; a binary task has one column, the positive class.
        labels: [row] of class numbers, or [row, label] of 0 and 1 for a multi-label task.
        directory: Where to write; made if absent. Pictures of the same names are replaced.
        thresholds: What the decisions are made with; none for a multi-class task.
        title: What was measured on what, for example ``toxicity on ToxicChat test``.

    Returns:
        The paths of ``precision_recall.png``, ``reliability.png`` and ``confusion.png``.

    Raises:
        SidelightError: As `metrics.decide`.
    """
    predictions = decide(task, probabilities, labels, thresholds=thresholds)
    figures = {
        "precision_recall.png": _precision_recall(task, predictions, title),
        "reliability.png": _reliability(task, predictions, thresholds, title),
        "confusion.png": _confusion(task, predictions, title),
    }
    return [save_figure(figure, directory / name) for name, figure in figures.items()]


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a PNG whole or, if killed, not at all; makes its folder."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=_DPI, metadata={"Software": None})
    return path


def _precision_recall(task: Task, predictions: Predictions, title: str) -> Figure:
    figure = _figure(7.2, 4.4, title)
    axes = _subplot(figure, (1, 1, 1))
    names = task.labels[predictions.headline]
    rankings = predictions.rankings[predictions.headline]
    curves = [walk(ranking, predictions.once) for ranking in rankings]
    areas = np.concatenate([auprc(curve) for curve in curves])
    shown = _worst(areas)
    for place in set(range(len(names))) - set(shown):
        _draw_curve(axes, curves[place], color=_FAINT, linewidth=0.7, zorder=1)
    for place, colour in zip(shown, _COLOURS, strict=False):
        label = f"{areas[place]:.3f}  {_name(names[place])}"
        _draw_curve(axes, curves[place], color=colour, linewidth=1.8, label=label, zorder=2)
    _mark_decisions(axes, predictions, shown)
    _draw_base_rate(axes, predictions)
    _finish_precision_recall(axes, areas, hidden=len(names) - len(shown))
    return figure


def _worst(areas: Float[Values, " label"]) -> list[int]:
    """Where the lowest areas are, as many as there are colours, lowest first; none undefined."""
    order = np.argsort(areas, kind="stable")
    return order[~np.isnan(areas[order])][: len(_COLOURS)].tolist()


def _draw_curve(axes: Axes, curve: Curve, **style: Any) -> None:
    if not curve.positives[0]:
        return
    recalled = curve.recalled[:, 0] / curve.positives[0]
    precise = curve.recalled[:, 0] / (curve.recalled + curve.alarms)[:, 0]
    # Each step reaches back to the one before, so the area drawn is the average precision.
    axes.step(np.append(0, recalled), np.append(precise[0], precise), where="pre", **style)


def _mark_decisions(axes: Axes, predictions: Predictions, shown: list[int]) -> None:
    confusion = count(predictions.targets, predictions.decisions, predictions.once)
    precise = precision(confusion)[predictions.headline, 0]
    recalled = recall(confusion)[predictions.headline, 0]
    style: dict[str, Any] = {"s": 42, "edgecolors": "white", "linewidths": 1.0, "zorder": 4}
    for place, colour in zip(shown, _COLOURS, strict=False):
        axes.scatter(recalled[place], precise[place], color=colour, clip_on=False, **style)
    decided = "chosen class" if predictions.kind == "multiclass" else "at the threshold"
    axes.scatter([], [], color=_MUTED, label=decided, **style)


def _draw_base_rate(axes: Axes, predictions: Predictions) -> None:
    rate = float(predictions.targets[:, predictions.headline].mean())
    label = f"{rate:.3f}  base rate" + ("" if predictions.kind == "binary" else ", mean")
    axes.axhline(rate, color=_MUTED, linestyle="--", linewidth=1, label=label, zorder=1)


def _finish_precision_recall(axes: Axes, areas: Float[Values, " label"], *, hidden: int) -> None:
    axes.set(xlabel="Recall", ylabel="Precision", xlim=(0, 1), ylim=(0, 1.02))
    if hidden:
        axes.plot([], [], color=_FAINT, label=f"{hidden} more")
    defined = areas[~np.isnan(areas)]
    mean = f", mean {defined.mean():.3f}; lowest first" if len(defined) > 1 else ""
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.02, 1)}
    axes.legend(title=f"AUPRC{mean}", alignment="left", **place, **_LEGEND)


def _reliability(
    task: Task, predictions: Predictions, thresholds: tuple[float, ...], title: str
) -> Figure:
    figure = _figure(5.2, 6.2, title)
    upper = _subplot(figure, (4, 1, (1, 3)))
    lower = _subplot(figure, (4, 1, 4))
    confidences = state_confidences(predictions)
    error = float(ece(confidences, predictions.once)[0])
    _draw_reliability(upper, confidences, error)
    _draw_histogram(lower, confidences)
    if task.kind == "binary":
        for axes in (upper, lower):
            axes.axvline(thresholds[0], color=_COLOURS[1], linestyle=":", label="threshold")
    upper.legend(**_LEGEND)
    lower.set_xlabel(_stated(task))
    return figure


def _stated(task: Task) -> str:
    return {
        "binary": f"Stated probability of {_name(task.labels[-1])}",
        "multiclass": "Stated probability of the chosen class",
        "multilabel": "Stated probability, all labels pooled",
    }[task.kind]


def _draw_reliability(axes: Axes, confidences: Confidences, error: float) -> None:
    bins = confidences.bins.ravel()
    sizes = np.bincount(bins, minlength=confidences.count)
    full = sizes > 0
    stated = np.bincount(bins, confidences.stated.ravel(), confidences.count)[full] / sizes[full]
    shares = np.bincount(bins, confidences.correct.ravel(), confidences.count)[full] / sizes[full]
    low, high = _wilson(shares, sizes[full])
    axes.plot([0, 1], [0, 1], color=_MUTED, linestyle="--", linewidth=1, label="perfect")
    axes.errorbar(
        stated,
        shares,
        yerr=np.stack([shares - low, high - shares]).clip(0),
        color=_COLOURS[0],
        marker="o",
        markersize=5,
        linewidth=1.5,
        elinewidth=1,
        label=f"observed, 95 % interval\n(ECE {error:.3f})",
        clip_on=False,
    )
    axes.set(ylabel="Observed share", xlim=(0, 1), ylim=(0, 1))
    axes.tick_params(labelbottom=False)


def _wilson(shares: Float[Values, " bin"], sizes: Int[Numbers, " bin"]) -> Float[Values, "2 bin"]:
    """The 95 % interval of a share (Wilson 1927); unlike the usual one it fits small bins."""
    z = 1.96
    inflation = 1 + z**2 / sizes
    centre = (shares + z**2 / (2 * sizes)) / inflation
    half = z * np.sqrt(shares * (1 - shares) / sizes + z**2 / (4 * sizes**2)) / inflation
    return np.stack([centre - half, centre + half])


def _draw_histogram(axes: Axes, confidences: Confidences) -> None:
    sizes = np.bincount(confidences.bins.ravel(), minlength=confidences.count)
    edges = np.linspace(0, 1, confidences.count + 1)
    axes.bar(
        edges[:-1], sizes, width=np.diff(edges), align="edge", color=_COLOURS[0], edgecolor="white"
    )
    axes.set(ylabel="Count", xlim=(0, 1), yscale="log")
    axes.set_ylim(bottom=0.7)


def _confusion(task: Task, predictions: Predictions, title: str) -> Figure:
    counts = confusion_matrix(predictions)
    if task.kind == "multilabel":
        return _outcome_rates(task, counts, title)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = float(np.clip(0.42 * len(task.labels) + 2.4, 4.8, 13))
    figure = _figure(size, size, title)
    axes = _subplot(figure, (1, 1, 1))
    _draw_cells(axes, shares, counts, between="\n" if len(counts) <= 4 else None)
    axes.set(xlabel="Predicted", ylabel="Actual (shade: share of the row)")
    _name_ticks(axes, task.labels, task.labels)
    return figure


def _outcome_rates(task: Task, counts: Int[Numbers, "label 2 2"], title: str) -> Figure:
    shares = counts / np.maximum(counts.sum(axis=2, keepdims=True), 1)
    # Present before absent, and hits before misses: what a reader looks for comes first.
    shares, counts = shares[:, ::-1, ::-1].reshape(-1, 4), counts[:, ::-1, ::-1].reshape(-1, 4)
    height = float(np.clip(0.34 * len(task.labels) + 1.8, 3, 14))
    figure = _figure(6.8, height, title)
    axes = _subplot(figure, (1, 1, 1))
    _draw_cells(axes, shares, counts, between=" · ")
    axes.axvline(1.5, color="white", linewidth=4)
    outcomes = ("present,\nflagged", "present,\nmissed", "absent,\nflagged", "absent,\npassed")
    _name_ticks(axes, task.labels, outcomes)
    return figure


def _draw_cells(
    axes: Axes,
    shares: Float[Values, "row column"],
    counts: Int[Numbers, "row column"],
    *,
    between: str | None,
) -> None:
    """Shades cells by share; writes the count, and after `between`, unless None, the share."""
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.spines[:].set_visible(False)
    if max(counts.shape) > _NUMBERED_CLASSES and min(counts.shape) > 4:
        return
    for (row, column), number in np.ndenumerate(counts):
        share = shares[row, column]
        text = f"{number:,}" if between is None else f"{number:,}{between}{share:.0%}"
        colour = "white" if share > 0.5 else _INK
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)


def _name_ticks(axes: Axes, rows: tuple[str, ...], columns: tuple[str, ...]) -> None:
    axes.tick_params(length=0, labelsize=8)
    for axis, names in ((axes.yaxis, rows), (axes.xaxis, columns)):
        shown = names if len(names) <= _NAMED_CLASSES else ()
        axis.set_ticks(range(len(shown)), [_name(name) for name in shown])
    longest = max(len(line) for name in columns for line in _name(name).split("\n"))
    if longest * len(columns) > _UPRIGHT_CHARACTERS:
        axes.tick_params(axis="x", rotation=90)


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    lines = wrap(title, int(width * _CHARACTERS_PER_INCH))
    figure.suptitle(
        _escape("\n".join(lines)), x=0.01, horizontalalignment="left", fontsize=11, color=_INK
    )
    return figure


def _subplot(figure: Figure, place: tuple[int, int, Any]) -> Axes:
    axes = figure.add_subplot(*place)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _name(label: str) -> str:
    short = label if len(label) <= _NAME_LENGTH else label[: _NAME_LENGTH - 1] + "…"
    return _escape(short)


def _escape(text: str) -> str:
    # A dollar sign starts a formula in matplotlib.
    return text.replace("$", r"\$")
