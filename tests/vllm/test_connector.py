"""Laws of the connector, without an engine."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sidelight.artifact import save_probe
from sidelight.bank import Panel
from sidelight.errors import SidelightError
from sidelight.prompts import EncodedPrompt, Part, Reads
from sidelight.vllm.internals import BlockTables, Step, full_group
from sidelight.vllm.settings import KEY, Served, request_params
from sidelight.vllm.tracking import Tracking
from sidelight.vllm.worker import Loaded, RequestJudge, Share, StepVerdicts, load_panel
from tiny import tiny_backbone, untrained_probe


def test_a_share_of_a_request_that_has_ended_leaves_no_state():
    """Under pipeline parallel a step may still run when its request ends."""
    from sidelight.vllm.connector import ProbeConnector, done

    judge = RequestJudge(Panel([untrained_probe(tiny_backbone(), "late", reads=Reads("both"))]))
    tracking = Tracking(reads_responses=True)
    prompt = EncodedPrompt((5, 6, 7), (Part.PROMPT,) * 3)
    for request_id in ("ended", "running"):
        tracking.enter(request_id, request_params(prompt), prompt.token_ids)
    steps = [Step(request_id, 3, True, [0]) for request_id in ("ended", "running")]
    columns = torch.zeros(3, 4, judge.panel.projection.weight.shape[-1])
    shares = [Share(reading, 0, columns) for reading in tracking.plan(steps)]
    tracking.leave("ended")
    connector = object.__new__(ProbeConnector)
    connector.tracking, connector._judge, connector._identity = tracking, judge, "old"
    connector.take(done(StepVerdicts(shares=shares, probes=Loaded(identity="old"))))
    assert list(judge._states) == ["running"]
    assert "verdicts" in tracking.report("running")[KEY]


def test_the_scheduler_follows_its_stages_to_other_probes_or_gives_no_verdict(tmp_path):
    from sidelight.vllm.connector import ProbeConnector, done

    backbone = tiny_backbone()
    probes = [untrained_probe(backbone, name) for name in ("old", "new")]
    served = [
        Served((str(save_probe(probe, tmp_path / probe.name)),), backbone.fingerprint)
        for probe in probes
    ]
    panel, old = load_panel(served[0])
    _, new = load_panel(served[1])
    prompt = EncodedPrompt((5, 6, 7), (Part.PROMPT,) * 3)
    columns = torch.zeros(3, backbone.fingerprint.layers, panel.projection.weight.shape[-1])
    connector = object.__new__(ProbeConnector)
    connector._served, connector._identity = served[0], old.identity
    connector._judge = RequestJudge(panel)

    def judged_after(loaded):
        connector.tracking = Tracking(reads_responses=False)
        connector.tracking.enter("r", request_params(prompt), prompt.token_ids)
        shares = [Share(r, 0, columns) for r in connector.tracking.plan([Step("r", 3, True, [0])])]
        connector.take(done(StepVerdicts(shares=shares, probes=loaded)))
        report = connector.tracking.report("r")[KEY]
        assert report["identity"] == loaded.identity
        return {name for name, said in report["verdicts"].items() if "error" not in said}

    assert judged_after(old) == {"old"}
    assert judged_after(new) == {"new"}
    # Stages that differ, a folder that is gone, and one that holds something else by now.
    assert judged_after(Loaded()) == set()
    assert judged_after(replace(old, folders=(str(tmp_path / "gone"),))) == set()
    assert judged_after(replace(old, folders=new.folders)) == set()
    assert judged_after(old) == {"old"}


def test_whoever_ends_a_request_its_block_table_goes():
    """Beside a connector without groups, vLLM ends requests by another method."""
    from sidelight.vllm.connector import ProbeConnector

    new = SimpleNamespace(req_id="r", block_ids=([0, 1],), num_computed_tokens=0)
    cached = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[])
    output = SimpleNamespace(
        num_scheduled_tokens={"r": 5}, scheduled_new_reqs=[new], scheduled_cached_reqs=cached
    )
    for end, blocks in (("request_finished", [0, 1]), ("request_finished_all_groups", ([0, 1],))):
        tables, tracking = BlockTables(0), Tracking(reads_responses=False)
        (step,) = tables.steps(output)
        assert (step.blocks, step.computed) == ([0, 1], 5)
        connector = object.__new__(ProbeConnector)
        connector._tables, connector.tracking = tables, tracking
        connector._judge = RequestJudge(Panel([]))
        getattr(connector, end)(SimpleNamespace(request_id="r"), blocks)
        assert not tables._blocks


def test_a_pipeline_stage_that_lacks_a_kind_of_attention_is_refused():
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    sizes = {"block_size": 16, "num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
    full, window = FullAttentionSpec(**sizes), SlidingWindowSpec(**sizes, sliding_window=8)

    def config(*groups):
        made = [SimpleNamespace(kv_cache_spec=spec, layer_names=own) for spec, own in groups]
        return SimpleNamespace(kv_cache_groups=made)

    assert full_group(config((window, ["a"]), (full, ["b"]), (full, ["c"]))) == 1
    with pytest.raises(SidelightError, match="pipeline stage"):
        full_group(config((window, ["a"]), (full, []), (full, ["c"])))
    with pytest.raises(SidelightError, match="all layers forget some"):
        full_group(config((window, ["a"])))
