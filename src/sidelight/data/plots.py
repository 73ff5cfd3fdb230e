"""Plots of probabilities on labelled rows, based on scikit-learn's displays."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from sklearn.metrics import (
    ConfusionMatrixDisplay,
    PrecisionRecallDisplay,
    average_precision_score,
)

from sidelight.errors import SidelightError, how_to_install
from sidelight.statistics.metrics import Predictions, calibration_error
from sidelight.storage import replacing

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise SidelightError(
        f"Plots need the matplotlib package. {how_to_install('.[plots]')}"
    ) from error

# matplotlib and scikit-learn do not type **kwargs. pyright: reportUnknownMemberType=false

_DPI = 200
_CURVES, _NUMBERED_CLASSES, _NAMED_CLASSES, _MATRICES = 8, 30, 80, 24
_NAME_LENGTH = 24


def plot_report(predictions: Predictions, directory: Path, *, title: str) -> list[Path]:
    """Draw the three plots that go with an evaluation.

    Args:
        predictions: Result of ``decide`` on calibrated probabilities.
        directory: Output folder, created if necessary. Plots of the same names are replaced.
        title: Probe and data, for example ``toxicity on ToxicChat test``.

    Returns:
        The paths of ``precision_recall.png``, ``reliability.png`` and ``confusion.png``.
    """
    names = [_escape(label[:_NAME_LENGTH]) for label in predictions.task.labels]
    charts = {
        "precision_recall.png": _precision_recall(predictions, names, title),
        "reliability.png": _reliability(predictions, title),
        "confusion.png": _confusion(predictions, names, title),
    }
    return [save_figure(figure, directory / name) for name, figure in charts.items()]


def plot_deferral(
    shares: Sequence[float],
    recalls: Sequence[Sequence[float]],
    *,
    probe: float,
    judge: float | None,
    path: Path,
    title: str,
) -> Path:
    """Plot recall at 1 % false positives against the share of texts deferred to a judge.

    Args:
        shares: Shares of the texts, ascending.
        recalls: Recall at each share, and both ends of its interval.
        probe: Recall of the probe alone.
        judge: Recall of the judge alone; None if unknown.
        path: Path of the PNG file.
        title: Title of the plot.
    """
    figure, (axes,) = _figure(7.2, 5.4, title)
    percent = 100 * np.array(shares)
    middle, low, high = np.array(recalls, dtype=np.float64).T
    axes.errorbar(
        percent,
        middle,
        [middle - low, high - middle],
        marker="o",
        capsize=3,
        label="probe and judge",
    )
    axes.axhline(probe, linestyle="--", color="grey", label="probe alone")
    if judge is not None:
        axes.axhline(judge, linestyle=":", color="black", label="judge alone, on every text")
    # Small shares matter most.
    axes.set_xscale("symlog", linthresh=1)
    ticks = [0, 1, 2, 5, 10, 20, 50, 100]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(
        xlabel="texts deferred to the judge (%)",
        ylabel="recall at 1 % false positives",
        xlim=(-0.2, 110),
        ylim=(0, 1.02),
    )
    axes.legend(loc="lower right")
    return save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG atomically, and create its folder."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=_DPI, metadata={"Software": None})
    return path


def _precision_recall(predictions: Predictions, names: Sequence[str], title: str) -> Figure:
    """Plot the curve of each label that occurs; of many, those with the lowest areas."""
    figure, (axes,) = _figure(7.2, 5.4, title)
    columns = zip(names, predictions.scores.T, predictions.targets.T, strict=False)
    drawable = [column for column in list(columns)[predictions.headline] if column[2].any()]
    drawable.sort(key=lambda column: float(average_precision_score(column[2], column[1])))
    for name, scores, targets in drawable[:_CURVES]:
        PrecisionRecallDisplay.from_predictions(targets, scores, name=name, ax=axes)
    axes.legend(fontsize=8)
    return figure


def _reliability(predictions: Predictions, title: str) -> Figure:
    """Plot the frequency of labels at each predicted probability."""
    from sklearn.calibration import CalibrationDisplay

    figure, (axes,) = _figure(5.4, 5.4, title)
    stated, correct = (values.ravel() for values in predictions.confidences())
    name = f"ECE {calibration_error(predictions, predictions.once)[0]:.3f}"
    CalibrationDisplay.from_predictions(
        correct, stated, n_bins=10, pos_label=True, name=name, ax=axes
    )
    return figure


def _confusion(predictions: Predictions, names: Sequence[str], title: str) -> Figure:
    """Plot actual by predicted class; for a multi-label task, a matrix for each of the first
    labels.
    """
    counts = predictions.confusion_matrix()
    style: dict[str, Any] = {"colorbar": False, "cmap": "Blues"}
    if predictions.task.kind == "multilabel":
        drawn = names[:_MATRICES]
        figure, subplots = _figure(9.6, 2.8 * -(-len(drawn) // 4), title, count=len(drawn))
        for axes, matrix, name in zip(subplots, counts, drawn, strict=False):
            display = ConfusionMatrixDisplay(matrix, display_labels=["absent", "present"])
            display.plot(ax=axes, **style)
            axes.set_title(name, fontsize=9)
        return figure
    size = float(np.clip(0.42 * len(names) + 2.4, 4.8, 13))
    figure, (axes,) = _figure(size, size, title)
    has_numbers = len(names) <= _NUMBERED_CLASSES
    display = ConfusionMatrixDisplay(counts, display_labels=names)
    display.plot(ax=axes, include_values=has_numbers, xticks_rotation="vertical", **style)
    if len(names) > _NAMED_CLASSES:
        axes.set(xticks=[], yticks=[])
    return figure


def _figure(
    width: float, height: float, title: str, *, count: int = 1
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(_escape(fill(title, int(width * 10))), fontsize=11)
    columns = min(count, 4)
    rows = -(-count // columns)
    return figure, [figure.add_subplot(rows, columns, n + 1) for n in range(count)]


def _escape(text: str) -> str:
    # In matplotlib, a dollar sign starts a formula and a leading underscore hides a name.
    return text.replace("$", r"\$").lstrip("_")
