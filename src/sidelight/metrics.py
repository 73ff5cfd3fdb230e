"""The arrays that metrics read and give. Knows their numbers' types; axes are in the signatures.

Ratios and means where undefined is NaN. Knows numbers, not the metrics that they stand for.

Metrics of the order of scores, over all thresholds. Knows one label's scores, not decisions.

From a task's probabilities and labels, once checked, to one column per label.

Knows tasks, thresholds and what a user can get wrong in them; measures nothing.

Counts of right and wrong decisions, and their ratios. Knows decisions, not probabilities.

Whether probabilities mean what they say. Knows stated probabilities, not thresholds.

All metrics of a task at once, by name. Knows which labels each one averages, not its formula.

Every metric on resamples of the rows: what intervals and differences are made of.

Whether scores are distributed as they were when a probe was made.
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


def ratio(numerator: Values, denominator: Values) -> Values:
    """Numerator / denominator; NaN where the denominator is not positive."""
    undefined = np.full(numerator.shape, np.nan)
    return np.divide(numerator, denominator, out=undefined, where=denominator > 0)


def mean_of_defined(values: Float[Values, "label resample"]) -> Float[Values, " resample"]:
    """The mean over the labels that are not NaN; NaN where all are."""
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0).sum(axis=0), defined.sum(axis=0).astype(np.float64))


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


def rank(scores: Float[Values, " row"], targets: Bool[Flags, " row"]) -> Ranking:
    """Sorts one label's rows by falling score."""
    order = np.argsort(-scores, kind="stable")
    positives = order[targets[order]]
    steps, first = np.unique(-scores[positives], return_index=True)
    rising = -scores[order]
    return Ranking(
        order,
        positives,
        first,
        before=np.searchsorted(rising, steps, side="left"),
        through=np.searchsorted(rising, steps, side="right"),
    )


@dataclass(frozen=True)
class Curve:
    """Weighted counts at each step of a ranking, for each resample.

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


def walk(ranking: Ranking, weights: Float[Values, "row resample"]) -> Curve:
    """Walks down a ranking, passing each row as often as its weight says."""
    seen = np.zeros((len(weights) + 1, weights.shape[1]))
    np.cumsum(weights[ranking.order], axis=0, out=seen[1:])
    hits = np.add.reduceat(weights[ranking.positives], ranking.first, axis=0)  # (step, resample)
    recalled = hits.cumsum(axis=0)
    positives = hits.sum(axis=0)
    return Curve(
        hits,
        recalled,
        alarms_before=seen[ranking.before] - (recalled - hits),
        alarms=seen[ranking.through] - recalled,
        positives=positives,
        negatives=seen[-1] - positives,
    )


def auprc(curve: Curve) -> Float[Values, " resample"]:
    """Average precision: sum over steps of the rise in recall times the precision there.

    Not interpolated (as `sklearn.metrics.average_precision_score`). NaN with one class only.
    """
    passed = np.maximum(curve.recalled + curve.alarms, 1)
    total = (curve.hits * curve.recalled / passed).sum(axis=0)
    return ratio(total, np.where(curve.negatives > 0, curve.positives, 0))


def auroc(curve: Curve) -> Float[Values, " resample"]:
    """Chance that a positive row outranks a negative one, ties counted half.

    NaN with one class only.
    """
    beaten = curve.negatives - (curve.alarms_before + curve.alarms) / 2
    return ratio((curve.hits * beaten).sum(axis=0), curve.positives * curve.negatives)


def recall_at_fpr(curve: Curve, limit: float) -> Float[Values, " resample"]:
    """The highest recall at which at most `limit` of the negatives are flagged.

    NaN with one class only.
    """
    allowed = curve.alarms / np.maximum(curve.negatives, 1) <= limit
    recalled = np.where(allowed, curve.recalled, 0).max(axis=0, initial=0)
    return ratio(recalled, np.where(curve.negatives > 0, curve.positives, 0))


def checked_labels(
    task: Task, outputs: Shaped[AnyArray, "row output"], labels: Shaped[AnyArray, "..."]
) -> Int[Numbers, "..."]:
    """The labels as integers, once they and the outputs are known to fit the task.

    Args:
        task: The classes that the outputs and labels are about.
        outputs: Logits or probabilities; every number must be finite.
        labels: [row] of class numbers, or [row, label] of 0 and 1 for a multi-label task.

    Returns:
        The same labels as int64.

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
    if not np.isfinite(outputs.astype(np.float64)).all():
        bad = int(np.flatnonzero(~np.isfinite(outputs.astype(np.float64)).all(axis=1))[0])
        raise SidelightError(
            f"Row {bad} of the outputs holds NaN or infinity. Look for that text's hidden states "
            "overflowing in half precision, or for a learning rate that made training diverge."
        )
    return _integers_within(task, rows, labels)


def _integers_within(task: Task, rows: int, labels: AnyArray) -> Numbers:
    many = task.kind == "multilabel"
    shape = (rows, len(task.labels)) if many else (rows,)
    highest = 1 if many else len(task.labels) - 1
    if labels.shape != shape:
        raise SidelightError(
            f"Got labels of shape {labels.shape}, wanted {shape} for {rows} rows of a {task.kind} "
            "task. Pass the labels of exactly the rows that the outputs are for."
        )
    known = np.isin(labels, np.arange(highest + 1))
    if not known.all():
        raise SidelightError(
            f"Got labels such as {labels[~known][0]}, wanted whole numbers from 0 to {highest} for "
            f"a {task.kind} task. Map label names to their position in the task."
        )
    return labels.astype(np.int64)


@dataclass(frozen=True)
class Predictions:
    """What every metric is computed from: one column per label, whatever the task.

    Attributes:
        kind: The task's kind; decides which labels are headlined and how they are averaged.
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
        """Each label's rows, sorted once for all resamples."""
        return tuple(map(rank, self.scores.T, self.targets.T))


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
        probabilities: Each in [0, 1].
        labels: [row] of class numbers, or [row, label] of 0 and 1 for a multi-label task.
        thresholds: One for a binary task, one per label if multi-label, none if multi-class.

    Raises:
        SidelightError: As `checked_labels`; or a probability lies outside [0, 1]; or the number of
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
    return _one_column_per_label(task, probabilities, integers, thresholds)


def _one_column_per_label(
    task: Task, probabilities: Values, labels: Numbers, thresholds: tuple[float, ...]
) -> Predictions:
    if task.kind == "multilabel":
        return Predictions(task.kind, probabilities, labels == 1, probabilities >= thresholds)
    classes = np.arange(len(task.labels))
    targets = labels[:, None] == classes
    if task.kind == "multiclass":
        chosen = probabilities.argmax(axis=1)
        return Predictions(task.kind, probabilities, targets, chosen[:, None] == classes)
    flagged = probabilities >= thresholds  # (row, 1)
    scores = np.hstack([1 - probabilities, probabilities])
    return Predictions(task.kind, scores, targets, np.hstack([~flagged, flagged]))


@dataclass(frozen=True)
class Confusion:
    """Weighted counts of the four outcomes of each label's decision.

    Attributes:
        hits: Holds and was predicted.
        false_alarms: Was predicted and does not hold.
        misses: Holds and was not predicted.
        rejections: Neither.
    """

    hits: Float[Values, "label resample"]
    false_alarms: Float[Values, "label resample"]
    misses: Float[Values, "label resample"]
    rejections: Float[Values, "label resample"]

    def pooled(self) -> "Confusion":
        """The four counts summed over the labels, for micro averages."""
        return Confusion(
            self.hits.sum(axis=0, keepdims=True),
            self.false_alarms.sum(axis=0, keepdims=True),
            self.misses.sum(axis=0, keepdims=True),
            self.rejections.sum(axis=0, keepdims=True),
        )


def count(
    targets: Bool[Flags, "row label"],
    decisions: Bool[Flags, "row label"],
    weights: Float[Values, "row resample"],
) -> Confusion:
    """Counts the outcomes of each label's decisions, each row as often as its weight says."""
    hits = (targets & decisions).T.astype(np.float64) @ weights  # (label, resample)
    false_alarms = (~targets & decisions).T.astype(np.float64) @ weights
    misses = (targets & ~decisions).T.astype(np.float64) @ weights
    return Confusion(hits, false_alarms, misses, weights.sum(axis=0) - hits - false_alarms - misses)


def confusion_matrix(predictions: Predictions) -> Int[Numbers, "..."]:
    """Counts of rows by actual and predicted label, [actual, predicted].

    For a multi-label task one matrix per label, [label, actual, predicted], absent before present.
    """
    actual = predictions.targets.astype(np.int64)
    predicted = predictions.decisions.astype(np.int64)
    if predictions.kind != "multilabel":
        return actual.T @ predicted
    actual, predicted = np.stack([1 - actual, actual]), np.stack([1 - predicted, predicted])
    return np.einsum("arl,prl->lap", actual, predicted)


def precision(confusion: Confusion) -> Float[Values, "label resample"]:
    """Hits / predicted; 0 if the label holds but is never predicted, NaN if neither happens."""
    predicted = confusion.hits + confusion.false_alarms
    occurs = predicted + confusion.misses > 0
    return np.where(occurs, confusion.hits / np.maximum(predicted, 1), np.nan)


def recall(confusion: Confusion) -> Float[Values, "label resample"]:
    """Hits / rows where the label holds; NaN if it holds nowhere."""
    return ratio(confusion.hits, confusion.hits + confusion.misses)


def f1(confusion: Confusion) -> Float[Values, "label resample"]:
    """2 hits / (holds + predicted); NaN if the label neither holds nor is predicted anywhere."""
    errors = confusion.false_alarms + confusion.misses
    return ratio(2 * confusion.hits, 2 * confusion.hits + errors)


_ECE_BINS = 15


@dataclass(frozen=True)
class Confidences:
    """Stated probabilities and whether what they were stated of was so.

    Attributes:
        stated: The positive class's probability if binary, the winner's if multi-class, that of
            every label if multi-label.
        correct: Whether it was so.
        bins: Which of `count` equal-width bins of [0, 1] the stated probability falls in.
        count: Number of bins.
    """

    stated: Float[Values, "row item"]
    correct: Bool[Flags, "row item"]
    bins: Int[Numbers, "row item"]
    count: int


def state_confidences(predictions: Predictions, *, bins: int = _ECE_BINS) -> Confidences:
    """The stated probabilities of a task, binned for a reliability diagram or ECE."""
    stated = predictions.scores[:, predictions.headline]
    correct = predictions.targets[:, predictions.headline]
    if predictions.kind == "multiclass":
        winner = stated.argmax(axis=1, keepdims=True)
        stated = np.take_along_axis(stated, winner, axis=1)
        correct = np.take_along_axis(correct, winner, axis=1)
    return Confidences(stated, correct, np.minimum(stated * bins, bins - 1).astype(np.int64), bins)


def ece(
    confidences: Confidences, weights: Float[Values, "row resample"]
) -> Float[Values, " resample"]:
    """Expected calibration error: sum over bins of the share of items times the gap.

    The gap is |mean stated probability - share that was so| (Guo et al. 2017, equation 3). A
    multi-label task pools the bins over its labels. It is biased upwards: chance gaps of small bins
    add up, in a resample even more, so a bootstrap interval of a small value can lie above it.
    """
    rows, items = confidences.stated.shape
    gaps = np.zeros((rows, confidences.count))
    excess = confidences.stated - confidences.correct
    np.add.at(gaps, (np.indices(excess.shape)[0], confidences.bins), excess)
    return np.abs(gaps.T @ weights).sum(axis=0) / (weights.sum(axis=0) * items)


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


def measure(
    predictions: Predictions, weights: Float[Values, "row resample"]
) -> dict[str, Float[Values, " resample"]]:
    """Every metric of `METRICS` in every resample; NaN where it is undefined.

    `f1`, `precision`, `recall`: of the positive class (binary), macro average (multi-class) or
    micro average (multi-label). `macro_f1`: the mean over all labels, both classes if binary.
    `auprc`, `auroc`, `recall_at_1pct_fpr`: of the positive class, else the mean over labels, each
    against the rest. `accuracy`: share of rows that are right, in all labels if multi-label.
    `ece`: see `ece` and `Confidences`, 15 bins. A mean over labels leaves out those whose metric is
    undefined: a label that holds nowhere, or, for F1 and precision, is not predicted either.

    Args:
        predictions: What was predicted and what holds.
        weights: How often each resample counts each row.
    """
    confusion = count(predictions.targets, predictions.decisions, weights)
    return (
        _headline_decisions(predictions, confusion)
        | _headline_rankings(predictions, weights)
        | {
            "accuracy": _accuracy(predictions, weights),
            "macro_f1": mean_of_defined(f1(confusion)),
            "ece": ece(state_confidences(predictions), weights),
        }
    )


def _headline_decisions(predictions: Predictions, confusion: Confusion) -> dict[str, Values]:
    pooled = predictions.kind == "multilabel"
    counts = confusion.pooled() if pooled else confusion
    shown = slice(None) if pooled else predictions.headline
    return {
        "f1": mean_of_defined(f1(counts)[shown]),
        "precision": mean_of_defined(precision(counts)[shown]),
        "recall": mean_of_defined(recall(counts)[shown]),
    }


def _headline_rankings(predictions: Predictions, weights: Values) -> dict[str, Values]:
    rows: list[tuple[Values, ...]] = []
    for ranking in predictions.rankings[predictions.headline]:
        walked = walk(ranking, weights)
        rows.append((auprc(walked), auroc(walked), recall_at_fpr(walked, 0.01)))
    means = [mean_of_defined(np.array(values)) for values in zip(*rows, strict=True)]
    return dict(zip(("auprc", "auroc", "recall_at_1pct_fpr"), means, strict=True))


def _accuracy(predictions: Predictions, weights: Values) -> Values:
    right = (predictions.decisions == predictions.targets).all(axis=1)
    return right.astype(np.float64) @ weights / weights.sum(axis=0)


_BLOCK_CELLS = 2**20


def measure_resamples(
    predictions: Predictions, *, resamples: int, seed: int
) -> dict[str, Float[Values, " draw"]]:
    """Every metric: first on the rows themselves, then on each resample; NaN where undefined.

    As many rows, resamples and the same seed give the same draws, whatever was predicted.

    Args:
        predictions: What was predicted and what holds.
        resamples: Draws of all rows with replacement; 0: the rows themselves alone.
        seed: Of the resamples.
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


BINS = 10
# Added to each count, so that an empty bin is rare and not impossible.
_PRIOR = 0.5


def score_counts(scores: Sequence[float]) -> list[int]:
    """How many of the probabilities fall into each of ten equal bins of [0, 1]."""
    counts, _ = np.histogram(np.asarray(scores, dtype=float), bins=BINS, range=(0.0, 1.0))
    return counts.tolist()


def stability_index(reference: Sequence[int], observed: Sequence[int]) -> float:
    """The population stability index of two histograms, less what chance alone adds to it.

    The index is the sum of (p - q) ln(p / q) over the bins. Counts n and m of one distribution have
    about (bins - 1) (1 / n + 1 / m), which is subtracted; where less than that is left, it is 0.
    Symmetric. Below 0.1 is usually called stable, above 0.25 changed.

    Args:
        reference: Counts per bin.
        observed: Counts of the same bins.
    """
    n, m = _smoothed(reference), _smoothed(observed)
    p, q = n / n.sum(), m / m.sum()
    chance = (len(n) - 1) * (1 / n.sum() + 1 / m.sum())
    return max(0.0, float(((p - q) * np.log(p / q)).sum() - chance))


def _smoothed(counts: Sequence[int]) -> np.ndarray:
    return np.asarray(counts, dtype=float) + _PRIOR
