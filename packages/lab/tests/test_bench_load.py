"""Servers under load: each fault is found, a sound server has none, and costs are paired."""

from dataclasses import replace

import pytest
from transformers import LlamaConfig

from sidelight.policy.rules import read_policy
from sidelight.probes.artifact import load_probe
from sidelight_lab.bench.load import PROBES, TOLERANCE, Answer, Question, faults, prepare
from sidelight_lab.bench.serving import MEASURES, NOTHING, costs_of
from worlds.models import SIZES, tiny_backbone

QUESTION = Question("Hello", {"blocking": 0.2, "telling": 0.7}, is_blocked=False)


def verdicts(blocking=0.2, telling=0.7):
    return tuple(
        {"probe": name, "probabilities": {"yes": probability}}
        for name, probability in zip(PROBES, (blocking, telling, 0.5), strict=True)
    )


FAILED = {"probe": "telling", "error": "verdict_failed"}
SOUND = Answer(QUESTION, "a", 0.1, verdicts(), verdicts(), "length")


def found(*answers):
    return {name: number for name, number in faults(answers).items() if number}


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ({"verdicts": verdicts()[1:], "in_header": ()}, "lost verdicts"),
        ({"verdicts": (*verdicts(), verdicts()[0])}, "duplicated verdicts"),
        ({"verdicts": verdicts(telling=0.5), "in_header": ()}, "verdicts of another request"),
        ({"in_header": verdicts(0.2 + 2 * TOLERANCE)}, "verdicts of another request"),
        ({"verdicts": (*verdicts()[::2], FAILED), "in_header": (FAILED,)}, "lost verdicts"),
        ({"question": replace(QUESTION, is_blocked=True)}, "answered, but to be blocked"),
        ({"id": "a"}, "answers that share an id"),
        ({"id": None, "ending": "content_filter"}, "blocked, but to be answered"),
        ({"id": None, "ending": "APITimeoutError"}, "failed requests"),
    ],
)
def test_each_fault_in_an_answer_is_detected(answer, fault):
    assert found(SOUND, replace(SOUND, **{"id": "b", **answer})) == {fault: 1}


def test_sound_answers_and_blocked_requests_have_no_faults():
    blocked = Answer(replace(QUESTION, is_blocked=True), None, 0.1, (), (), "content_filter")
    assert found(SOUND, replace(SOUND, id="b"), blocked) == {}


@pytest.mark.slow
@pytest.mark.parametrize("spans", [False, True])
def test_load_questions_have_distinct_verdicts_and_few_are_blocked(tmp_path, spans):
    backbone = tiny_backbone(LlamaConfig(**{**SIZES, "max_position_embeddings": 640}))
    backbone.encoder.max_tokens = 640
    folders, policy, questions = prepare(backbone, tmp_path, spans=spans)
    assert len({question.text for question in questions}) > 100
    probabilities = [question.probabilities["telling"] for question in questions]
    assert len({round(probability / TOLERANCE) for probability in probabilities}) > 8
    threshold = read_policy(policy).input["blocking"].threshold
    for question in questions:
        assert question.is_blocked == (question.probabilities["blocking"] >= threshold)
    assert 0.05 < sum(question.is_blocked for question in questions) / len(questions) < 0.2
    assert [load_probe(folder).name for folder in folders] == [*PROBES]


def test_probe_costs_are_paired_with_the_same_round():
    # The machine gets three times slower, which no comparison within a round notices.
    without = [[10.0 * n, 1.0 * n, 5.0 * n, 8.0 / n, 4.0 * n, 2.0 * n] for n in (1, 2, 3)]
    shares = (1.2, 1.0, 1.1, 0.9, 1.3, 1.4)
    with_one = [[s * value for s, value in zip(shares, row, strict=True)] for row in without]
    costs = {one["measure"]: one for one in costs_of({NOTHING: without, "one": with_one})}
    assert list(costs) == list(MEASURES)
    assert [one["without"] for one in costs.values()] == [20, 2, 10, 4, 8, 4]
    for one, share in zip(costs.values(), shares, strict=True):
        assert one["probes"] == "one"
        found = (one["added"], one["low"], one["high"])
        assert found == pytest.approx((share - 1,) * 3)
