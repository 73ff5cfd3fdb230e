"""The numbers of a table: each row on some test texts, and whether two rows differ by chance.

A row is its mean over seeds, so that is what is compared: in each resample of the test texts the
metric is measured for every seed of both rows, averaged over the seeds of each, and subtracted.
What makes texts hard for both rows cancels out, which is much sharper than comparing two intervals.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sidelight.evaluation import Estimate, Report, evaluate
from sidelight.metrics import decide, measure_resamples
from sidelight.types import Values
from sidelight_lab.tables.runs import JudgedRow, JudgedTable


@dataclass(frozen=True)
class Difference:
    """How much higher a metric is for one row than for another."""

    estimate: Estimate
    p_value: float | None  # two-sided; None where the difference is undefined


def mean_draws(
    judged: JudgedTable, row: JudgedRow, *, metric: str, resamples: int = 1000
) -> Float[Values, " draw"]:
    """The mean over seeds of a metric: first on the texts themselves, then on each resample.

    The texts are resampled with replacement, in the same way for every row.
    """
    decided = [
        decide(judged.task, run.probabilities, judged.labels, thresholds=run.thresholds)
        for run in row.runs
    ]
    drawn = [measure_resamples(one, resamples=resamples, seed=0)[metric] for one in decided]
    return np.mean(drawn, 0)


def difference(ours: Float[Values, " draw"], theirs: Float[Values, " draw"]) -> Difference:
    """How much higher ours is, its 95 % interval, and the two-sided p-value.

    The p-value is twice the share of resamples in which the difference is zero or has the rarer
    sign. Both rows must come from ``mean_draws`` with the same resamples.
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
    """The mean difference over few-shot draws, and a test that flips signs of whole draws.

    The test is exact up to 13 draws; beyond them it draws 9,999 random flips. A draw in which the
    metric of a row is undefined (NaN) is left out.
    """
    from scipy.stats import permutation_test  # pyright: ignore

    def mean_difference(ours: Float[Values, " draw"], theirs: Float[Values, " draw"]) -> float:
        return float(np.mean(ours - theirs))

    defined = ~np.isnan(ours - theirs)
    ours, theirs = ours[defined], theirs[defined]
    value = mean_difference(ours, theirs) if len(ours) else None
    if len(ours) < 2:
        return Difference(Estimate(value, None, None), None)
    found = permutation_test(
        (ours, theirs),
        mean_difference,
        permutation_type="samples",
        n_resamples=9999,
        rng=np.random.default_rng(0),
    )
    return Difference(Estimate(value, None, None), float(found.pvalue))


@dataclass(frozen=True)
class Spread:
    """A number over the seeds or draws in which it is defined."""

    mean: float | None
    deviation: float  # of the sample; 0 for a single value
    values: tuple[float | None, ...]

    @staticmethod
    def of(values: Sequence[float | None]) -> "Spread":
        defined = [value for value in values if value is not None]
        if not defined:
            return Spread(None, 0.0, tuple(values))
        deviation = float(np.std(defined, ddof=1)) if len(defined) > 1 else 0.0
        return Spread(float(np.mean(defined)), deviation, tuple(values))


@dataclass(frozen=True)
class RowFigures:
    """A row of the table.

    Attributes:
        reports: One per seed; the chosen seed's has bootstrap intervals, except for few-shot draws.
        difference: How much higher ours is in the table's metric; None for ours itself.
    """

    row: JudgedRow
    reports: tuple[Report, ...]
    difference: Difference | None

    @property
    def chosen(self) -> Report:
        """The report of the seed with the best validation score."""
        return self.reports[self.row.chosen]

    @property
    def parameters(self) -> int:
        return self.row.runs[self.row.chosen].parameters

    @property
    def validation(self) -> Spread:
        """``validation_score`` over seeds."""
        return Spread.of([run.score for run in self.row.runs])

    def spread(self, metric: str) -> Spread:
        return Spread.of([report.metrics[metric].value for report in self.reports])

    def to_dict(self) -> dict[str, Any]:
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
            "seconds": [run.seconds for run in self.row.runs],
            "metrics": metrics,
            "chosen": {"seed": self.row.runs[self.row.chosen].seed, **self.chosen.to_dict()},
            "ours_minus_this": None
            if self.difference is None
            else {**self.difference.estimate.to_dict(), "p": self.difference.p_value},
        }


@dataclass(frozen=True)
class TableFigures:
    """All rows on some texts, compared by one metric."""

    title: str
    texts: int
    metric: str
    ours: str  # the row that the others are compared with; "" if there is none
    rows: tuple[RowFigures, ...]


def measure_rows(
    judged: JudgedTable, *, title: str, metric: str, ours: str, are_draws: bool
) -> TableFigures:
    """Measures all rows on the same texts; nothing is compared if there is no row of ours.

    Few-shot draws differ in their training texts, so they have a spread over draws instead of an
    interval.
    """
    reports = {row.name: _report_runs(judged, row, are_draws=are_draws) for row in judged.rows}
    draws = 1 + max(run.seed for row in judged.rows for run in row.runs)
    samples = {
        row.name: _by_draw(row, reports[row.name], metric, draws=draws)
        if are_draws
        else mean_draws(judged, row, metric=metric)
        for row in judged.rows
    }
    compare = difference_over_draws if are_draws else difference
    others = {*samples} - {ours} if ours in samples else set[str]()
    differences = {name: compare(samples[ours], samples[name]) for name in others}
    rows = [RowFigures(row, reports[row.name], differences.get(row.name)) for row in judged.rows]
    return TableFigures(title, len(judged.labels), metric, ours, tuple(rows))


def _report_runs(judged: JudgedTable, row: JudgedRow, *, are_draws: bool) -> tuple[Report, ...]:
    return tuple(
        evaluate(
            judged.task,
            run.probabilities,
            judged.labels,
            thresholds=run.thresholds,
            bootstrap=1000 if place == row.chosen and not are_draws else 0,
        )
        for place, run in enumerate(row.runs)
    )


def _by_draw(
    row: JudgedRow, reports: Sequence[Report], metric: str, *, draws: int
) -> Float[Values, " draw"]:
    """The metric of each draw; NaN for a draw that the row lacks, as slow rows do."""
    values = np.full(draws, np.nan)
    for run, report in zip(row.runs, reports, strict=True):
        value = report.metrics[metric].value
        values[run.seed] = np.nan if value is None else value
    return values
