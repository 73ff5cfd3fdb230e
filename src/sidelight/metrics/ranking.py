"""Metrics of the order of scores, over all thresholds. Knows one label's scores, not decisions."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from sidelight.metrics.arrays import Flags, Numbers, Values
from sidelight.metrics.undefined import ratio


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
