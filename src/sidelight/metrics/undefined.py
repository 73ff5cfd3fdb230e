"""Ratios and means where undefined is NaN. Knows numbers, not the metrics that they stand for."""

import numpy as np
from jaxtyping import Float

from sidelight.metrics.arrays import Values


def ratio(numerator: Values, denominator: Values) -> Values:
    """Numerator / denominator; NaN where the denominator is not positive."""
    undefined = np.full(numerator.shape, np.nan)
    return np.divide(numerator, denominator, out=undefined, where=denominator > 0)


def mean_of_defined(values: Float[Values, "label resample"]) -> Float[Values, " resample"]:
    """The mean over the labels that are not NaN; NaN where all are."""
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0).sum(axis=0), defined.sum(axis=0).astype(np.float64))
