"""A report leaves no chosen probe out in silence."""

import pytest

from sidelight.engines.base import PromptJudged
from sidelight.errors import VerdictError
from sidelight.policy.decisions import by_probe, decide
from sidelight.policy.enforcement import check_decisions
from sidelight.policy.rules import Policy, Rule, bound_rules
from sidelight.prompts import Reads
from sidelight.server.errors import RequestError, failure_body
from sidelight.server.report import Report, category_names
from sidelight.types import Verdict
from tiny import tiny_backbone, untrained_probe

SAID = Verdict("early", "fine", ("fine",), {"fine": 1.0, "toxic": 0.0}, flagged=False)


@pytest.fixture(scope="module")
def report():
    backbone = tiny_backbone()
    probes = [
        untrained_probe(backbone, "early"),
        untrained_probe(backbone, "late", reads=Reads("response")),
    ]
    return Report("tiny/llama", probes, category_names(probes))


def decisions_on(report, event):
    """Of the probes that the event speaks of, as of a check."""
    known = {*by_probe(event.verdicts), *event.failed}
    probes = [probe for probe in report.probes if probe.name in known]
    return check_decisions(bound_rules(Policy(), probes), event, {"input", "output"})


def test_a_probe_of_the_response_is_not_required_where_there_is_none(report):
    decisions = decisions_on(report, PromptJudged((SAID,), tokens=3))
    assert report.required(decisions, has_response=False) == [SAID]


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
def test_a_probe_that_said_nothing_is_an_error(report, event, has_response, name):
    with pytest.raises(VerdictError, match=name):
        report.required(decisions_on(report, event), has_response=has_response)


def test_each_failure_has_its_own_reason(report):
    policy = Policy(output={"late": Rule(max_tokens=8)})
    response = [decide(bound, {}, tokens=9) for bound in bound_rules(policy, report.probes)]
    message = report.moderation((), response)["output"]["message"]
    assert "early: the output was not a finite number" in message
    assert "late: the text is longer than the policy" in message


def test_a_refusal_in_the_midst_of_a_stream_keeps_its_code():
    error = RequestError("no", status=503, type="server_error", code="audit_failed", param="x")
    assert failure_body(error) == error.body
