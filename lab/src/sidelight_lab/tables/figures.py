"""Whether two rows of a table differ by more than chance.

A row is its mean over seeds, so that is what is compared: in each resample of the test texts the
metric is measured for every seed of both rows, averaged over the seeds of each, and subtracted.
What makes texts hard for both rows cancels out: much sharper than comparing two intervals.

A table's numbers: each row on the test texts and on each subset of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sidelight.evaluation import Estimate, Report, evaluate
from sidelight.metrics import Values, decide, measure_resamples
from sidelight_lab.tables.judging import JudgedRow, Scored


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


SHOWN = ("auprc", "f1", "accuracy", "macro_f1", "recall_at_1pct_fpr", "ece")


@dataclass(frozen=True)
class Spread:
    """A number over seeds or draws.

    Attributes:
        mean: Over those in which it is defined.
        deviation: Sample standard deviation; 0 of a single one.
        values: One per seed; None where undefined.
    """

    mean: float | None
    deviation: float
    values: tuple[float | None, ...]

    @staticmethod
    def of(values: Sequence[float | None]) -> "Spread":
        """The spread of some values."""
        defined = [value for value in values if value is not None]
        if not defined:
            return Spread(None, 0.0, tuple(values))
        deviation = float(np.std(defined, ddof=1)) if len(defined) > 1 else 0.0
        return Spread(float(np.mean(defined)), deviation, tuple(values))


@dataclass(frozen=True)
class RowFigures:
    """A row of the table.

    Attributes:
        row: What was measured.
        reports: One per seed; the chosen seed's has bootstrap intervals, but for few-shot draws.
        difference: How much higher ours is in the table's metric; None for ours itself.
    """

    row: JudgedRow
    reports: tuple[Report, ...]
    difference: Difference | None

    @property
    def chosen(self) -> Report:
        """Of the seed with the best validation score."""
        return self.reports[self.row.chosen]

    @property
    def parameters(self) -> int:
        """Of the chosen seed."""
        return self.row.runs[self.row.chosen].parameters

    @property
    def validation(self) -> Spread:
        """What early stopping maximised, on validation texts."""
        return Spread.of([run.score for run in self.row.runs])

    @property
    def seconds(self) -> Spread:
        """That fitting took."""
        return Spread.of([run.seconds for run in self.row.runs])

    def spread(self, metric: str) -> Spread:
        """A metric over seeds."""
        return Spread.of([report.metrics[metric].value for report in self.reports])

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON-ready values."""
        metrics = {
            name: {"mean": one.mean, "sd": one.deviation, "values": list(one.values)}
            for name in self.chosen.metrics
            for one in [self.spread(name)]
        }
        return {
            "name": self.row.name,
            "title": self.row.title,
            "single_pass": self.row.is_single_pass,
            "parameters": self.parameters,
            "seeds": [run.seed for run in self.row.runs],
            "validation": {"mean": self.validation.mean, "values": list(self.validation.values)},
            "seconds": list(self.seconds.values),
            "metrics": metrics,
            "chosen": {"seed": self.row.runs[self.row.chosen].seed, **self.chosen.to_dict()},
            "ours_minus_this": None
            if self.difference is None
            else {**self.difference.estimate.to_dict(), "p": self.difference.p_value},
        }


@dataclass(frozen=True)
class TableFigures:
    """One table: all rows on some texts.

    Attributes:
        title: Which texts.
        texts: How many.
        metric: What rows are compared by.
        ours: Name of the row that they are compared with.
        rows: In the recipe's order.
    """

    title: str
    texts: int
    metric: str
    ours: str
    rows: tuple[RowFigures, ...]


def measure_rows(
    scored: Scored, *, title: str, metric: str, ours: str, are_draws: bool
) -> TableFigures:
    """Measures all rows on the same texts.

    Args:
        scored: The rows and the labels.
        title: Of the table.
        metric: What rows are compared by.
        ours: The row to compare with; where there is none of this name, nothing is compared.
        are_draws: Whether runs are few-shot draws, whose training texts differ: the spread over
            draws says what an interval of one draw would not.
    """
    reports = [_reports(scored, row, bootstrap=0 if are_draws else 1000) for row in scored.rows]
    draws = 1 + max(run.seed for row in scored.rows for run in row.runs)
    samples = {
        row.name: _by_draw(row, own, metric, draws=draws)
        if are_draws
        else mean_draws(scored, row, metric=metric)
        for row, own in zip(scored.rows, reports, strict=True)
    }
    compare = difference_over_draws if are_draws else difference

    def against_ours(name: str) -> Difference | None:
        if ours not in samples or name == ours:
            return None
        return compare(samples[ours], samples[name])

    rows = tuple(
        RowFigures(row, own, against_ours(row.name))
        for row, own in zip(scored.rows, reports, strict=True)
    )
    return TableFigures(title, len(scored.labels), metric, ours, rows)


def _reports(scored: Scored, row: JudgedRow, *, bootstrap: int) -> tuple[Report, ...]:
    """One per seed; only the chosen one's has intervals."""
    return tuple(
        evaluate(
            scored.task,
            run.probabilities,
            scored.labels,
            thresholds=run.thresholds,
            bootstrap=bootstrap if place == row.chosen else 0,
        )
        for place, run in enumerate(row.runs)
    )


def _by_draw(row: JudgedRow, reports: Sequence[Report], metric: str, *, draws: int) -> np.ndarray:
    """The metric of each draw; NaN for one that the row lacks, as a slow row does."""
    values = np.full(draws, np.nan)
    for run, report in zip(row.runs, reports, strict=True):
        value = report.metrics[metric].value
        values[run.seed] = np.nan if value is None else value
    return values
