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
