"""The rule that says when a running score counts."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidelight.errors import SidelightError, VerdictError
from sidelight.policy.hold_back import StreamingRule, Watched

# Few distinct values, so that scores often equal the threshold and streaks occur.
_SCORES = st.lists(st.sampled_from([0.0, 0.4, 0.5, 0.6, 1.0]), max_size=20)
_RULES = st.builds(
    StreamingRule,
    threshold=st.sampled_from([0.0, 0.5, 1.0]),
    consecutive=st.integers(1, 4),
    warm_up=st.integers(0, 6),
)


def watch(rule, scores):
    watched = Watched()
    for score in scores:
        watched = rule.advance(watched, score)
    return watched


@given(_RULES, _SCORES)
def test_both_forms_fire_at_the_same_token(rule, scores):
    assert watch(rule, scores).fired_at == rule.first_firing(np.array(scores))


@given(_RULES, _SCORES)
def test_it_fires_at_the_first_token_that_ends_a_streak(rule, scores):
    ends = range(rule.warm_up + rule.consecutive, len(scores) + 1)
    expected = [
        end
        for end in ends
        if all(score >= rule.threshold for score in scores[end - rule.consecutive : end])
    ]
    assert watch(rule, scores).fired_at == next(iter(expected), None)


@given(_RULES, _SCORES, _SCORES)
def test_what_was_fired_stays_fired(rule, before, after):
    first = watch(rule, before)
    if first.has_fired:
        assert watch(rule, before + after).fired_at == first.fired_at


def test_a_single_token_over_the_threshold_is_flicker():
    rule = StreamingRule(0.5, consecutive=2)
    assert not watch(rule, [0.9, 0.1, 0.9, 0.1]).has_fired
    assert watch(rule, [0.9, 0.1, 0.9, 0.5]).fired_at == 4


def test_the_warm_up_does_not_count():
    rule = StreamingRule(0.5, consecutive=2, warm_up=3)
    assert watch(rule, [0.9] * 4).fired_at is None
    assert watch(rule, [0.9] * 5).fired_at == 5


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_no_verdict(score):
    rule = StreamingRule(0.5)
    with pytest.raises(VerdictError, match="not judged"):
        rule.advance(Watched(), score)
    with pytest.raises(VerdictError, match="not judged"):
        rule.first_firing(np.array([0.9, score]))


@pytest.mark.parametrize(
    "wrong", [{"threshold": 1.5}, {"threshold": math.nan}, {"consecutive": 0}, {"warm_up": -1}]
)
def test_a_rule_out_of_range_is_refused(wrong):
    with pytest.raises(SidelightError, match="streaming rule needs"):
        StreamingRule(**{"threshold": 0.5, **wrong})
