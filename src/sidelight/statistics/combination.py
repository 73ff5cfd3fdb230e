"""The probabilities of a probe and of a judge, combined by a weighted sum of their log-odds."""

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Float

from sidelight.types import Flags, Values

# Probabilities of a judge closer to 0 or 1 than this are clipped: log-odds of 11.5.
_SUREST = 1e-5
# Strength of the prior that keeps the coefficients at one half each and the shift at 0.
_PENALTY = 1.0
_EQUAL = 0.5


def log_odds(probability: Float[Values, "*rows"]) -> Float[Values, "*rows"]:
    """The log-odds of probabilities, clipped near 0 and 1."""
    within = np.clip(probability, _SUREST, 1 - _SUREST)
    return np.log(within / (1 - within))


def combined_log_odds(
    weight: float, probe: Float[Values, "*rows"], judge: Float[Values, "*rows"]
) -> Float[Values, "*rows"]:
    """``weight * logit(probe) + (1 - weight) * logit(judge)``."""
    return weight * log_odds(probe) + (1 - weight) * log_odds(judge)


@dataclass(frozen=True)
class Combination:
    """A logistic regression on the log-odds of a probe and of a judge.

    Attributes:
        weight: Weight of the probe, from 0 to 1; the judge has the remainder.
        scale: Factor of the weighted sum.
        shift: Term added after scaling.
    """

    weight: float
    scale: float
    shift: float

    def apply(
        self, probe: Float[Values, " row"], judge: Float[Values, " row"]
    ) -> Float[Values, " row"]:
        """The combined probabilities."""
        logits = self.scale * combined_log_odds(self.weight, probe, judge) + self.shift
        return 1 / (1 + np.exp(-logits))

    def threshold(self, probability: float) -> float:
        """The combined log-odds at which the combined probability has this value."""
        logit = float(log_odds(np.array(probability)))
        return (logit - self.shift) / self.scale


def fit_combination(
    probe: Float[Values, " row"], judge: Float[Values, " row"], holds: Bool[Flags, " row"]
) -> Combination:
    """Fit by log loss. Neither coefficient is negative, and with few rows they stay nearly equal.

    Args:
        probe: The probe's calibrated probabilities.
        judge: The judge's probabilities.
        holds: Whether the label holds.
    """
    # Imported here, because serving applies combinations but never fits them.
    from scipy.optimize import minimize  # pyright: ignore

    inputs = np.stack([log_odds(probe), log_odds(judge)], axis=1)
    targets = holds.astype(np.float64)

    def loss_and_slope(parameters: Values) -> tuple[float, Values]:
        coefficients, shift = parameters[:2], parameters[2]
        logits = inputs @ coefficients + shift
        away = coefficients - _EQUAL
        loss = np.logaddexp(0, logits).sum() - targets @ logits
        loss += _PENALTY / 2 * (away @ away + shift**2)
        excess = 1 / (1 + np.exp(-logits)) - targets
        slope = np.append(inputs.T @ excess + _PENALTY * away, excess.sum() + _PENALTY * shift)
        return float(loss), slope

    start = np.array([_EQUAL, _EQUAL, 0.0])
    bounds = [(0.0, None), (0.0, None), (None, None)]
    fit = partial(cast(Any, minimize), loss_and_slope, jac=True, method="L-BFGS-B", bounds=bounds)
    probe_slope, answer_slope, shift = fit(start).x.tolist()
    scale = probe_slope + answer_slope
    if scale <= 0:
        # Neither is informative, or both are inverted, so the probe decides as before.
        return Combination(1.0, 1.0, 0.0)
    return Combination(probe_slope / scale, scale, shift)
