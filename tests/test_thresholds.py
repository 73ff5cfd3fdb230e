"""Thresholds follow their rule, lean on the calibration where texts are few, and warn of it."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidelight.errors import SidelightError
from sidelight.probes.card import TrainingRecord
from sidelight.statistics.thresholds import (
    ENOUGH_POSITIVES,
    F1,
    POINTS,
    PRIOR_TEXTS,
    OperatingCurve,
    ThresholdRule,
    choose_thresholds,
    operating_curves,
    warn_of_few_texts,
)
from sidelight.types import Task

BINARY = Task("binary", ("safe", "toxic"))
MULTICLASS = Task("multiclass", ("a", "b", "c", "d"))
MULTILABEL = Task("multilabel", ("x", "y", "z"))
RULES = ["f1", "fpr=0.1", "recall=0.8", "cost=10:1"]
# So many texts that nothing but the calibration counts, or nothing but labels.
CALIBRATION_ONLY, LABELS_ONLY = 1e12, 0.0


def plain_f1(labels, flagged) -> float:
    return 2 * (labels * flagged).sum() / (labels.sum() + flagged.sum())


def draw_calibrated(texts: int, *, seed: int, positive: float = 0.1):
    """Scores that say the truth, and labels."""
    generator = np.random.default_rng(seed)
    labels = generator.random(texts) < positive
    logits = generator.normal(size=texts) + np.where(labels, 1.0, -1.0)
    return 1 / (1 + np.exp(-2 * logits) * (1 - positive) / positive), labels


rows = st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=2, max_size=40).filter(
    lambda rows: {holds for _, holds in rows} == {False, True}
)


def test_threshold_rule_round_trips_and_rejects_invalid_text():
    for text in (*RULES, "fpr=.01", "cost=1:4", "recall=0.999"):
        rule = ThresholdRule.parse(text)
        assert ThresholdRule.parse(str(rule)) == rule
    unreadable = ", f1=0.5, fpr, fpr=0, fpr=1, recall=x, cost=10, cost=0:1, cost=1:0, cost=1:2:3"
    for text in f"{unreadable}, precision=0.9, 0.5, fpr=nan, cost=1e400:1".split(", "):
        with pytest.raises(SidelightError, match=r"f1, fpr=0\.01 .*recall=0\.95 .*cost=10:1"):
            ThresholdRule.parse(text)


def measured(rows):
    """The scores, the labels and the curve of some rows."""
    scores = np.array([score / 20 for score, _ in rows])
    holds = np.array([holds for _, holds in rows])
    return scores, holds, OperatingCurve.of(scores, holds)


@settings(max_examples=30, deadline=None)
@given(rows=rows)
def test_curve_counts_flags_and_yields_optimal_thresholds(rows):
    scores, holds, curve = measured(rows)
    assert (curve.positives, curve.negatives) == (holds.sum(), (~holds).sum())
    counts = zip(curve.true_positives, curve.false_positives, curve.expected, strict=True)
    for threshold, (hits, alarms, expected) in zip(curve.thresholds, counts, strict=True):
        flagged = scores >= threshold
        assert (flagged[holds].sum(), flagged[~holds].sum()) == (hits, alarms)
        assert scores[flagged].sum() == pytest.approx(expected, abs=1e-4)
        assert curve.at(threshold) == (hits, alarms)
    # None flags a score of 0: a threshold lies within (0, 1).
    rivals = np.append(np.arange(1, 21) / 20 - 0.01, 1.0)
    recall = np.array([(scores >= rival)[holds].mean() for rival in rivals])
    alarms = np.array([(scores >= rival)[~holds].mean() for rival in rivals])
    f1 = [plain_f1(holds, scores >= rival) for rival in rivals]

    def chosen(rule):
        flagged = scores >= curve.threshold(ThresholdRule.parse(rule), prior_texts=LABELS_ONLY)
        return flagged, flagged[holds].mean(), flagged[~holds].mean()

    assert plain_f1(holds, chosen("f1")[0]) == pytest.approx(max(f1))
    _, caught, false = chosen("fpr=0.2")
    possible = alarms <= 0.2
    if possible.any():
        assert false <= 0.2
        assert caught == pytest.approx(recall[possible].max())
    _, caught, false = chosen("recall=0.8")
    reached = recall >= 0.8
    if reached.any():
        assert caught >= 0.8
        assert false == pytest.approx(alarms[reached].min())
    _, caught, false = chosen("cost=3:1")
    costs = 3 * holds.sum() * (1 - recall) + (~holds).sum() * alarms
    paid = 3 * holds.sum() * (1 - caught) + (~holds).sum() * false
    assert paid == pytest.approx(costs.min())


@settings(max_examples=30, deadline=None)
@given(rows=rows)
def test_operating_points_maximise_recall_within_rate(rows):
    _, _, curve = measured(rows)
    for rate in (0.0, 0.1, 0.5):
        for threshold, found, flagged in curve.operating_points([rate]):
            assert flagged <= rate * curve.negatives
            pairs = zip(curve.true_positives, curve.false_positives, strict=True)
            assert found == max(hits for hits, alarms in pairs if alarms <= rate * curve.negatives)
            assert curve.at(threshold) == (found, flagged)
    assert len(curve.operating_points()) <= 6


def test_calibration_only_thresholds_match_bayes_decision_rule():
    scores, holds = draw_calibrated(20_000, seed=0)
    curve = OperatingCurve.of(scores, holds, points=20_001)
    for miss, alarm in ((10, 1), (1, 1), (1, 4)):
        rule = ThresholdRule.parse(f"cost={miss}:{alarm}")
        threshold = curve.threshold(rule, prior_texts=CALIBRATION_ONLY)
        assert threshold == pytest.approx(alarm / (miss + alarm), abs=2e-3)
    # F1 is highest at half its value.
    threshold = curve.threshold(F1, prior_texts=CALIBRATION_ONLY)
    flagged = scores >= threshold
    expected = 2 * scores[flagged].sum() / (flagged.sum() + scores.sum())
    assert threshold == pytest.approx(expected / 2, abs=2e-3)


def test_smoothing_improves_f1_with_few_positives():
    scores, holds = draw_calibrated(100_000, seed=1)
    found = {LABELS_ONLY: [], PRIOR_TEXTS: []}
    for seed in range(200):
        curve = OperatingCurve.of(*draw_calibrated(100, seed=seed))
        for prior, values in found.items():
            flagged = scores >= curve.threshold(F1, prior_texts=prior)
            values.append(plain_f1(holds, flagged))
    gains = np.subtract(found[PRIOR_TEXTS], found[LABELS_ONLY])
    assert gains.mean() > 3 * gains.std() / np.sqrt(len(gains))


def test_labels_outweigh_poor_calibration_with_many_texts():
    scores, holds = draw_calibrated(40_000, seed=0)
    # A calibration that is far off.
    curve = OperatingCurve.of(scores**4, holds)
    best = curve.threshold(F1, prior_texts=LABELS_ONLY)
    flagged, ideal = scores**4 >= curve.threshold(F1), scores**4 >= best
    assert plain_f1(holds, flagged) == pytest.approx(plain_f1(holds, ideal), abs=2e-3)


@pytest.mark.parametrize("rule", RULES)
def test_saturated_scores_still_get_reachable_threshold(rule):
    rule, labels = ThresholdRule.parse(rule), np.array([0, 0, 1])
    for scores in ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1 - 1e-14, 1.0, 1 - 1e-12], [0.0, 1e-12, 1]):
        (threshold,) = choose_thresholds(BINARY, np.array(scores)[:, None], labels, rule=rule)
        assert 0 < threshold < 1


def test_each_label_gets_midpoint_threshold_and_half_without_positives():
    scores = np.array([[0.1, 0.5, 0.9], [0.3, 0.5, 0.7], [0.9, 0.5, 0.3]])
    labels = np.array([[0, 0, 1], [1, 0, 0], [1, 0, 0]])
    many = np.tile(scores, (1000, 1)), np.tile(labels, (1000, 1))
    assert choose_thresholds(MULTILABEL, *many) == pytest.approx((0.2, 0.5, 0.8))
    scores, labels = np.array([[0.1], [0.2], [0.8], [0.9]]), np.array([0, 0, 1, 1])
    assert choose_thresholds(BINARY, scores, labels) == pytest.approx((0.5,))
    # Of several classes the most probable one wins.
    assert choose_thresholds(MULTICLASS, np.full((4, 4), 0.25), np.arange(4)) == ()


@pytest.mark.parametrize("texts", [300, 30_000])
@pytest.mark.parametrize("rule", RULES)
def test_bounded_curve_loses_little_accuracy(texts, rule):
    scores, holds = draw_calibrated(texts, seed=2)
    exact = OperatingCurve.of(scores, holds, points=texts + 1)
    bounded = OperatingCurve.of(scores, holds)
    assert len(bounded.thresholds) <= POINTS
    assert len(json.dumps(asdict(bounded))) < 10_000
    assert bounded.thresholds[0] == exact.thresholds[0]
    assert bounded.thresholds[-1] == exact.thresholds[-1]
    rule = ThresholdRule.parse(rule)
    rates = [
        [(scores >= curve.threshold(rule))[side].mean() for side in (holds, ~holds)]
        for curve in (exact, bounded)
    ]
    # The arcsine's step at a share of a half is 1.2 %.
    assert rates[0] == pytest.approx(rates[1], abs=0.025)


def curves_read(stored):
    """As a probe's record is read."""
    return TrainingRecord.model_validate({"validation": {"curves": stored}}).curves


def test_curves_survive_json_and_reject_damaged_data():
    scores = np.random.default_rng(0).random((50, 3))
    curves = operating_curves(MULTILABEL, scores, (scores > 0.6).astype(int))
    stored = {label: asdict(curve) for label, curve in curves.items()}
    assert tuple(curves) == MULTILABEL.labels
    assert curves_read(json.loads(json.dumps(stored))) == curves
    curve = OperatingCurve((0.7, 0.2), (0, 1), (0, 1), (0.0, 1.1), 1, 1)
    assert curves_read({"x": asdict(curve)}) == {"x": curve}
    for change in (
        {"thresholds": []}, {"thresholds": [0.5, 0.5]}, {"thresholds": [1.5, 0.6]},
        {"thresholds": [0.5, float("nan")]}, {"thresholds": [i / 1000 for i in range(200, 0, -1)]},
        {"true_positives": [2, 1]}, {"true_positives": [0, 9]}, {"false_positives": [-1, 0]},
        {"expected": [0.1]}, {"surprise": 1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="x"):
            curves_read({"x": asdict(curve) | change})


@pytest.mark.parametrize(
    ("task", "counts", "texts", "rule", "doubts"),
    [
        (BINARY, {"safe": 900, "toxic": 12}, 912, "f1", ["12 of 'toxic'"]),
        (BINARY, {"safe": 900, "toxic": ENOUGH_POSITIVES}, 930, "f1", []),
        # Few negatives are no matter of recall.
        (BINARY, {"safe": 5, "toxic": 40}, 45, "f1", []),
        (MULTILABEL, {"x": 40, "y": 3, "z": 8}, 100, "f1", ["3 of 'y', 8 of 'z'"]),
        (MULTICLASS, dict.fromkeys("abcd", 2), 8, "f1", []),
        # A rate of false alarms takes enough negatives.
        (BINARY, {"safe": 200, "toxic": 60}, 260, "fpr=0.01", ["200 negative texts are too few"]),
        (BINARY, {"safe": 200, "toxic": 60}, 260, "fpr=0.05", []),
    ],
)
def test_threshold_from_few_texts_triggers_warning(task, counts, texts, rule, doubts, warned):
    assert warn_of_few_texts(task, counts, texts, ThresholdRule.parse(rule)) == bool(doubts)
    found = warned()
    assert len(found) == len(doubts)
    assert all(expected in warning for expected, warning in zip(doubts, found, strict=True))
