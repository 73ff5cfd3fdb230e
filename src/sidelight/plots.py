"""Plots of probabilities on labelled rows (precision-recall, reliability, confusion), and of rates.

They are drawn on figures of their own, without a display and without pyplot's global state;
docs/dependencies.md says why scikit-learn's displays do not serve.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from sidelight.errors import SidelightError
from sidelight.metrics import Predictions, decide, wilson
from sidelight.storage import replacing
from sidelight.types import AnyArray, Task, Values

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise SidelightError(
        "Plots need the package matplotlib. Run `pip install 'sidelight[plots]'`."
    ) from error

# matplotlib leaves the types of **kwargs open.
# pyright: reportUnknownMemberType=false


_DPI = 200
_INK, _MUTED, _FAINT = "#222222", "#8a8a8a", "#d0d0d0"
# Okabe & Ito's palette, which any colour vision can tell apart, without black and yellow.
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
    """Draws the three plots that go with an evaluation.

    Args:
        task: The classes.
        probabilities: Calibrated; a binary task has one column, the positive class.
        labels: [row] of class numbers, or [row, label] of 0 and 1 for a multi-label task.
        directory: Where to write; made if absent. Plots of the same names are replaced.
        thresholds: What the decisions are made with; none for a multi-class task.
        title: What was measured on what, for example ``toxicity on ToxicChat test``.

    Returns:
        The paths of ``precision_recall.png``, ``reliability.png`` and ``confusion.png``.

    Raises:
        SidelightError: See `metrics.decide`.
    """
    predictions = decide(task, probabilities, labels, thresholds=thresholds)
    figures = {
        "precision_recall.png": _precision_recall(task, predictions, title),
        "reliability.png": _reliability(task, predictions, thresholds, title),
        "confusion.png": _confusion(task, predictions, title),
    }
    return [save_figure(figure, directory / name) for name, figure in figures.items()]


def plot_rates(
    names: Sequence[str],
    series: Mapping[str, Sequence[tuple[float | None, float | None, tuple[float, float] | None]]],
    path: Path,
    *,
    title: str,
) -> Path:
    """Draws how some rates change: for each name a ring for texts alone, and a dot with interval.

    Args:
        names: Of the rows.
        series: For each kind of rate and each row: alone, changed, and the interval of the latter;
            None where nothing was measured.
        path: Of the PNG.
        title: What was measured on what.
    """
    figure = _figure(7.2, 1.6 + 0.26 * len(names), title)
    axes = _subplot(figure, (1, 1, 1))
    for place, (kind, rows) in enumerate(series.items()):
        colour, shift = _COLOURS[place], 0.16 * (2 * place - len(series) + 1)
        axes.scatter([], [], color=colour, s=30, label=kind)
        for row, (alone, changed, interval) in enumerate(rows):
            if alone is None or changed is None or interval is None:
                continue
            height = row + shift
            axes.plot(interval, [height, height], color=colour, linewidth=1)
            axes.scatter(changed, height, color=colour, s=30, zorder=3, clip_on=False)
            style: dict[str, Any] = {"facecolors": "none", "edgecolors": colour, "clip_on": False}
            axes.scatter(alone, height, s=30, **style)
    axes.scatter([], [], s=30, facecolors="none", edgecolors=_MUTED, label="alone")
    axes.set_yticks(range(len(names)), [_name(name) for name in names])
    axes.set(xlabel="Share that is flagged, with 95 % interval", xlim=(0, 1))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", color=_FAINT, linewidth=0.5)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), **_LEGEND)
    return save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a PNG, whole or not at all, and makes its folder."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=_DPI, metadata={"Software": None})
    return path


def _precision_recall(task: Task, predictions: Predictions, title: str) -> Figure:
    """One curve per label: those with the lowest areas coloured and named, the others grey."""
    figure = _figure(7.2, 4.4, title)
    axes = _subplot(figure, (1, 1, 1))
    shown = predictions.headline
    names = task.labels[shown]
    curves = [ranking.curve(predictions.once) for ranking in predictions.rankings[shown]]
    areas = np.concatenate([curve.auprc() for curve in curves])
    order = np.argsort(areas, kind="stable")
    worst: list[int] = order[~np.isnan(areas[order])][: len(_COLOURS)].tolist()
    coloured = dict(zip(worst, _COLOURS, strict=False))
    for index in [*sorted(set(range(len(names))) - set(worst)), *worst]:
        curve = curves[index]
        if not curve.positives[0]:
            continue
        recalled = curve.recalled[:, 0] / curve.positives[0]
        precise = curve.recalled[:, 0] / (curve.recalled + curve.alarms)[:, 0]
        style: dict[str, Any] = {"color": _FAINT, "linewidth": 0.7, "zorder": 1}
        if index in coloured:
            label = f"{areas[index]:.3f}  {_name(names[index])}"
            style = {"color": coloured[index], "linewidth": 1.8, "zorder": 2, "label": label}
        # Each step reaches back to the last one, so the area drawn is the average precision.
        axes.step(np.append(0, recalled), np.append(precise[0], precise), where="pre", **style)
    confusion = predictions.confusion(predictions.once)
    precision, recall = confusion.precision()[shown, 0], confusion.recall()[shown, 0]
    style = {"s": 42, "edgecolors": "white", "linewidths": 1.0, "zorder": 4}
    for index, colour in coloured.items():
        axes.scatter(recall[index], precision[index], color=colour, clip_on=False, **style)
    decided = "chosen class" if predictions.kind == "multiclass" else "at the threshold"
    axes.scatter([], [], color=_MUTED, label=decided, **style)
    rate = float(predictions.targets[:, shown].mean())
    base = f"{rate:.3f}  base rate" + ("" if predictions.kind == "binary" else ", mean")
    axes.axhline(rate, color=_MUTED, linestyle="--", linewidth=1, label=base, zorder=1)
    axes.set(xlabel="Recall", ylabel="Precision", xlim=(0, 1), ylim=(0, 1.02))
    if len(names) > len(worst):
        axes.plot([], [], color=_FAINT, label=f"{len(names) - len(worst)} more")
    defined = areas[~np.isnan(areas)]
    mean = f", mean {defined.mean():.3f}; lowest first" if len(defined) > 1 else ""
    anchor: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.02, 1)}
    axes.legend(title=f"AUPRC{mean}", alignment="left", **anchor, **_LEGEND)
    return figure


def _reliability(
    task: Task, predictions: Predictions, thresholds: tuple[float, ...], title: str
) -> Figure:
    """How often labels hold at each predicted probability, above a histogram of those."""
    figure = _figure(5.2, 6.2, title)
    upper, lower = _subplot(figure, (4, 1, (1, 3))), _subplot(figure, (4, 1, 4))
    confidences = predictions.confidences()
    bins, count = confidences.bins.ravel(), confidences.count
    sizes = np.bincount(bins, minlength=count)
    full = sizes > 0
    stated = np.bincount(bins, confidences.stated.ravel(), count)[full] / sizes[full]
    shares = np.bincount(bins, confidences.correct.ravel(), count)[full] / sizes[full]
    low, high = wilson(shares, sizes[full])
    error = float(confidences.ece(predictions.once)[0])
    upper.plot([0, 1], [0, 1], color=_MUTED, linestyle="--", linewidth=1, label="perfect")
    upper.errorbar(
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
    upper.set(ylabel="Observed share", xlim=(0, 1), ylim=(0, 1))
    upper.tick_params(labelbottom=False)
    edges = np.linspace(0, 1, count + 1)
    lower.bar(
        edges[:-1], sizes, width=np.diff(edges), align="edge", color=_COLOURS[0], edgecolor="white"
    )
    lower.set(ylabel="Count", xlim=(0, 1), yscale="log")
    lower.set_ylim(bottom=0.7)
    if task.kind == "binary":
        for axes in (upper, lower):
            axes.axvline(thresholds[0], color=_COLOURS[1], linestyle=":", label="threshold")
    upper.legend(**_LEGEND)
    whose = {
        "binary": f" of {_name(task.labels[-1])}",
        "multiclass": " of the chosen class",
        "multilabel": ", all labels pooled",
    }
    lower.set_xlabel(f"Stated probability{whose[task.kind]}")
    return figure


def _confusion(task: Task, predictions: Predictions, title: str) -> Figure:
    """Actual by predicted class, or the four outcomes of each label of a multi-label task."""
    counts, classes = predictions.confusion_matrix(), len(task.labels)
    shares = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    if task.kind == "multilabel":
        # What a reader looks for comes first: present before absent, hits before misses.
        shares, counts = shares[:, ::-1, ::-1].reshape(-1, 4), counts[:, ::-1, ::-1].reshape(-1, 4)
        figure = _figure(6.8, float(np.clip(0.34 * classes + 1.8, 3, 14)), title)
        axes = _subplot(figure, (1, 1, 1))
        columns = ("present,\nflagged", "present,\nmissed", "absent,\nflagged", "absent,\npassed")
        between = " · "
    else:
        size = float(np.clip(0.42 * classes + 2.4, 4.8, 13))
        figure = _figure(size, size, title)
        axes = _subplot(figure, (1, 1, 1))
        axes.set(xlabel="Predicted", ylabel="Actual (shade: share of the row)")
        columns = task.labels
        between = "\n" if classes <= 4 else None
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.spines[:].set_visible(False)
    if classes <= _NUMBERED_CLASSES or task.kind == "multilabel":
        for (row, column), number in np.ndenumerate(counts):
            share = shares[row, column]
            text = f"{number:,}" if between is None else f"{number:,}{between}{share:.0%}"
            colour = "white" if share > 0.5 else _INK
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    if task.kind == "multilabel":
        axes.axvline(1.5, color="white", linewidth=4)
    axes.tick_params(length=0, labelsize=8)
    for axis, names in ((axes.yaxis, task.labels), (axes.xaxis, columns)):
        named = names if len(names) <= _NAMED_CLASSES else ()
        axis.set_ticks(range(len(named)), [_name(name) for name in named])
    longest = max(len(line) for name in columns for line in _name(name).split("\n"))
    if longest * len(columns) > _UPRIGHT_CHARACTERS:
        axes.tick_params(axis="x", rotation=90)
    return figure


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    lines = _escape("\n".join(wrap(title, int(width * _CHARACTERS_PER_INCH))))
    figure.suptitle(lines, x=0.01, horizontalalignment="left", fontsize=11, color=_INK)
    return figure


def _subplot(figure: Figure, place: tuple[int, int, Any]) -> Axes:
    axes = figure.add_subplot(*place)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _name(label: str) -> str:
    return _escape(label if len(label) <= _NAME_LENGTH else label[: _NAME_LENGTH - 1] + "…")


def _escape(text: str) -> str:
    # A dollar sign starts a formula in matplotlib.
    return text.replace("$", r"\$")
