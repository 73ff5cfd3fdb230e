"""Laws of the connector, without an engine."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import wordings
from sidelight.errors import SidelightError
from sidelight.models.conversation import EncodedPrompt, Part, Reads
from sidelight.probes.artifact import save_probe
from sidelight.probes.bank import Panel
from sidelight_vllm.internals import Step, full_group, steps_of
from sidelight_vllm.requests import Tracking, read_report, request_params
from sidelight_vllm.settings import Served
from sidelight_vllm.worker import LayerColumns, Loaded, RequestJudge, StepVerdicts
from worlds.models import tiny_backbone, untrained_probe


def test_a_share_of_a_request_that_has_ended_leaves_no_state():
    """Under pipeline parallel a step may still run when its request ends."""
    from sidelight_vllm.connector import ProbeConnector, WorkerResults

    panel = Panel([untrained_probe(tiny_backbone(), "late", reads=Reads("both"))])
    judge = RequestJudge(panel, Loaded(identity="old"))
    tracking = Tracking(reads_responses=True)
    prompt = EncodedPrompt((5, 6, 7), (Part.PROMPT,) * 3)
    for request_id in ("ended", "running"):
        tracking.enter(request_id, request_params(prompt), prompt.token_ids)
    steps = [Step(request_id, 3, True, [0]) for request_id in ("ended", "running")]
    columns = torch.zeros(3, 4, judge.panel.projection.weight.shape[-1])
    shares = [LayerColumns(reading, 0, columns) for reading in tracking.plan(steps)]
    tracking.leave("ended")
    connector = object.__new__(ProbeConnector)
    connector.tracking, connector._judge = tracking, judge
    connector.take(WorkerResults(StepVerdicts(columns=shares, probes=judge.loaded)))
    assert list(judge._states) == ["running"]
    read_report(tracking.report("running")).require_judged()


def test_the_scheduler_follows_its_stages_to_other_probes_or_gives_no_verdict(tmp_path):
    from sidelight_vllm.connector import ProbeConnector, WorkerResults

    backbone = tiny_backbone()
    probes = [untrained_probe(backbone, name) for name in ("old", "new")]
    served = [
        Served((str(save_probe(probe, tmp_path / probe.name)),), backbone.fingerprint)
        for probe in probes
    ]
    judge = RequestJudge.load(served[0])
    old, new = judge.loaded, RequestJudge.load(served[1]).loaded
    prompt = EncodedPrompt((5, 6, 7), (Part.PROMPT,) * 3)
    columns = torch.zeros(3, backbone.fingerprint.layers, judge.panel.projection.weight.shape[-1])
    connector = object.__new__(ProbeConnector)
    connector._served, connector._judge = served[0], judge

    def judged_after(loaded):
        connector.tracking = Tracking(reads_responses=False)
        connector.tracking.enter("r", request_params(prompt), prompt.token_ids)
        shares = [
            LayerColumns(r, 0, columns) for r in connector.tracking.plan([Step("r", 3, True, [0])])
        ]
        connector.take(WorkerResults(StepVerdicts(columns=shares, probes=loaded)))
        report = read_report(connector.tracking.report("r"))
        assert report.identity == loaded.identity
        return {verdict.probe for verdict in report.verdicts}

    assert judged_after(old) == {"old"}
    assert judged_after(new) == {"new"}
    # Stages that differ, a folder that is gone, and one that holds something else by now.
    assert judged_after(Loaded()) == set()
    assert judged_after(replace(old, folders=(str(tmp_path / "gone"),))) == set()
    assert judged_after(replace(old, folders=new.folders)) == set()
    assert judged_after(old) == {"old"}


def test_a_block_table_grows_begins_again_after_preemption_and_goes_whoever_ends_its_request():
    """Beside a connector without groups, vLLM ends requests by another method."""
    from sidelight_vllm.connector import ProbeConnector

    prompt = EncodedPrompt(tuple(range(5)), (Part.PROMPT,) * 5)
    new = SimpleNamespace(req_id="r", block_ids=([9], [0]), num_computed_tokens=0)

    def step(tokens, computed=0, blocks=None, *, new=(), resumed=()):
        ids = [] if new else ["r"]
        cached = SimpleNamespace(
            req_ids=ids, new_block_ids=[blocks] * len(ids), resumed_req_ids={*resumed},
            num_computed_tokens=[computed] * len(ids),
        )  # fmt: skip
        output = SimpleNamespace(
            num_scheduled_tokens={"r": tokens}, scheduled_new_reqs=new, scheduled_cached_reqs=cached
        )
        return [(r.blocks, r.start) for r in tracking.plan(steps_of(output, 1))]

    for end, blocks in (("request_finished", [0, 1]), ("request_finished_all_groups", ([0, 1],))):
        tracking = Tracking(reads_responses=True)
        tracking.enter("r", request_params(prompt), prompt.token_ids)
        assert step(4, new=[new]) == []
        assert step(1, 4, ([8], [1])) == [((0, 1), 0)]
        assert step(1, 5) == [((0, 1), 5)]
        assert step(7, 0, ([7], [4, 5]), resumed="r") == [((4, 5), 0)]
        connector = object.__new__(ProbeConnector)
        connector.tracking, connector._judge = tracking, RequestJudge(Panel([]))
        getattr(connector, end)(SimpleNamespace(request_id="r"), blocks)
        assert "r" not in tracking


def test_a_pipeline_stage_that_lacks_a_kind_of_attention_is_refused():
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    sizes = {"block_size": 16, "num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
    full, window = FullAttentionSpec(**sizes), SlidingWindowSpec(**sizes, sliding_window=8)

    def config(*groups):
        made = [SimpleNamespace(kv_cache_spec=spec, layer_names=own) for spec, own in groups]
        return SimpleNamespace(kv_cache_groups=made)

    assert full_group(config((window, ["a"]), (full, ["b"]), (full, ["c"]))) == 1
    with pytest.raises(SidelightError, match=wordings.STAGE_MISSING):
        full_group(config((window, ["a"]), (full, []), (full, ["c"])))
    with pytest.raises(SidelightError, match=wordings.CACHE_FORGETS):
        full_group(config((window, ["a"])))
