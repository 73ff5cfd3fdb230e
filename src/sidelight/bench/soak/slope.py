"""How fast memory grows: a line through samples that jump rather than scatter."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import theilslopes

from sidelight.bench.soak.sampling import Sample

_BLOCKS = 20
_PER = 1000


@dataclass(frozen=True)
class Slope:
    """MB per 1,000 requests, with a 95 % interval."""

    value: float
    low: float
    high: float


def memory_slope(samples: Sequence[Sample], *, warm_up: int) -> Slope:
    """Theil and Sen's slope through the medians of twenty neighbouring blocks of samples.

    Neighbouring samples are alike, so an interval over all of them would be too narrow; and a
    median is not moved by a passing peak.

    Args:
        samples: At least twenty after the warm-up.
        warm_up: Samples of the first so many visits are left out.
    """
    kept = [sample for sample in samples if sample.visits > warm_up]
    blocks = [kept[part[0] : part[-1] + 1] for part in np.array_split(range(len(kept)), _BLOCKS)]
    visits = [np.median([sample.visits for sample in block]) for block in blocks]
    memory = [np.median([sample.resident_mb for sample in block]) for block in blocks]
    # scipy leaves the type of the outcome open.
    found: Any = theilslopes(memory, visits, alpha=0.95)
    return Slope(*(float(x) * _PER for x in (found.slope, found.low_slope, found.high_slope)))
