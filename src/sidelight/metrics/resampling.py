"""Every metric on resamples of the rows: what intervals and differences are made of."""

from collections.abc import Iterator
from itertools import chain

import numpy as np
from jaxtyping import Float

from sidelight.metrics.arrays import Values
from sidelight.metrics.measurement import METRICS, measure
from sidelight.metrics.predictions import Predictions

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
