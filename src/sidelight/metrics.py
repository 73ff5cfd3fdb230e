"""Metrics of probabilities against labels, and the drift of scores.

A metric is measured on many resamples of the rows at once: weights say how often each resample
counts each row. A loop over scikit-learn's metrics gives the same numbers far more slowly. A metric
is NaN where it is undefined.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float, Int, Shaped

from sidelight.errors import SidelightError
from sidelight.types import Task, TaskKind

Values = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
AnyArray = npt.NDArray[np.generic]

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

BINS = 10  # of a histogram of scores, to find drift by
_ECE_BINS = 15
_BLOCK_CELLS = 2**20


def _ratio(numerator: Values, denominator: Values) -> Values:
    """Numerator / denominator; NaN where the denominator is not positive."""
    undefined = np.full(numerator.shape, np.nan)
    return np.divide(numerator, denominator, out=undefined, where=denominator > 0)


def _mean_of_defined(values: Float[Values, "label resample"]) -> Float[Values, " resample"]:
    """The mean over the labels that are not NaN; NaN if all are."""
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0).sum(axis=0), defined.sum(axis=0).astype(np.float64))


@dataclass(frozen=True)
class Curve:
    """Weighted counts of one label's rows at each step of falling score.

    Attributes:
        hits: Positives that have the step's score.
        recalled: Positives that have the step's score or a higher one.
        alarms_before: Negatives above the step.
        alarms: Negatives above the step or on it.
        positives: All positives.
        negatives: All negatives.
    """

    hits: Float[Values, "step resample"]
    recalled: Float[Values, "step resample"]
    alarms_before: Float[Values, "step resample"]
    alarms: Float[Values, "step resample"]
    positives: Float[Values, " resample"]
    negatives: Float[Values, " resample"]

    def auprc(self) -> Float[Values, " resample"]:
        """Average precision: sum over steps of the rise in recall times the precision there.

        Not interpolated, like `sklearn.metrics.average_precision_score`. NaN with one class only.
        """
        passed = np.maximum(self.recalled + self.alarms, 1)
        total = (self.hits * self.recalled / passed).sum(axis=0)
        return _ratio(total, np.where(self.negatives > 0, self.positives, 0))

    def auroc(self) -> Float[Values, " resample"]:
        """Chance that a positive row outranks a negative one, with ties counted half.

        NaN with one class only.
        """
        beaten = self.negatives - (self.alarms_before + self.alarms) / 2
        return _ratio((self.hits * beaten).sum(axis=0), self.positives * self.negatives)

    def recall_at_fpr(self, limit: float) -> Float[Values, " resample"]:
        """The highest recall at which at most `limit` of the negatives are flagged.

        NaN with one class only.
        """
        allowed = self.alarms / np.maximum(self.negatives, 1) <= limit
        recalled = np.where(allowed, self.recalled, 0).max(axis=0, initial=0)
        return _ratio(recalled, np.where(self.negatives > 0, self.positives, 0))


@dataclass(frozen=True)
class Ranking:
    """One label's rows by falling score, cut at the steps where recall can rise.

    A step is a distinct score that at least one positive row has; rows with equal scores are
    passed together, as in scikit-learn.

    Attributes:
        order: Row numbers by falling score.
        positives: The positive ones among them, in the same order.
        first: Where in `positives` each step begins.
        before: How many rows score higher than the step.
        through: How many rows score as high as the step, or higher.
    """

    order: Int[Numbers, " row"]
    positives: Int[Numbers, " positive"]
    first: Int[Numbers, " step"]
    before: Int[Numbers, " step"]
    through: Int[Numbers, " step"]

    @staticmethod
    def of(scores: Float[Values, " row"], targets: Bool[Flags, " row"]) -> "Ranking":
        """Sorts one label's rows, once for all resamples."""
        order = np.argsort(-scores, kind="stable")
        positives = order[targets[order]]
        steps, first = np.unique(-scores[positives], return_index=True)
        rising = -scores[order]
        before, through = (np.searchsorted(rising, steps, side=side) for side in ("left", "right"))
        return Ranking(order, positives, first, before, through)

    def curve(self, weights: Float[Values, "row resample"]) -> Curve:
        """Walks down the ranking and counts each row as often as its weight says."""
        seen = np.zeros((len(weights) + 1, weights.shape[1]))
        np.cumsum(weights[self.order], axis=0, out=seen[1:])
        hits = np.add.reduceat(weights[self.positives], self.first, axis=0)  # (step, resample)
        recalled = hits.cumsum(axis=0)
        positives = hits.sum(axis=0)
        return Curve(
            hits,
            recalled,
            alarms_before=seen[self.before] - (recalled - hits),
            alarms=seen[self.through] - recalled,
            positives=positives,
            negatives=seen[-1] - positives,
        )


@dataclass(frozen=True)
class Confusion:
    """Weighted counts of each label's decisions.

    Attributes:
        hits: The label holds and was predicted.
        false_alarms: It was predicted and does not hold.
        misses: It holds and was not predicted.
    """

    hits: Float[Values, "label resample"]
    false_alarms: Float[Values, "label resample"]
    misses: Float[Values, "label resample"]

    def pooled(self) -> "Confusion":
        """The counts summed over the labels, for micro averages."""
        counts = (self.hits, self.false_alarms, self.misses)
        return Confusion(*(count.sum(axis=0, keepdims=True) for count in counts))

    def precision(self) -> Float[Values, "label resample"]:
        """Hits / predicted; 0 if the label holds but is never predicted, NaN if neither happens."""
        predicted = self.hits + self.false_alarms
        occurs = predicted + self.misses > 0
        return np.where(occurs, self.hits / np.maximum(predicted, 1), np.nan)

    def recall(self) -> Float[Values, "label resample"]:
        """Hits / rows where the label holds; NaN if it holds nowhere."""
        return _ratio(self.hits, self.hits + self.misses)

    def f1(self) -> Float[Values, "label resample"]:
        """2 hits / (holds + predicted); NaN if the label neither holds nor is predicted."""
        return _ratio(2 * self.hits, 2 * self.hits + (self.false_alarms + self.misses))


@dataclass(frozen=True)
class Confidences:
    """Stated probabilities, and whether what was stated is true.

    Attributes:
        stated: The positive class's probability if binary, the winner's if multi-class, that of
            every label if multi-label.
        correct: Whether the label holds.
    """

    stated: Float[Values, "row item"]
    correct: Bool[Flags, "row item"]
    count = _ECE_BINS

    @cached_property
    def bins(self) -> Int[Numbers, "row item"]:
        """Which of `count` equal bins of [0, 1] each stated probability falls into."""
        return np.minimum(self.stated * self.count, self.count - 1).astype(np.int64)

    def ece(self, weights: Float[Values, "row resample"]) -> Float[Values, " resample"]:
        """Expected calibration error: sum over bins of the share of items times the gap.

        The gap is |mean stated probability - share that is true| (Guo et al. 2017, equation 3). A
        multi-label task pools the bins over its labels. The error is biased upwards: chance gaps of
        small bins add up, in a resample even more, so a bootstrap interval of a small value can lie
        above it.
        """
        rows, items = self.stated.shape
        gaps = np.zeros((rows, self.count))
        excess = self.stated - self.correct
        np.add.at(gaps, (np.indices(excess.shape)[0], self.bins), excess)
        return np.abs(gaps.T @ weights).sum(axis=0) / (weights.sum(axis=0) * items)


@dataclass(frozen=True)
class Predictions:
    """What every metric is computed from: one column per label, whatever the task.

    Attributes:
        kind: Of the task; decides which labels are headlined and how they are averaged.
        scores: Probability of each label; a binary task has two columns, the negative first.
        targets: Whether the label holds.
        decisions: Whether the label was predicted.
    """

    kind: TaskKind
    scores: Float[Values, "row label"]
    targets: Bool[Flags, "row label"]
    decisions: Bool[Flags, "row label"]

    @property
    def headline(self) -> slice:
        """The columns that the metrics are about: the positive class if binary, else all."""
        return slice(1, 2) if self.kind == "binary" else slice(None)

    @property
    def once(self) -> Float[Values, "row 1"]:
        """The weights that count every row once: the rows as they are, not a resample."""
        return np.ones((len(self.scores), 1))

    @cached_property
    def rankings(self) -> tuple[Ranking, ...]:
        """Each label's rows, sorted."""
        return tuple(map(Ranking.of, self.scores.T, self.targets.T))

    def confusion(self, weights: Float[Values, "row resample"]) -> Confusion:
        """Counts each label's decisions, each row as often as its weight says."""
        outcomes = (
            self.targets & self.decisions,
            ~self.targets & self.decisions,
            self.targets & ~self.decisions,
        )
        return Confusion(*(outcome.T.astype(np.float64) @ weights for outcome in outcomes))

    def confusion_matrix(self) -> Int[Numbers, "..."]:
        """Counts of rows by actual and predicted label, [actual, predicted].

        A multi-label task has one matrix per label, [label, actual, predicted], absent before
        present.
        """
        actual, predicted = self.targets.astype(np.int64), self.decisions.astype(np.int64)
        if self.kind != "multilabel":
            return actual.T @ predicted
        actual, predicted = np.stack([1 - actual, actual]), np.stack([1 - predicted, predicted])
        return np.einsum("arl,prl->lap", actual, predicted)

    def confidences(self) -> Confidences:
        """The stated probabilities, for a reliability diagram or ECE."""
        stated, correct = self.scores[:, self.headline], self.targets[:, self.headline]
        if self.kind == "multiclass":
            winner = stated.argmax(axis=1, keepdims=True)
            stated = np.take_along_axis(stated, winner, axis=1)
            correct = np.take_along_axis(correct, winner, axis=1)
        return Confidences(stated, correct)


def decide(
    task: Task,
    probabilities: Float[Values, "row output"],
    labels: Shaped[AnyArray, "..."],
    *,
    thresholds: tuple[float, ...],
) -> Predictions:
    """Probabilities, labels and decisions in the form that the metrics read.

    A label is predicted where its probability reaches its threshold, or, in a multi-class task,
    where it is the most probable one (the first of equals).

    Args:
        task: The classes.
        probabilities: Each in [0, 1]; a binary task has one column, the positive class.
        labels: [row] of class numbers, or [row, label] of 0 and 1 for a multi-label task.
        thresholds: One for a binary task, one per label if multi-label, none if multi-class.

    Raises:
        SidelightError: See `checked_labels`; or a probability lies outside [0, 1], or the number of
            thresholds does not fit the task.
    """
    integers = checked_labels(task, probabilities, labels)
    if probabilities.min() < 0 or probabilities.max() > 1:
        raise SidelightError(
            f"Got values from {probabilities.min():.3g} to {probabilities.max():.3g}, wanted "
            "probabilities from 0 to 1. Apply a Calibration to logits first; 'none' will do."
        )
    wanted = 0 if task.kind == "multiclass" else task.outputs
    if len(thresholds) != wanted:
        raise SidelightError(
            f"Got {len(thresholds)} thresholds, wanted {wanted} for this {task.kind} task. "
            "Take them from choose_thresholds on validation rows of the same task."
        )
    if task.kind == "multilabel":
        return Predictions(task.kind, probabilities, integers == 1, probabilities >= thresholds)
    classes = np.arange(len(task.labels))
    targets = integers[:, None] == classes
    if task.kind == "multiclass":
        chosen = probabilities.argmax(axis=1)
        return Predictions(task.kind, probabilities, targets, chosen[:, None] == classes)
    flagged = probabilities >= thresholds  # (row, 1)
    scores = np.hstack([1 - probabilities, probabilities])
    return Predictions(task.kind, scores, targets, np.hstack([~flagged, flagged]))


def checked_labels(
    task: Task, outputs: Shaped[AnyArray, "row output"], labels: Shaped[AnyArray, "..."]
) -> Int[Numbers, "..."]:
    """The labels as integers, after checking that they and the outputs fit the task.

    Raises:
        SidelightError: A shape does not fit the task or the other array, there are no rows, an
            output is NaN or infinite, or a label is not one of the task's.
    """
    rows = len(outputs)
    if outputs.shape != (rows, task.outputs) or rows == 0:
        raise SidelightError(
            f"Got outputs of shape {outputs.shape}, wanted [row, {task.outputs}] with at least one "
            f"row for a {task.kind} task with labels {', '.join(task.labels)}. "
            "Pass one row per text; a binary task has one column, the positive class."
        )
    is_finite = np.isfinite(outputs.astype(np.float64)).all(axis=1)
    if not is_finite.all():
        raise SidelightError(
            f"Row {is_finite.argmin()} of the outputs holds NaN or infinity. Check whether that "
            "text's hidden states overflow in half precision, or whether training diverged."
        )
    is_multilabel = task.kind == "multilabel"
    shape = (rows, len(task.labels)) if is_multilabel else (rows,)
    if labels.shape != shape:
        raise SidelightError(
            f"Got labels of shape {labels.shape}, wanted {shape} for {rows} rows of a {task.kind} "
            "task. Pass the labels of exactly the rows that the outputs are for."
        )
    highest = 1 if is_multilabel else len(task.labels) - 1
    is_known = np.isin(labels, np.arange(highest + 1))
    if not is_known.all():
        raise SidelightError(
            f"Got labels such as {labels[~is_known][0]}, wanted whole numbers from 0 to {highest} "
            f"for a {task.kind} task. Map label names to their position in the task."
        )
    return labels.astype(np.int64)


def measure(
    predictions: Predictions, weights: Float[Values, "row resample"]
) -> dict[str, Float[Values, " resample"]]:
    """Every metric of `METRICS` in every resample.

    `f1`, `precision`, `recall`: of the positive class (binary), macro average (multi-class) or
    micro average (multi-label). `macro_f1`: the mean over all labels, both classes if binary.
    `auprc`, `auroc`, `recall_at_1pct_fpr`: of the positive class, else the mean over labels, each
    against the rest. `accuracy`: share of rows that are right, in all labels if multi-label.
    `ece`: see `Confidences`. A mean over labels leaves out those whose metric is undefined: a label
    that holds nowhere, or, for F1 and precision, is not predicted either.
    """
    confusion = predictions.confusion(weights)
    is_pooled = predictions.kind == "multilabel"
    counts = confusion.pooled() if is_pooled else confusion
    shown = slice(None) if is_pooled else predictions.headline
    curves = [one.curve(weights) for one in predictions.rankings[predictions.headline]]
    is_right = (predictions.decisions == predictions.targets).all(axis=1)
    return {
        "f1": _mean_of_defined(counts.f1()[shown]),
        "precision": _mean_of_defined(counts.precision()[shown]),
        "recall": _mean_of_defined(counts.recall()[shown]),
        "auprc": _mean_of_defined(np.array([one.auprc() for one in curves])),
        "auroc": _mean_of_defined(np.array([one.auroc() for one in curves])),
        "accuracy": is_right.astype(np.float64) @ weights / weights.sum(axis=0),
        "macro_f1": _mean_of_defined(confusion.f1()),
        "recall_at_1pct_fpr": _mean_of_defined(
            np.array([one.recall_at_fpr(0.01) for one in curves])
        ),
        "ece": predictions.confidences().ece(weights),
    }


def measure_resamples(
    predictions: Predictions, *, resamples: int, seed: int
) -> dict[str, Float[Values, " draw"]]:
    """Every metric: first on the rows themselves, then on each of `resamples` draws of all rows.

    The draws are with replacement. The same number of rows and resamples and the same seed give the
    same draws, whatever was predicted.
    """
    drawn = _resample(len(predictions.scores), resamples=resamples, seed=seed)
    measured = [measure(predictions, weights) for weights in chain([predictions.once], drawn)]
    return {name: np.concatenate([block[name] for block in measured]) for name in METRICS}


def _resample(rows: int, *, resamples: int, seed: int) -> Iterator[Float[Values, "row resample"]]:
    """How often each draw took each row, in blocks that stay in the processor's cache."""
    random = np.random.default_rng(seed)
    block = max(1, _BLOCK_CELLS // rows)
    for start in range(0, resamples, block):
        width = min(block, resamples - start)
        cells = random.integers(rows, size=(width, rows)) + rows * np.arange(width)[:, None]
        drawn = np.bincount(cells.ravel(), minlength=rows * width).reshape(width, rows)
        yield np.ascontiguousarray(drawn.T, dtype=np.float64)


def score_counts(scores: Sequence[float]) -> list[int]:
    """How many of the probabilities fall into each of ten equal bins of [0, 1]."""
    counts, _ = np.histogram(np.asarray(scores, dtype=float), bins=BINS, range=(0.0, 1.0))
    return counts.tolist()


def stability_index(reference: Sequence[int], observed: Sequence[int]) -> float:
    """The population stability index of two histograms, less what chance alone adds to it.

    The index is the sum of (p - q) ln(p / q) over the bins. For counts n and m of one distribution
    it is about (bins - 1) (1 / n + 1 / m), which is subtracted; the result is never below 0.
    Symmetric. Below 0.1 is usually called stable, above 0.25 changed.
    """
    # Half a count more in each bin, so that an empty bin is rare and not impossible.
    n, m = np.asarray(reference, dtype=float) + 0.5, np.asarray(observed, dtype=float) + 0.5
    p, q = n / n.sum(), m / m.sum()
    chance = (len(n) - 1) * (1 / n.sum() + 1 / m.sum())
    return max(0.0, float(((p - q) * np.log(p / q)).sum() - chance))
