"""Agreement of one annotator with another, where one label may be rare."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from sidelight.statistics.metrics import wilson


@dataclass(frozen=True)
class Agreement:
    """Balanced agreement of an annotator with a reference: the mean over both labels.

    An annotator that always gives the same label scores 0.5, however rare the other label is.

    Attributes:
        texts: Number of texts that both have labelled.
        positives: Number of texts that are positive by the reference.
        value: Mean of the shares of the reference's positives and negatives on which the annotator
            agrees; None if the reference has only one label.
        low: Lower end of the 95 % interval; None if ``value`` is None.
        high: Upper end of the interval.
    """

    texts: int
    positives: int
    value: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.value is None or self.low is None or self.high is None:
            return f"unknown: {self.positives} of {self.texts} texts are positive"
        return f"{self.value:.2f} (95 % interval {self.low:.2f} to {self.high:.2f})"


def measure_agreement(
    reference: Sequence[bool], annotator: Sequence[bool], weights: Sequence[float]
) -> Agreement:
    """The agreement on a sample.

    The interval combines Wilson's intervals of both shares (Zou and Donner 2008), each at the
    effective sample size under the weights (Kish 1965).

    Args:
        reference: Whether each text is positive.
        annotator: Whether each text is positive by the annotator.
        weights: Number of texts that each text represents: the inverse of its sampling probability.
    """
    truth, output = np.asarray(reference, dtype=bool), np.asarray(annotator, dtype=bool)
    counts = np.asarray(weights, dtype=np.float64)
    positives = int(truth.sum())
    if not 0 < positives < len(truth):
        return Agreement(len(truth), positives, None, None, None)
    shares = np.empty(2)
    bounds = np.empty((2, 2))
    for label in (0, 1):
        rows = truth == bool(label)
        shares[label], size = _weighted(output[rows] == bool(label), counts[rows])
        bounds[:, label] = wilson(shares[label : label + 1], np.array([size]))[:, 0]
    value = float(shares.mean())
    below, above = (math.hypot(*(shares - each)) / 2 for each in bounds)
    low, high = max(0.0, value - below), min(1.0, value + above)
    return Agreement(len(truth), positives, value, low, high)


def _weighted(
    agrees: Bool[np.ndarray, " text"], weights: Float[np.ndarray, " text"]
) -> tuple[float, float]:
    """The weighted share, and the effective sample size."""
    share = float(weights @ agrees / weights.sum())
    return share, float(weights.sum() ** 2 / (weights @ weights))
