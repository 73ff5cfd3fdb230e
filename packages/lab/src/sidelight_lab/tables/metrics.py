"""The metrics of a table: each row on some test texts, and the significance of differences.

Rows are compared by their means over seeds: in each resample of the test texts, the metric is
measured for every seed of both rows, averaged over the seeds of each, and subtracted. Difficulty
that both rows share cancels out, which is much more precise than comparing two intervals.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sidelight.data.evaluation import Estimate, Report, evaluate
from sidelight.statistics.metrics import decide, measure_resamples
from sidelight.types import Task, Values
from sidelight_lab.tables.recipes import Row
from sidelight_lab.tables.runs import ScoredRun


@dataclass(frozen=True)
class Difference:
    """The difference of a metric between two rows."""

    estimate: Estimate
    p_value: float | None  # two-sided; None where the difference is undefined


def mean_draws(
    task: Task,
    runs: Sequence[ScoredRun],
    labels: np.ndarray,
    *,
    texts: Int[np.ndarray, " part"] | slice = slice(None),
    metric: str,
    resamples: int = 1000,
) -> Float[Values, " draw"]:
    """The mean over seeds of a metric: first on some texts themselves, then on each resample.

    The texts are resampled with replacement, in the same way for every row.
    """
    drawn = [
        measure_resamples(
            decide(task, run.probabilities[texts], labels[texts], thresholds=run.thresholds),
            resamples=resamples,
            seed=0,
        )[metric]
        for run in runs
    ]
    return np.mean(drawn, 0)


def difference(ours: Float[Values, " draw"], theirs: Float[Values, " draw"]) -> Difference:
    """The advantage of ours, its 95 % interval, and the two-sided p-value.

    The p-value is twice the share of resamples in which the difference is zero or has the rarer
    sign. Both rows must come from ``mean_draws`` with the same resamples.
    """
    estimate = Estimate.of(ours - theirs)
    if estimate.low is None:
        return Difference(estimate, None)
    draws = (ours - theirs)[1:]
    draws = draws[~np.isnan(draws)]
    rarer = min((draws <= 0).sum(), (draws >= 0).sum())
    # One is added to both counts, because no number of resamples can show a probability of zero.
    return Difference(estimate, min(1.0, 2 * float(rarer + 1) / (len(draws) + 1)))


def difference_over_draws(
    ours: Float[Values, " draw"], theirs: Float[Values, " draw"]
) -> Difference:
    """The mean difference over few-shot draws, and a test that flips signs of whole draws.

    The test is exact up to 13 draws; beyond them it draws 9,999 random flips. A draw in which the
    metric of a row is undefined (NaN) is left out.
    """
    from scipy.stats import permutation_test  # pyright: ignore

    def mean(gains: Float[Values, " draw"]) -> float:
        return float(np.mean(gains))

    gains = ours - theirs
    gains = gains[~np.isnan(gains)]
    estimate = Estimate(mean(gains) if len(gains) else None, None, None)
    if len(gains) < 2:
        return Difference(estimate, None)
    found = permutation_test(
        (gains,),
        mean,
        permutation_type="samples",
        n_resamples=9999,
        rng=np.random.default_rng(0),
    )
    return Difference(estimate, float(found.pvalue))


@dataclass(frozen=True)
class Spread:
    """The mean and spread of a number over the seeds or draws in which it is defined."""

    mean: float | None
    sd: float  # of the sample; 0 for a single value
    values: tuple[float | None, ...]

    @staticmethod
    def of(values: Sequence[float | None]) -> "Spread":
        defined = [value for value in values if value is not None]
        deviation = float(np.std(defined, ddof=1)) if len(defined) > 1 else 0.0
        return Spread(float(np.mean(defined)) if defined else None, deviation, tuple(values))

    def __str__(self) -> str:
        if self.mean is None:
            return "-"
        deviation = f" ± {self.sd:.3f}" if len(self.values) > 1 else ""
        return f"{self.mean:.3f}{deviation}"


@dataclass(frozen=True)
class RowMetrics:
    """A row of the table.

    Attributes:
        runs: One for each seed.
        reports: Likewise; the chosen seed's has bootstrap intervals, except for few-shot draws.
        difference: How much higher ours is in the table's metric; None for ours itself.
    """

    runs: tuple[ScoredRun, ...]
    reports: tuple[Report, ...]
    difference: Difference | None

    @property
    def row(self) -> Row:
        return self.runs[0].row

    @property
    def chosen(self) -> int:
        return chosen_run(self.runs)

    @cached_property
    def metrics(self) -> dict[str, Spread]:
        names = self.reports[0].metrics
        return {name: Spread.of([r.metrics[name].value for r in self.reports]) for name in names}

    @property
    def validation(self) -> Spread:
        """``validation_score`` over seeds."""
        return Spread.of([run.score for run in self.runs])

    def to_dict(self) -> dict[str, Any]:
        chosen, compared = self.chosen, self.difference
        return {
            "name": self.row.name,
            "title": self.row.title,
            "single_pass": self.row.is_single_pass,
            "parameters": self.runs[chosen].parameters,
            "seeds": [run.seed for run in self.runs],
            "validation": asdict(self.validation),
            "seconds": [run.seconds for run in self.runs],
            "metrics": {name: asdict(spread) for name, spread in self.metrics.items()},
            "chosen": {"seed": self.runs[chosen].seed, **self.reports[chosen].to_dict()},
            "ours_minus_this": compared and {**compared.estimate.to_dict(), "p": compared.p_value},
        }


@dataclass(frozen=True)
class TableMetrics:
    """All rows on some texts, compared by one metric."""

    title: str
    texts: int
    metric: str
    ours: str  # the row that the others are compared with; "" if there is none
    rows: tuple[RowMetrics, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "rows": [row.to_dict() for row in self.rows]}


def measure_rows(
    task: Task,
    scored: Mapping[str, Sequence[ScoredRun]],
    labels: np.ndarray,
    texts: Int[np.ndarray, " part"],
    *,
    title: str,
    metric: str,
    ours: str,
    are_draws: bool,
) -> TableMetrics:
    """Measure all rows on the same texts; nothing is compared if there is no row of ours.

    Few-shot draws differ in their training texts, so they have a spread over draws instead of an
    interval.
    """
    draws = 1 + max(run.seed for runs in scored.values() for run in runs)
    rows: dict[str, RowMetrics] = {}
    samples: dict[str, Float[Values, " draw"]] = {}
    for name, runs in scored.items():
        reports = [
            evaluate(
                decide(task, run.probabilities[texts], labels[texts], thresholds=run.thresholds),
                bootstrap=1000 if place == chosen_run(runs) and not are_draws else 0,
            )
            for place, run in enumerate(runs)
        ]
        rows[name] = RowMetrics(tuple(runs), tuple(reports), None)
        if are_draws:
            # NaN for a draw that the row lacks, as slow rows do.
            samples[name] = np.full(draws, np.nan)
            values = rows[name].metrics[metric].values
            samples[name][[run.seed for run in runs]] = np.array(values, dtype=float)
        else:
            samples[name] = mean_draws(task, runs, labels, texts=texts, metric=metric)
    compare = difference_over_draws if are_draws else difference
    for name in {*rows} - {ours} if ours in rows else ():
        compared = compare(samples[ours], samples[name])
        rows[name] = replace(rows[name], difference=compared)
    return TableMetrics(title, len(texts), metric, ours, tuple(rows.values()))


def chosen_run(runs: Sequence[ScoredRun]) -> int:
    """The run with the best validation score; of equal runs, the first."""
    return int(np.argmax([run.score for run in runs]))


def preferred_row(scored: Mapping[str, Sequence[ScoredRun]], names: Collection[str]) -> str:
    """The row with the best mean validation score among these; "" if there is none."""
    means = {
        name: float(np.mean([run.score for run in runs]))
        for name, runs in scored.items()
        if name in names
    }
    return max(means, key=means.__getitem__, default="")
