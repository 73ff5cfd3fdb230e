"""Calibrations fit as their papers say, and never break on awkward rows."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import t as student_t

import wordings
from sidelight.errors import SidelightError
from sidelight.statistics.calibration import Calibration, CalibrationKind, fit_calibration
from sidelight.types import Task

BINARY = Task("binary", ("safe", "toxic"))
MULTICLASS = Task("multiclass", ("a", "b", "c", "d"))
MULTILABEL = Task("multilabel", ("x", "y", "z"))
TASKS = [BINARY, MULTICLASS, MULTILABEL]
KINDS = get_args(CalibrationKind)
OPTIMISER = 2e-3  # where two optimisers stop on a flat minimum

every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
every_kind = pytest.mark.parametrize("kind", KINDS)


def draw_rows(task: Task, *, rows: int = 400, seed: int = 0):
    """Logits that are twice too large, and labels drawn from what they should have said."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(rows, task.outputs)) * 2
    if task.kind == "multiclass":
        return logits * 2, (logits + generator.gumbel(size=logits.shape)).argmax(axis=1)
    labels = (generator.logistic(size=logits.shape) < logits).astype(int)
    return logits * 2, labels[:, 0] if task.kind == "binary" else labels


def smoothed_loss(task: Task, calibration: Calibration, logits, labels) -> float:
    """What temperature and Platt minimise: the log loss of smoothed targets, and the prior's."""
    probabilities = calibration.apply(logits)
    prior = student_t(df=4, scale=0.5).logpdf(np.log(calibration.scale[0]))
    if task.kind == "multiclass":
        error = 1 / (len(labels) + 2)
        targets = np.full(probabilities.shape, error / (task.outputs - 1))
        targets[np.arange(len(labels)), labels] = 1 - error
        return -(targets * np.log(probabilities)).sum() - prior
    positives = labels.sum()
    high, low = 1 - 0.5 / (positives + 1), 0.5 / (len(labels) - positives + 1)
    targets = np.where(labels == 1, high, low)
    stated = probabilities[:, 0]
    return -(targets * np.log(stated) + (1 - targets) * np.log1p(-stated)).sum() - prior


@every_task
@every_kind
def test_calibrations_return_probabilities(task, kind):
    logits, labels = draw_rows(task)
    calibration = fit_calibration(kind, logits, labels, task)
    probabilities = calibration.apply(logits * 100)
    assert probabilities.shape == logits.shape
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    if task.kind == "multiclass":
        assert probabilities.sum(axis=1) == pytest.approx(1)
    if kind == "none":
        # The link alone.
        odds = np.exp(logits)
        total = odds.sum(axis=1, keepdims=True) if task.kind == "multiclass" else 1 + odds
        assert calibration.apply(logits) == pytest.approx(odds / total)


@every_kind
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(4, 60))
def test_calibration_is_monotonic(kind, seed, rows):
    generator = np.random.default_rng(seed)
    logits, labels = generator.normal(size=(rows, 1)), np.arange(rows) % 2
    calibrated = fit_calibration(kind, logits, labels, BINARY).apply(np.sort(logits, axis=0))
    assert (np.diff(calibrated[:, 0]) >= 0).all()


@pytest.mark.parametrize(
    ("kind", "task", "rows", "size"),
    [
        ("platt", BINARY, 20, 1.0),
        ("platt", BINARY, 400, 1.0),
        # The fewer, the more the prior counts.
        ("temperature", BINARY, 20, 1.0),
        ("temperature", MULTICLASS, 20, 1.0),
        *(("temperature", BINARY, 400, size) for size in (1e-6, 1e-2, 1.0, 1e6)),
        *(("temperature", MULTICLASS, 400, size) for size in (1e-6, 1.0, 1e6)),
    ],
)
def test_temperature_and_platt_match_independent_optimiser(kind, task, rows, size):
    logits, labels = draw_rows(task, rows=rows)
    logits = logits * size
    fitted = fit_calibration(kind, logits, labels, task)

    def loss(parameters):
        logarithm, *shift = parameters
        scale = (float(np.exp(logarithm)),) * task.outputs
        moved = replace(fitted, scale=scale, shift=(*shift,) or fitted.shift)
        return smoothed_loss(task, moved, logits, labels)

    first = [np.log(0.5 / size), 0.1][: 1 + (kind == "platt")]
    best = minimize(loss, first, method="Nelder-Mead", options={"fatol": 1e-9})
    assert smoothed_loss(task, fitted, logits, labels) <= best.fun + OPTIMISER
    if kind == "platt":
        expected = [np.exp(best.x[0]), best.x[1]]
        assert [fitted.scale[0], fitted.shift[0]] == pytest.approx(expected, abs=OPTIMISER)


@every_task
def test_small_samples_shrink_towards_previous_scale(task):
    logits, labels = draw_rows(task, rows=60)
    had = (0.2,) * task.outputs
    found = [fit_calibration("platt", logits, labels, task, around=a).scale for a in ((), had)]
    wanted = fit_calibration("platt", *draw_rows(task, rows=8000), task).scale
    # Logits were drawn twice too large; 8,000 rows pin the factor to about 2 %, here 3 sigma.
    assert wanted == pytest.approx([0.5] * task.outputs, rel=0.08)
    assert all(0.2 < anchored < free for free, anchored in zip(*found, strict=True))
    many = fit_calibration("platt", *draw_rows(task, rows=8000), task, around=had).scale
    assert many == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("kind", ["temperature", "platt"])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_separable_rows_do_not_produce_certainty(kind, size):
    for rows in (2, 4, 50):
        labels = np.arange(rows) % 2
        logits = (2.0 * labels[:, None] - 1) * size
        probabilities = fit_calibration(kind, logits, labels, BINARY).apply(logits)[:, 0]
        assert (probabilities[labels == 1] > 0.5).all()
        assert ((probabilities > 0) & (probabilities < 1)).all()


def test_constant_logits_give_base_rate_and_unseen_classes_become_unlikely():
    labels = np.repeat([0, 0, 0, 1], 100)
    calibration = fit_calibration("platt", np.full((400, 1), 7.0), labels, BINARY)
    # Platt's smoothing moves a rate of 100 in 400 by less than 0.01.
    assert calibration.apply(np.full((1, 1), 7.0))[0, 0] == pytest.approx(0.25, abs=0.01)
    logits, labels = draw_rows(MULTICLASS)
    labels[labels == 3] = 0
    probabilities = fit_calibration("platt", logits, labels, MULTICLASS).apply(logits)
    assert probabilities[:, 3].mean() < 0.02


@pytest.mark.parametrize("kind", ["temperature", "platt"])
def test_single_class_rows_are_refused(kind):
    for task in (BINARY, MULTICLASS):
        with pytest.raises(SidelightError, match=wordings.ROWS_OF_BOTH):
            fit_calibration(kind, np.zeros((5, task.outputs)), np.zeros(5, int), task)
    logits, labels = draw_rows(MULTILABEL)
    labels[:, 1] = 0
    # A label without positives stays as it is.
    calibration = fit_calibration(kind, logits, labels, MULTILABEL)
    assert (calibration.scale[1], calibration.shift[1]) == (1, 0)
    assert calibration.scale[0] != 1


def test_non_finite_logits_and_unknown_kinds_are_refused():
    calibration = fit_calibration("none", np.zeros((1, 1)), np.zeros(1, int), BINARY)
    for logits in (np.array([[np.nan]]), np.array([[np.inf]])):
        with pytest.raises(SidelightError, match=wordings.LOGITS_NOT_FINITE):
            calibration.apply(logits)
    with pytest.raises(SidelightError, match=wordings.DID_YOU_MEAN.format(name="platt")):
        fit_calibration("plat", np.zeros((1, 1)), np.zeros(1, int), BINARY)
