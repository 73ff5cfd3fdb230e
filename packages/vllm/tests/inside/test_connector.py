"""Laws of the connector, without an engine."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import wordings
from sidelight.errors import SidelightError
from sidelight.models.conversation import EncodedPrompt, Reads, TokenRole
from sidelight.probes.artifact import save_probe
from sidelight.probes.bank import ProbeBanks
from sidelight_vllm.internals import Step, full_group, steps_of
from sidelight_vllm.requests import Tracking, read_report, request_params
from sidelight_vllm.settings import Served
from sidelight_vllm.worker import LayerProjections, Loaded, RequestClassifier, StepVerdicts
from worlds.models import tiny_backbone, untrained_probe


def test_results_after_a_request_ends_leave_no_state():
    """Under pipeline parallel a step may still run when its request ends."""
    from sidelight_vllm.connector import ProbeConnector, WorkerResults

    banks = ProbeBanks([untrained_probe(tiny_backbone(), "late", reads=Reads("both"))])
    classifier = RequestClassifier(banks, Loaded(revision="old"))
    tracking = Tracking(reads_responses=True)
    prompt = EncodedPrompt((5, 6, 7), (TokenRole.PROMPT,) * 3)
    for request_id in ("ended", "running"):
        tracking.enter(request_id, request_params(prompt), prompt.token_ids)
    steps = [Step(request_id, 3, True, [0]) for request_id in ("ended", "running")]
    projections = torch.zeros(3, 4, classifier.banks.projection.weight.shape[-1])
    shares = [LayerProjections(plan, 0, projections) for plan in tracking.plan(steps)]
    tracking.leave("ended")
    connector = object.__new__(ProbeConnector)
    connector.tracking, connector._classifier = tracking, classifier
    connector.take(WorkerResults(StepVerdicts(projections=shares, probes=classifier.loaded)))
    assert list(classifier._states) == ["running"]
    read_report(tracking.report("running")).require_verdicts()


def test_scheduler_uses_probes_of_its_workers_or_returns_no_verdict(tmp_path):
    from sidelight_vllm.connector import ProbeConnector, WorkerResults

    backbone = tiny_backbone()
    probes = [untrained_probe(backbone, name) for name in ("old", "new")]
    served = [
        Served((str(save_probe(probe, tmp_path / probe.name)),), backbone.fingerprint)
        for probe in probes
    ]
    classifier = RequestClassifier.load(served[0])
    old, new = classifier.loaded, RequestClassifier.load(served[1]).loaded
    prompt = EncodedPrompt((5, 6, 7), (TokenRole.PROMPT,) * 3)
    projections = torch.zeros(
        3, backbone.fingerprint.layers, classifier.banks.projection.weight.shape[-1]
    )
    connector = object.__new__(ProbeConnector)
    connector._served, connector._classifier = served[0], classifier

    def classified_after(loaded):
        connector.tracking = Tracking(reads_responses=False)
        connector.tracking.enter("r", request_params(prompt), prompt.token_ids)
        shares = [
            LayerProjections(r, 0, projections)
            for r in connector.tracking.plan([Step("r", 3, True, [0])])
        ]
        connector.take(WorkerResults(StepVerdicts(projections=shares, probes=loaded)))
        report = read_report(connector.tracking.report("r"))
        assert report.revision == loaded.revision
        return {verdict.probe for verdict in report.verdicts}

    assert classified_after(old) == {"old"}
    assert classified_after(new) == {"new"}
    # Stages that differ, a folder that is gone, and one that holds something else by now.
    assert classified_after(Loaded()) == set()
    assert classified_after(replace(old, folders=(str(tmp_path / "gone"),))) == set()
    assert classified_after(replace(old, folders=new.folders)) == set()
    assert classified_after(old) == {"old"}


def test_block_table_grows_restarts_after_preemption_and_ends_with_request():
    """Beside a connector without groups, vLLM ends requests by another method."""
    from sidelight_vllm.connector import ProbeConnector

    prompt = EncodedPrompt(tuple(range(5)), (TokenRole.PROMPT,) * 5)
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
        connector.tracking, connector._classifier = tracking, RequestClassifier(ProbeBanks([]))
        getattr(connector, end)(SimpleNamespace(request_id="r"), blocks)
        assert "r" not in tracking


def test_pipeline_stage_missing_an_attention_kind_is_rejected():
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    sizes = {"block_size": 16, "num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
    full, window = FullAttentionSpec(**sizes), SlidingWindowSpec(**sizes, sliding_window=8)

    def config(*groups):
        groups_of_config = [
            SimpleNamespace(kv_cache_spec=spec, layer_names=layers) for spec, layers in groups
        ]
        return SimpleNamespace(kv_cache_groups=groups_of_config)

    assert full_group(config((window, ["a"]), (full, ["b"]), (full, ["c"]))) == 1
    with pytest.raises(SidelightError, match=wordings.STAGE_MISSING):
        full_group(config((window, ["a"]), (full, []), (full, ["c"])))
    with pytest.raises(SidelightError, match=wordings.CACHE_FORGETS):
        full_group(config((window, ["a"])))
