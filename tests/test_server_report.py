"""A report leaves no chosen probe out in silence."""

import pytest

from sidelight.engines.base import Finished, PromptJudged
from sidelight.errors import VerdictError
from sidelight.prompts import Reads
from sidelight.server.errors import RequestError, failure_body
from sidelight.server.report import CategoryNames, Reporter, SideReport
from sidelight.types import Verdict
from tiny import tiny_backbone, untrained_probe

SAID = Verdict("early", "fine", ("fine",), {"fine": 1.0, "toxic": 0.0}, flagged=False)


@pytest.fixture(scope="module")
def reporter():
    backbone = tiny_backbone()
    probes = [
        untrained_probe(backbone, "early"),
        untrained_probe(backbone, "late", reads=Reads("response")),
    ]
    return Reporter("tiny/llama", probes, CategoryNames.of(probes))


def test_a_probe_of_the_response_is_not_required_where_there_is_none(reporter):
    event = PromptJudged((SAID,), tokens=3)
    assert reporter.required(event, has_response=False) == (SAID,)


@pytest.mark.parametrize(
    ("event", "has_response", "name"),
    [
        (PromptJudged((SAID,), tokens=3), True, "late"),
        (PromptJudged((SAID,), ("late",), tokens=3), True, "late"),
        (PromptJudged((), ("early",), tokens=3), False, "early"),
        # Unloaded since the request began.
        (PromptJudged((), tokens=3), False, "early"),
    ],
)
def test_a_probe_that_said_nothing_is_an_error(reporter, event, has_response, name):
    with pytest.raises(VerdictError, match=name):
        reporter.required(event, has_response=has_response)


def test_each_failure_has_its_own_reason(reporter):
    finished = Finished("length", 3, 9, (), ("early", "late"), too_long=("late",))
    message = reporter.moderation(SideReport((SAID,)), reporter.side(finished))["output"]["message"]
    assert "early: the output was not a finite number" in message
    assert "late: the text is longer than the policy" in message


def test_a_refusal_in_the_midst_of_a_stream_keeps_its_code():
    error = RequestError("no", status=503, type="server_error", code="audit_failed", param="x")
    assert failure_body(error) == error.body
