"""Whether scores are distributed as they were when a probe was made."""

from collections.abc import Sequence

import numpy as np

BINS = 10
# Added to each count, so that an empty bin is rare and not impossible.
_PRIOR = 0.5


def score_counts(scores: Sequence[float]) -> list[int]:
    """How many of the probabilities fall into each of ten equal bins of [0, 1]."""
    counts, _ = np.histogram(np.asarray(scores, dtype=float), bins=BINS, range=(0.0, 1.0))
    return counts.tolist()


def stability_index(reference: Sequence[int], observed: Sequence[int]) -> float:
    """The population stability index of two histograms: sum of (p - q) ln(p / q) over the bins.

    Symmetric, and 0 for equal shares. Below 0.1 is usually called stable, above 0.25 changed.

    Args:
        reference: Counts per bin.
        observed: Counts of the same bins.
    """
    p, q = _shares(reference), _shares(observed)
    return float(((p - q) * np.log(p / q)).sum())


def _shares(counts: Sequence[int]) -> np.ndarray:
    smoothed = np.asarray(counts, dtype=float) + _PRIOR
    return smoothed / smoothed.sum()
