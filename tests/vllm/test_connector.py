"""The scheduler's side of the connector, without an engine."""

from types import SimpleNamespace

import torch

from sidelight.bank import Panel
from sidelight.prompts import EncodedPrompt, Part, Reads
from sidelight.vllm.columns import Step, Tracking
from sidelight.vllm.settings import KEY, request_params
from sidelight.vllm.worker import RequestJudge, Share
from tiny import tiny_backbone, untrained_probe


def test_a_share_of_a_request_that_has_ended_leaves_no_state():
    """Under pipeline parallel a step may still run when its request ends."""
    from sidelight.vllm.connector import ProbeConnector, Results

    judge = RequestJudge(Panel([untrained_probe(tiny_backbone(), "late", reads=Reads("both"))]))
    tracking = Tracking(reads_responses=True)
    prompt = EncodedPrompt((5, 6, 7), (Part.PROMPT,) * 3)
    for request_id in ("ended", "running"):
        tracking.enter(request_id, request_params(prompt), prompt.token_ids)
    steps = [Step(request_id, 3, True, lambda: [0]) for request_id in ("ended", "running")]
    columns = torch.zeros(3, 4, judge.panel.projection.weight.shape[-1])
    shares = [Share(reading, 0, columns) for reading in tracking.plan(steps)]
    tracking.leave("ended")
    output = SimpleNamespace(kv_connector_worker_meta=Results(shares=shares, reads_responses=True))
    connector = SimpleNamespace(tracking=tracking, _judge=judge)
    ProbeConnector.update_connector_output(connector, output)
    assert list(judge._states) == ["running"]
    assert "verdicts" in tracking.report("running")[KEY]
