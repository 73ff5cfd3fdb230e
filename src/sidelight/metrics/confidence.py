"""Whether probabilities mean what they say. Knows stated probabilities, not thresholds."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from sidelight.metrics.arrays import Flags, Numbers, Values
from sidelight.metrics.predictions import Predictions

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
