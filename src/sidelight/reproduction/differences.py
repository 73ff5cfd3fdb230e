"""Whether two rows of a table differ by more than chance.

A row is its mean over seeds, so that is what is compared: in each resample of the test texts the
metric is measured for every seed of both rows, averaged over the seeds of each, and subtracted.
What makes texts hard for both rows cancels out: much sharper than comparing two intervals.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sidelight.evaluation import Estimate
from sidelight.metrics import Values, decide, measure_resamples
from sidelight.reproduction.judging import JudgedRow, Scored


@dataclass(frozen=True)
class Difference:
    """How much higher a metric is for one row than for another.

    Attributes:
        estimate: The difference and its interval.
        p_value: Two-sided: twice the share of resamples in which the difference is zero or has the
            rarer sign; None where the difference is undefined.
    """

    estimate: Estimate
    p_value: float | None


def mean_draws(
    scored: Scored,
    row: JudgedRow,
    *,
    metric: str,
    resamples: int = 1000,
    seed: int = 0,
) -> Float[Values, " draw"]:
    """The mean over seeds of a metric: first on the texts themselves, then on each resample.

    Args:
        scored: The texts' labels.
        row: One of its rows.
        metric: One of ``METRICS``.
        resamples: Of the texts, with replacement; the same for every row.
        seed: Of the resamples.
    """
    decided = [
        decide(scored.task, run.probabilities, scored.labels, thresholds=run.thresholds)
        for run in row.runs
    ]
    drawn = [measure_resamples(one, resamples=resamples, seed=seed)[metric] for one in decided]
    return np.mean(drawn, 0)


def difference(ours: Float[Values, " draw"], theirs: Float[Values, " draw"]) -> Difference:
    """How much higher ours is, its 95 % interval, and the two-sided p-value.

    Args:
        ours: Of ``mean_draws``.
        theirs: Of ``mean_draws`` with the same resamples.
    """
    estimate = Estimate.of(ours - theirs)
    if estimate.low is None:
        return Difference(estimate, None)
    draws = (ours - theirs)[1:]
    draws = draws[~np.isnan(draws)]
    rarer = min((draws <= 0).sum(), (draws >= 0).sum())
    # One added to both counts: no number of resamples can show a chance of zero.
    return Difference(estimate, min(1.0, 2 * float(rarer + 1) / (len(draws) + 1)))


def difference_over_draws(
    ours: Float[Values, " draw"], theirs: Float[Values, " draw"]
) -> Difference:
    """Of few-shot draws: the mean difference, and a test that flips signs of whole draws.

    The test is exact up to 13 draws, and beyond them one of 9,999 random flips.

    Args:
        ours: The metric of each draw; NaN where it is undefined.
        theirs: Likewise, of the same draws.
    """
    from scipy.stats import permutation_test  # pyright: ignore

    defined = ~np.isnan(ours - theirs)
    ours, theirs = ours[defined], theirs[defined]
    value = _mean_difference(ours, theirs) if len(ours) else None
    if len(ours) < 2:
        return Difference(Estimate(value, None, None), None)
    found = permutation_test(
        (ours, theirs),
        _mean_difference,
        permutation_type="samples",
        n_resamples=9999,
        rng=np.random.default_rng(0),
    )
    return Difference(Estimate(value, None, None), float(found.pvalue))


def _mean_difference(ours: Float[Values, " draw"], theirs: Float[Values, " draw"]) -> float:
    return float(np.mean(ours - theirs))
