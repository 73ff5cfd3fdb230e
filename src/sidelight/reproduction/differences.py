"""Whether two rows of a table differ by more than chance.

A row is its mean over seeds, so that is what is compared: in each resample of the test texts the
metric is measured for every seed of both rows, averaged over the seeds of each, and subtracted. A
row of one seed against another of one seed is ``evaluation.paired_bootstrap``.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from sidelight.evaluation import Difference, Estimate
from sidelight.metrics import Values, decide, measure
from sidelight.reproduction.judging import JudgedRow, Scored

_BLOCK_CELLS = 2**20


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
    return np.concatenate(
        [
            np.mean([measure(one, weights)[metric] for one in decided], 0)
            for weights in _weights(len(scored.labels), resamples=resamples, seed=seed)
        ]
    )


def difference(ours: Float[Values, " draw"], theirs: Float[Values, " draw"]) -> Difference:
    """How much higher ours is, its 95 % interval, and the two-sided p-value.

    Args:
        ours: Of ``mean_draws``.
        theirs: Of ``mean_draws`` with the same resamples.
    """
    value, draws = float(ours[0] - theirs[0]), (ours - theirs)[1:]
    draws = draws[~np.isnan(draws)]
    if np.isnan(value) or len(draws) == 0:
        return Difference(Estimate(None, None, None), None)
    low, high = np.percentile(draws, [2.5, 97.5])
    rarer = min((draws <= 0).sum(), (draws >= 0).sum())
    # One added to both counts: no number of resamples can show a chance of zero.
    p_value = min(1.0, 2 * float(rarer + 1) / (len(draws) + 1))
    return Difference(Estimate(value, float(low), float(high)), p_value)


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


def _weights(rows: int, *, resamples: int, seed: int) -> Iterator[Float[Values, "row resample"]]:
    """Every text once; then how often each resample took each text, in blocks of columns."""
    yield np.ones((rows, 1))
    random = np.random.default_rng(seed)
    block = max(1, _BLOCK_CELLS // rows)
    for start in range(0, resamples, block):
        width = min(block, resamples - start)
        drawn = random.integers(rows, size=(width, rows))
        yield np.stack([np.bincount(one, minlength=rows) for one in drawn], 1).astype(np.float64)
