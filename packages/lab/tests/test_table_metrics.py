"""The figures of a table against plain computations, and how they are written."""

import re

import numpy as np
import pytest

from sidelight.data.evaluation import Estimate
from sidelight.statistics.metrics import METRICS
from sidelight_lab.tables.metrics import (
    Difference,
    difference,
    difference_over_draws,
    mean_draws,
)
from sidelight_lab.tables.recipes import ProbeRow
from sidelight_lab.tables.runs import ScoredRun
from sidelight_lab.tables.writing import latex_table, markdown_table
from worlds.data import TASKS


def scored_row(seed: int, runs: int, labels: np.ndarray, strength: float) -> list[ScoredRun]:
    random, row = np.random.default_rng(seed), ProbeRow("row", "readout")
    scored = []
    for run in range(runs):
        logits = strength * (labels - 0.5) + random.normal(size=len(labels))
        chances = 1 / (1 + np.exp(-logits))
        scored.append(ScoredRun(row, run, 0.5, chances[:, None], (0.5,), 1.0, 1))
    return scored


def drawn(
    metric: str, *rows: list[ScoredRun], labels: np.ndarray, resamples: int
) -> list[np.ndarray]:
    options = {"metric": metric, "resamples": resamples}
    return [mean_draws(TASKS["binary"], runs, labels, **options) for runs in rows]


def test_difference_matches_a_plain_bootstrap():
    labels = np.random.default_rng(0).integers(0, 2, 150)
    ours = scored_row(1, 1, labels, 2.0)
    theirs = scored_row(2, 1, labels, 1.4)
    found = difference(*drawn("f1", ours, theirs, labels=labels, resamples=4000))

    texts = np.random.default_rng(7).integers(150, size=(4000, 150))
    texts = np.vstack([np.arange(150), texts])

    def f1(runs: list[ScoredRun]) -> np.ndarray:
        flagged = (runs[0].probabilities[:, 0] >= 0.5).astype(int)
        both = (flagged * labels)[texts].sum(1)
        return 2 * both / (flagged + labels)[texts].sum(1)

    value, *draws = f1(ours) - f1(theirs)
    low, high = np.percentile(draws, [2.5, 97.5])
    assert found.estimate.value == pytest.approx(value)
    # Two independent sets of 4,000 resamples: an end of an interval varies by about .003.
    assert found.estimate.low == pytest.approx(low, abs=0.015)
    assert found.estimate.high == pytest.approx(high, abs=0.015)
    assert found.p_value == pytest.approx(2 * np.mean(np.array(draws) <= 0), abs=0.02)
    swapped = difference(*drawn("f1", theirs, ours, labels=labels, resamples=4000))
    assert swapped.estimate.value == -found.estimate.value
    assert swapped.p_value == found.p_value


@pytest.mark.parametrize("metric", METRICS)
def test_row_does_not_differ_from_itself(metric: str):
    labels = np.random.default_rng(0).integers(0, 2, 150)
    row = scored_row(1, 2, labels, 2.0)
    same = difference(*drawn(metric, row, row, labels=labels, resamples=50))
    assert same == Difference(Estimate(0.0, 0.0, 0.0), 1.0)


def test_difference_over_draws_counts_sign_flips_and_ignores_undefined_draws():
    ours, theirs = np.array([0.5, 0.6, 0.7, 0.8]), np.array([0.4, 0.4, 0.4, 0.4])
    found = difference_over_draws(ours, theirs)
    assert found.estimate.value == pytest.approx(0.25)
    # Of the 16 ways to flip four positive differences, two are as far from zero.
    assert found.p_value == pytest.approx(2 / 16)
    ours[1] = np.nan
    defined = [0, 2, 3]
    assert difference_over_draws(ours, theirs) == difference_over_draws(
        ours[defined], theirs[defined]
    )
    undefined = difference_over_draws(np.full(4, np.nan), theirs)
    assert undefined == Difference(Estimate(None, None, None), None)


def test_tables_escape_special_characters_in_names():
    table = "50 % of {a}", ("row", "x"), (("a|b $x_1^2~\\", "1"),)
    markdown, latex = (
        re.sub(" +", " ", render(*table)) for render in (markdown_table, latex_table)
    )
    assert r"| a\|b $x_1^2~\ | 1 |" in markdown
    assert r"a|b \$x\_1\^{}2\textasciitilde{}\textbackslash{} & 1 \\" in latex
