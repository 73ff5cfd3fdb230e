"""The gate of judges: what a blind sample must stop and let pass, by simulation."""

import math

import numpy as np
import pytest

from sidelight.statistics.agreement import measure_agreement
from sidelight_label.agreement import (
    LEAST_OF_LABEL,
    MOST,
    SAMPLE,
    BlindSample,
    decide_gate,
    doubtful,
)

FIRST = 500
DRAWS = 200


def population(random, prevalence, sensitivity, specificity):
    """A person's labels, a judge's, and the scores of a probe that learnt from the judge."""
    truth = random.random(FIRST) < prevalence
    right = np.where(truth, sensitivity, specificity)
    judge = truth == (random.random(FIRST) < right)
    skill = sensitivity + specificity - 1
    evidence = np.where(truth, 2.0, -2.0) + 1.5 * random.normal(size=FIRST)
    prior = 0.7 * math.log(judge.mean() / (1 - judge.mean()))
    return truth, judge, 1 / (1 + np.exp(-skill * evidence - prior))


def status(random, *errors):
    truth, judge, scores = population(random, *errors)
    rows = range(FIRST)
    sample = BlindSample.draw(rows, scores, seed=int(random.integers(1 << 30)))
    person = {row: bool(truth[row]) for row in rows}
    labels = {row: bool(judge[row]) for row in rows}
    return decide_gate(sample, person, labels)


@pytest.mark.parametrize("prevalence", [0.06, 0.15, 0.4])
@pytest.mark.parametrize(
    ("sensitivity", "specificity", "passes"),
    [
        # Balanced agreement of 0.92, then of 0.70.
        (0.92, 0.92, True),
        (0.86, 0.98, True),
        (0.7, 0.7, False),
        (0.45, 0.95, False),
        (0.95, 0.45, False),
    ],
)
def test_gate_decides_correctly_in_95_percent_of_draws(
    prevalence, sensitivity, specificity, passes
):
    random = np.random.default_rng(7)
    states = [status(random, prevalence, sensitivity, specificity).state for _ in range(DRAWS)]
    right = states.count("passed") if passes else DRAWS - states.count("passed")
    assert right >= 0.95 * DRAWS


@pytest.mark.parametrize("answer", [False, True])
def test_constant_judge_is_stopped_before_human_labelling(answer):
    sample = BlindSample.draw(range(FIRST), None)
    gate = decide_gate(sample, {}, dict.fromkeys(range(FIRST), answer))
    assert gate.state == "stopped"
    assert not gate.left


def test_agreement_interval_covers_the_population_agreement():
    random = np.random.default_rng(1)
    hits = 0
    for _ in range(DRAWS):
        truth, judge, scores = population(random, 0.2, 0.85, 0.9)
        full = measure_agreement(truth, judge, np.ones(FIRST)).value
        sample = BlindSample.draw(range(FIRST), scores, seed=int(random.integers(1 << 30)))
        person, output = dict(enumerate(truth.tolist())), dict(enumerate(judge.tolist()))
        agreement = decide_gate(sample, person, output).agreement
        hits += agreement.low <= full <= agreement.high
    assert hits >= 0.93 * DRAWS


def test_agreement_averages_both_labels_and_is_unknown_without_one():
    found = measure_agreement([True] * 2 + [False] * 8, [True, False] + [False] * 8, [1.0] * 10)
    assert found.value == pytest.approx((0.5 + 1) / 2)
    assert (found.texts, found.positives) == (10, 2)
    weighted = measure_agreement([True, True, False], [True, False, False], [3.0, 1.0, 1.0])
    assert weighted.value == pytest.approx((0.75 + 1) / 2)
    assert measure_agreement([False] * 3, [False] * 3, [1.0] * 3).value is None


def test_blind_sample_is_stratified_and_grows_until_labels_suffice():
    scores = np.concatenate([np.full(400, 0.01), np.full(60, 0.3), np.full(40, 0.9)])
    sample = BlindSample.draw(range(500), scores)
    first = sample.first(SAMPLE)
    counts = np.bincount(np.digitize(scores[[*first]], [0.1, 0.5]))
    assert counts.max() - counts.min() <= 1
    # Each stratum is represented in full.
    assert sum(first.values()) == pytest.approx(500)
    assert {*first} <= {*sample.first(SAMPLE + 25)}
    rare = {row: row >= 490 for row in range(500)}
    gate = decide_gate(sample, rare, rare)
    assert (gate.state, gate.agreement.texts) == ("too_few", 500)
    enough = {row: row >= 500 - LEAST_OF_LABEL for row in range(500)}
    gate = decide_gate(sample, enough, enough)
    assert gate.state == "passed"
    assert SAMPLE < len(gate.sample) < 500
    assert gate.agreement.positives == LEAST_OF_LABEL
    partly = {row: enough[row] for row in [*first][:50]}
    gate = decide_gate(sample, partly, enough)
    assert (gate.state, len(gate.left)) == ("open", SAMPLE - 50)


def test_sample_grows_while_interval_includes_the_agreement_threshold():
    person = {row: row % 2 == 0 for row in range(500)}
    # Wrong on one of five texts.
    judge = {row: each != (row % 10 in (0, 1)) for row, each in person.items()}
    gate = decide_gate(BlindSample.draw(range(500), None), person, judge)
    assert len(gate.sample) == MOST
    assert decide_gate(BlindSample.draw(range(500), None), person, person).agreement.texts == SAMPLE


def test_confident_probe_disagreement_makes_a_label_doubtful():
    probabilities = np.array([0.95, 0.99, 0.5, 0.02, 0.97])
    labels = {0: False, 1: False, 2: False, 3: True, 4: True}
    assert [*doubtful(probabilities, labels)] == [1, 3, 0]
