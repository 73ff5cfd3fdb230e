"""Metrics of probabilities against labels.

All resamples of the rows are measured at once: weights give the count of each row in each resample.
A loop over scikit-learn's metrics gives the same numbers far more slowly (docs/dependencies.md). An
undefined metric is NaN.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from sidelight.errors import SidelightError
from sidelight.types import AnyArray, Flags, Numbers, Task, Values

METRICS = (
    "f1",
    "precision",
    "recall",
    "auprc",
    "auroc",
    "accuracy",
    "macro_f1",
    "recall_at_1pct_fpr",
    "ece",
)

_ECE_BINS = 15
_BLOCK_CELLS = 2**20
# Floor before log().
_SURE = 1e-15


def _ratio(numerator: Values, denominator: Values) -> Values:
    """The quotient; NaN unless the denominator is positive."""
    undefined = np.full(numerator.shape, np.nan)
    return np.divide(numerator, denominator, out=undefined, where=denominator > 0)


def wilson(
    shares: Float[Values, " bin"], sizes: Int[Numbers, " bin"] | Float[Values, " bin"]
) -> Float[Values, "2 bin"]:
    """The 95 % interval of a share (Wilson 1927), which suits small bins."""
    z = 1.96
    inflation = 1 + z**2 / sizes
    centre = (shares + z**2 / (2 * sizes)) / inflation
    half = z * np.sqrt(shares * (1 - shares) / sizes + z**2 / (4 * sizes**2)) / inflation
    # Rounding could leave [0, 1].
    return np.stack([centre - half, centre + half]).clip(0, 1)


def _mean_of_defined(values: Float[Values, "label resample"]) -> Float[Values, " resample"]:
    """The mean over the labels that are not NaN; NaN if all are."""
    return np.ma.masked_invalid(values).mean(axis=0).filled(np.nan)


@dataclass(frozen=True)
class Predictions:
    """The input of every metric: one column per label, whatever the task.

    Attributes:
        task: The classes; the kind decides which labels the metrics cover and how they are
            averaged.
        thresholds: One for a binary task, one per label if multi-label, none if multi-class.
        scores: Probability of each label; a binary task has two columns, the negative class first.
        targets: Whether the label holds.
        decisions: Whether the label was predicted.
    """

    task: Task
    thresholds: tuple[float, ...]
    scores: Float[Values, "row label"]
    targets: Bool[Flags, "row label"]
    decisions: Bool[Flags, "row label"]

    @property
    def headline(self) -> slice:
        """The columns that the metrics cover: the positive class if binary, else all."""
        return slice(-self.task.outputs, None)

    @property
    def once(self) -> Float[Values, "row 1"]:
        """Weights that count each row once: the rows themselves, not a resample."""
        return np.ones((len(self.scores), 1))

    def confusion_matrix(self) -> Int[Numbers, "..."]:
        """Counts of rows by actual and predicted label: [actual, predicted].

        A multi-label task has a 2 x 2 matrix per label, [label, actual, predicted], where absent
        comes before present.
        """
        return self.task.confusion_matrix(self.targets, self.decisions)

    def confidences(self) -> tuple[Float[Values, "row item"], Bool[Flags, "row item"]]:
        """The probabilities for a reliability diagram or ECE, and their outcomes.

        They belong to the positive class if binary, to the most probable class if multi-class, and
        to every label if multi-label.
        """
        return self.task.confidences(self.scores[:, self.headline], self.targets[:, self.headline])


def decide(
    task: Task,
    probabilities: Float[Values, "row output"],
    labels: Shaped[AnyArray, "..."],
    *,
    thresholds: tuple[float, ...],
    row_thresholds: Float[Values, "row threshold"] | None = None,
) -> Predictions:
    """Return probabilities, labels and decisions in the form that the metrics read.

    A label is predicted if its probability reaches its threshold or, in a multi-class task, if it
    is the most probable one (the first in a tie).

    Args:
        task: The classes.
        probabilities: Each in [0, 1]; a binary task has one column, the positive class.
        labels: [row] of class numbers, or [row, label] of 0 and 1 for a multi-label task.
        thresholds: From ``choose_thresholds`` on validation rows.
        row_thresholds: Thresholds of each row, if they differ between rows.

    Raises:
        SidelightError: As `checked_labels`.
    """
    integers = checked_labels(task, probabilities, labels)
    assert 0 <= probabilities.min() <= probabilities.max() <= 1, "logits are no probabilities"
    assert task.has_thresholds(thresholds), thresholds
    applied = thresholds if row_thresholds is None else row_thresholds
    decided = task.decided(probabilities, applied)
    scores = task.label_probabilities(probabilities)
    return Predictions(task, thresholds, scores, task.holds(integers), decided)


def checked_labels(
    task: Task, outputs: Shaped[AnyArray, "row output"], labels: Shaped[AnyArray, "..."]
) -> Int[Numbers, "..."]:
    """The labels as integers.

    Raises:
        SidelightError: An output is NaN or infinite.
    """
    assert outputs.shape == (len(labels), task.outputs), (outputs.shape, labels.shape)
    is_finite = np.isfinite(outputs.astype(np.float64)).all(axis=1)
    if not is_finite.all():
        raise SidelightError(
            f"Row {is_finite.argmin()} of the outputs contains NaN or infinity. Check whether "
            "its hidden states overflow in half precision, or whether training diverged."
        )
    assert task.is_form_of(labels), labels
    return labels.astype(np.int64)


def log_losses(
    task: Task, probabilities: Float[Values, "row output"], labels: Shaped[AnyArray, "..."]
) -> Float[Values, " row"]:
    """The log loss of each row, averaged over the labels of a multi-label task.

    Args:
        task: The classes.
        probabilities: A binary task has one column, the positive class.
        labels: [row] of class numbers, or [row, label] of 0 and 1 for a multi-label task.

    Raises:
        SidelightError: As `checked_labels`.
    """
    integers = checked_labels(task, probabilities, labels)
    likelihoods = task.likelihoods(probabilities, integers)
    return -np.log(likelihoods.clip(_SURE, None)).mean(axis=1)


def decision_metrics(
    predictions: Predictions, weights: Float[Values, "row resample"], *, is_pooled: bool = False
) -> dict[str, Float[Values, "label resample"]]:
    """Precision, recall and F1 of each label's decisions, or of all labels pooled.

    Precision and F1 are NaN if no row has the label or its prediction. Precision is 0 if the label
    occurs but is never predicted; recall is NaN if it never occurs.
    """
    targets, decisions = predictions.targets, predictions.decisions
    confusion = (targets & decisions, ~targets & decisions, targets & ~decisions)
    counts = np.stack([flags.T.astype(np.float64) @ weights for flags in confusion])
    if is_pooled:
        counts = counts.sum(axis=1, keepdims=True)
    hits, alarms, misses = counts
    return {
        "precision": np.where(
            hits + alarms + misses > 0, hits / np.maximum(hits + alarms, 1), np.nan
        ),
        "recall": _ratio(hits, hits + misses),
        "f1": _ratio(2 * hits, 2 * hits + (alarms + misses)),
    }


def ranking_metrics(
    scores: Float[Values, " row"],
    targets: Bool[Flags, " row"],
    weights: Float[Values, "row resample"],
) -> dict[str, Float[Values, " resample"]]:
    """The ranking metrics of one label's scores; NaN if no row or every row has the label.

    Recall increases at the distinct scores of positive rows. Rows with equal scores are handled
    together, as in scikit-learn. ``auprc`` is the average precision, not interpolated; ``auroc`` is
    the probability that a positive outranks a negative, where ties count half.
    """
    order = np.argsort(-scores, kind="stable")
    positive_rows = order[targets[order]]
    steps, first = np.unique(-scores[positive_rows], return_index=True)
    before, through = (np.searchsorted(-scores[order], steps, side) for side in ("left", "right"))
    seen = np.zeros((len(weights) + 1, weights.shape[1]))
    np.cumsum(weights[order], axis=0, out=seen[1:])
    hits = np.add.reduceat(weights[positive_rows], first, axis=0)  # (step, resample)
    recalled = hits.cumsum(axis=0)
    # Negatives with a higher score than the step's, and with at least the same score.
    alarms_before, alarms = seen[before] - (recalled - hits), seen[through] - recalled
    negatives = seen[-1] - hits.sum(axis=0)
    positives = np.where(negatives > 0, hits.sum(axis=0), 0)
    precision = recalled / np.maximum(recalled + alarms, 1)
    beaten = negatives - (alarms_before + alarms) / 2
    is_allowed = alarms / np.maximum(negatives, 1) <= 0.01
    return {
        "auprc": _ratio((hits * precision).sum(axis=0), positives),
        "auroc": _ratio((hits * beaten).sum(axis=0), positives * negatives),
        "recall_at_1pct_fpr": _ratio(
            np.where(is_allowed, recalled, 0).max(axis=0, initial=0), positives
        ),
    }


def calibration_error(
    predictions: Predictions, weights: Float[Values, "row resample"]
) -> Float[Values, " resample"]:
    """Expected calibration error: the sum over bins of the share of items times the gap.

    The gap is |mean probability - share of positives| (Guo et al. 2017, equation 3). The labels of
    a multi-label task share the same bins. The error is biased upwards, because random gaps of
    small bins add up. A resample adds more of them, so the bootstrap interval of a small value can
    lie above the value.
    """
    stated, correct = predictions.confidences()
    rows, items = stated.shape
    gaps = np.zeros((rows, _ECE_BINS))
    bins = np.minimum(stated * _ECE_BINS, _ECE_BINS - 1).astype(np.int64)
    np.add.at(gaps, (np.indices(bins.shape)[0], bins), stated - correct)
    return np.abs(gaps.T @ weights).sum(axis=0) / (weights.sum(axis=0) * items)


def measure(
    predictions: Predictions, weights: Float[Values, "row resample"]
) -> dict[str, Float[Values, " resample"]]:
    """Compute every metric of `METRICS` in every resample.

    `f1`, `precision`, `recall`: of the positive class (binary), macro average (multi-class) or
    micro average (multi-label). `macro_f1`: the mean over all labels, both classes if binary.
    `auprc`, `auroc`, `recall_at_1pct_fpr`: of the positive class, or else the mean over labels,
    each against the rest. `accuracy`: the share of rows that are correct, in all labels if
    multi-label. `ece`: see `calibration_error`. A mean over labels leaves out labels whose metric
    is undefined: those that hold nowhere and, for F1 and precision, are never predicted either.
    """
    each = decision_metrics(predictions, weights)
    metrics = {name: values[predictions.headline] for name, values in each.items()}
    if predictions.task.kind == "multilabel":
        metrics = decision_metrics(predictions, weights, is_pooled=True)
    arrays = (predictions.scores.T, predictions.targets.T)
    ranked = [
        ranking_metrics(scores, targets, weights)
        for scores, targets in zip(*(rows[predictions.headline] for rows in arrays), strict=True)
    ]
    metrics |= {name: np.array([values[name] for values in ranked]) for name in ranked[0]}
    is_right = (predictions.decisions == predictions.targets).all(axis=1)
    return {
        **{name: _mean_of_defined(values) for name, values in metrics.items()},
        "accuracy": is_right.astype(np.float64) @ weights / weights.sum(axis=0),
        "macro_f1": _mean_of_defined(each["f1"]),
        "ece": calibration_error(predictions, weights),
    }


def measure_resamples(
    predictions: Predictions, *, resamples: int, seed: int
) -> dict[str, Float[Values, " draw"]]:
    """Compute every metric on the rows themselves, then on each of `resamples` bootstrap draws.

    The draws depend only on the number of rows, the number of resamples and the seed.
    """
    drawn = _resample(len(predictions.scores), resamples=resamples, seed=seed)
    measured = [measure(predictions, weights) for weights in chain([predictions.once], drawn)]
    return {name: np.concatenate([block[name] for block in measured]) for name in METRICS}


def _resample(rows: int, *, resamples: int, seed: int) -> Iterator[Float[Values, "row resample"]]:
    """The count of each row in each draw, in blocks that fit the CPU cache."""
    random = np.random.default_rng(seed)
    block = max(1, _BLOCK_CELLS // rows)
    for start in range(0, resamples, block):
        width = min(block, resamples - start)
        cells = random.integers(rows, size=(width, rows)) + rows * np.arange(width)[:, None]
        drawn = np.bincount(cells.ravel(), minlength=rows * width).reshape(width, rows)
        yield np.ascontiguousarray(drawn.T, dtype=np.float64)
