"""The figures of a table against plain computations, and how they are written."""

import re
from dataclasses import replace

import numpy as np
import pytest

from corpora import TASKS
from sidelight.evaluation import Estimate, evaluate
from sidelight.metrics import METRICS
from sidelight_lab.tables.figures import (
    Difference,
    difference,
    difference_over_draws,
    mean_draws,
    measure_rows,
)
from sidelight_lab.tables.runs import JudgedRow, JudgedRun, JudgedTable
from sidelight_lab.tables.writing import Grid


def judged_row(name: str, seed: int, runs: int, labels: np.ndarray, strength: float) -> JudgedRow:
    random = np.random.default_rng(seed)
    made = []
    for run in range(runs):
        logits = strength * (labels - 0.5) + random.normal(size=len(labels))
        chances = 1 / (1 + np.exp(-logits))
        made.append(JudgedRun(run, 0.5, chances[:, None], (0.5,), 1.0, 1))
    return JudgedRow(name, name, True, tuple(made))


def drawn(metric: str, *rows: JudgedRow, labels: np.ndarray, resamples: int) -> list[np.ndarray]:
    judged = JudgedTable(TASKS["binary"], labels, rows)
    return [mean_draws(judged, row, metric=metric, resamples=resamples) for row in rows]


def test_a_difference_is_that_of_a_plain_bootstrap():
    labels = np.random.default_rng(0).integers(0, 2, 150)
    ours = judged_row("ours", 1, 1, labels, 2.0)
    theirs = judged_row("theirs", 2, 1, labels, 1.4)
    found = difference(*drawn("f1", ours, theirs, labels=labels, resamples=4000))

    texts = np.random.default_rng(7).integers(150, size=(4000, 150))
    texts = np.vstack([np.arange(150), texts])

    def f1(row: JudgedRow) -> np.ndarray:
        flagged = (row.runs[0].probabilities[:, 0] >= 0.5).astype(int)
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
def test_a_row_does_not_differ_from_itself(metric: str):
    labels = np.random.default_rng(0).integers(0, 2, 150)
    row = judged_row("row", 1, 2, labels, 2.0)
    same = difference(*drawn(metric, row, row, labels=labels, resamples=50))
    assert same == Difference(Estimate(0.0, 0.0, 0.0), 1.0)


# The interval of an accuracy is Wilson's in a report.
@pytest.mark.slow
@pytest.mark.parametrize("metric", sorted(set(METRICS) - {"accuracy"}))
def test_reports_and_differences_see_the_same_resamples(metric: str):
    labels = np.random.default_rng(0).integers(0, 2, 150)
    row = judged_row("row", 1, 1, labels, 2.0)
    (draws,) = drawn(metric, row, labels=labels, resamples=1000)
    report = evaluate(TASKS["binary"], row.runs[0].probabilities, labels, thresholds=(0.5,))
    assert Estimate.of(draws) == report.metrics[metric]


def test_the_difference_is_of_means_over_seeds():
    labels = np.random.default_rng(0).integers(0, 2, 120)
    ours, theirs = (judged_row("a", 1, 3, labels, 2.0), judged_row("b", 2, 2, labels, 1.0))
    judged = JudgedTable(TASKS["binary"], labels, (ours, theirs))

    def mean(row: JudgedRow) -> float:
        reports = [
            evaluate(judged.task, run.probabilities, labels, thresholds=(0.5,), bootstrap=0)
            for run in row.runs
        ]
        return float(np.mean([report.metrics["auprc"].value for report in reports]))

    draws = [mean_draws(judged, row, metric="auprc", resamples=50) for row in judged.rows]
    assert difference(*draws).estimate.value == pytest.approx(mean(ours) - mean(theirs))


def test_a_test_over_draws_counts_sign_flips():
    ours, theirs = np.array([0.5, 0.6, 0.7, 0.8]), np.array([0.4, 0.4, 0.4, 0.4])
    found = difference_over_draws(ours, theirs)
    assert found.estimate.value == pytest.approx(0.25)
    # Of the 16 ways to flip four positive differences, two are as far from zero.
    assert found.p_value == pytest.approx(2 / 16)


def test_draws_in_which_a_metric_is_undefined_are_left_out():
    ours, theirs = np.array([0.5, np.nan, 0.7]), np.array([0.4, 0.4, 0.4])
    assert difference_over_draws(ours, theirs) == difference_over_draws(ours[::2], theirs[::2])
    undefined = difference_over_draws(np.full(3, np.nan), theirs)
    assert undefined == Difference(Estimate(None, None, None), None)


def test_a_draw_that_a_row_lacks_is_left_out_whichever_row_it_is():
    labels = np.random.default_rng(0).integers(0, 2, 60)
    long = judged_row("long", 1, 4, labels, 2.0)
    short = judged_row("short", 2, 4, labels, 1.0)
    short = replace(short, runs=short.runs[1::2])
    judged = JudgedTable(TASKS["binary"], labels, (long, short))
    given = {"title": "t", "metric": "auprc", "are_draws": True}
    forth, back = (measure_rows(judged, ours=name, **given) for name in ("long", "short"))
    found = forth.rows[1].difference.estimate.value
    values = [forth.rows[number].spread("auprc").values for number in (0, 1)]
    assert found == pytest.approx(np.mean(np.subtract(values[0][1::2], values[1])))
    assert back.rows[0].difference.estimate.value == pytest.approx(-found)


def test_names_cannot_break_a_table():
    one = Grid("50 % of {a}", ("row", "x"), (("a|b $x_1^2~\\", "1"),), None)
    markdown, latex = (re.sub(" +", " ", text) for text in (one.markdown(), one.latex()))
    assert r"| a\|b $x_1^2~\ | 1 |" in markdown
    assert r"a|b \$x\_1\textasciicircum{}2\textasciitilde{}\textbackslash{} & 1 \\" in latex
    assert r"\caption{50 \% of \{a\}}" in latex


def test_a_terminal_shows_what_rows_are_compared_by():
    for headings in (("row", "macro F1", "AUPRC", "validation AUPRC", "parameters"),
                     ("row", "AUPRC", "macro F1")):  # fmt: skip
        shown = Grid("t", headings, (tuple("a" * len(headings)),), None).terminal()
        wanted = headings[: headings.index("AUPRC") + 1]
        assert [column.header for column in shown.columns] == [*wanted]
