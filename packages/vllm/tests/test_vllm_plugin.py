"""Laws of the plugin that hold without vLLM: a paged cache is played, with every trap it has."""

import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import wordings
from sidelight.cli.runtime import Runtime
from sidelight.engines.base import GenerationError, require_same_model
from sidelight.errors import FingerprintMismatchError, SidelightError
from sidelight.models.conversation import EncodedPrompt, Reads, TokenRole
from sidelight.probes.artifact import load_probe, save_probe
from sidelight.probes.bank import Bank, ProbeBanks
from sidelight.probes.mechanisms.base import mechanism_names
from sidelight.probes.probe import common_format
from sidelight.probes.standardisation import EPSILON, Projection
from sidelight_vllm import ENVIRONMENT, KEY
from sidelight_vllm.internals import Step
from sidelight_vllm.requests import (
    Tracking,
    annotated_prompt,
    read_description,
    read_report,
    request_params,
    token_hash,
)
from sidelight_vllm.settings import (
    CONNECTOR,
    PROJECTIONS,
    Served,
    fingerprint_of,
    named_folders,
    reserved_projections,
    revision_of,
)
from sidelight_vllm.slots import GatherPlan, SlotStore, StagingBuffer, set_receiver, tap_layers
from sidelight_vllm.worker import LayerProjections, RequestClassifier, Worker
from worlds.models import TOPICS, score, tiny_backbone, untrained_probe
from worlds.vllm import end_pass, followed

BLOCK = 4
BLOCKS = 24
# The same float32 products in another order.
ROUNDING = 1e-5
# Of the size that a column has by the sizes of its factors: float32's own.
PRODUCT_ROUNDING = 4e-6
WAYS = (Reads(), Reads("both"), Reads(template=False))
PROMPT = EncodedPrompt(tuple(range(10, 14)), (TokenRole.PROMPT,) * 4)
PLAN = GatherPlan("r", (1,), 0, bytes([TokenRole.PROMPT] * 4), ends_prompt=True, is_plain=False)


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


@pytest.fixture(scope="module")
def probes(backbone):
    return [
        untrained_probe(backbone, name, mechanism=name, reads=WAYS[i % len(WAYS)])
        for i, name in enumerate(mechanism_names())
    ]


@pytest.fixture(autouse=True)
def no_receiver():
    yield
    set_receiver(None)


def prompt_of(token_ids, seed=0) -> EncodedPrompt:
    token_roles = [
        TokenRole(int(p))
        for p in np.random.default_rng(seed).integers(0, len(TokenRole), len(token_ids))
    ]
    token_roles[-1] = TokenRole.PROMPT
    return EncodedPrompt(tuple(token_ids), tuple(token_roles))


def states_of(backbone, token_ids) -> torch.Tensor:
    """``[layer, token, width]``."""
    states: list[torch.Tensor] = []
    with backbone.tapped(lambda _layer, hidden: states.append(hidden[0].clone())):
        backbone.run([prompt_of(token_ids)])
    return torch.stack(states)


class Played:
    """A worker and a scheduler with a paged cache, without a model."""

    def __init__(self, probes):
        self.banks = ProbeBanks(probes)
        self.staging = StagingBuffer.empty(self.banks.projection, tokens=64)
        self.store = SlotStore(self.staging, blocks=BLOCKS, block_size=BLOCK)
        self.tracking = Tracking(reads_responses=self.banks.response_probes is not None)
        self.request_classifier = RequestClassifier(self.banks)

    def enter(self, request_id, prompt):
        self.tracking.enter(request_id, request_params(prompt), prompt.token_ids)

    def step(self, shares, *, resumed=()):
        """One pass: (request, hidden states of all its tokens, block table, start, stop) each."""
        slots, states = [], []
        for _, hidden, blocks, start, stop in shares:
            slots += [blocks[t // BLOCK] * BLOCK + t % BLOCK for t in range(start, stop)]
            states.append(hidden[:, start:stop])
        for layer, hidden in enumerate(torch.cat(states, 1)):
            self.staging.receive(layer, hidden)
        self.store.keep(torch.tensor([*slots, -1, -1]))
        steps = [
            Step(request, stop, is_resumed, blocks if is_resumed else [])
            for request, _, blocks, start, stop in shares
            for is_resumed in [request in resumed or start == 0]
        ]
        for request_id, verdicts in self.classify(self.tracking.plan(steps)).items():
            self.tracking.record(request_id, verdicts)

    def forget(self):
        """Nothing was projected for any slot: moves untouched rows to all of them."""
        for slots in torch.arange(BLOCKS * BLOCK).split(self.staging.rows.shape[1]):
            self.store.keep(slots)

    def classify(self, plans):
        return self.request_classifier.classify(plans, self.store.read(plans)) if plans else {}

    def verdicts(self, request_id):
        """As it arrives where vLLM's outputs are read."""
        report = read_report(json.loads(json.dumps(self.tracking.report(request_id))))
        report.require_verdicts()
        return report


def require_equal(probes, found, backbone, prompt):
    verdicts = {verdict.probe: verdict for verdict in found.verdicts}
    for probe, logits in zip(probes, score(backbone, Bank(probes), [prompt]), strict=True):
        wanted, actual = probe.verdict(logits[0]), verdicts[probe.name]
        values = list(wanted.probabilities.values())
        assert list(actual.probabilities.values()) == pytest.approx(values, abs=ROUNDING)
        assert actual.labels == wanted.labels


def shares_of(plan, projections):
    """Those of two stages of a pipeline, which come in no order."""
    return [
        LayerProjections(plan, 2, projections[:, 2:]),
        LayerProjections(plan, 0, projections[:, :2]),
    ]


@pytest.mark.parametrize(
    ("is_plain", "is_pipelined", "chunk"),
    [(False, False, 3), (True, False, 9), (False, True, 17), (True, True, 3)],
)
def test_response_is_classified_as_generated_and_again_after_preemption(
    backbone, probes, is_plain, is_pipelined, chunk
):
    """On plain text, probes of chats alone fail."""
    both = [probe.changed(name=f"{probe.name}-both", prompt_format="both") for probe in probes]
    scoring, failed = (both, probes) if is_plain else ([*probes, *both], [])
    response_probes = [probe for probe in scoring if probe.reads.includes_response]
    prompt_probes = [probe for probe in scoring if not probe.reads.includes_response]
    played = Played([*probes, *both])
    ids = [int(t) for t in np.random.default_rng(4).integers(5, 300, 18)]
    prompt = replace(prompt_of(ids[:9]), is_plain=is_plain)
    hidden = states_of(backbone, ids)
    played.enter("r", prompt)
    if is_pipelined:
        played.classify = lambda plans: {
            r.request_id: played.request_classifier.join(shares_of(r, played.store.read([r])))
            for r in plans
        }
    for start, stop in ((0, 9), *pairwise(range(9, 18))):
        played.step([("r", hidden, [0, 1, 2, 3, 4], start, stop)])
        verdicts = played.verdicts("r")
        assert sorted(verdicts.failed) == sorted(probe.name for probe in failed)
        require_equal(response_probes, verdicts, backbone, followed(prompt, ids[9:stop]))
        require_equal(prompt_probes, verdicts, backbone, prompt)
    played.forget()
    for start in range(0, 18, chunk):
        share = ("r", hidden, [9, 8, 7, 6, 5], start, min(18, start + chunk))
        played.step([share], resumed={"r"} if start == 0 else set())
    require_equal(response_probes, played.verdicts("r"), backbone, followed(prompt, ids[9:]))


def test_unread_projections_yield_failed_verdicts(backbone, probes):
    """Of a layer that is not tapped, and of slots that were forgotten."""
    played, names = Played(probes), sorted(probe.name for probe in probes)
    prompt = prompt_of(range(10, 18))
    hidden = states_of(backbone, prompt.token_ids)
    played.enter("r", prompt)
    played.step([("r", hidden, [0, 1], 0, 8)])
    assert played.verdicts("r").failed == ()
    # The next request's last layer is never projected: its rows are not those of the pass before.
    played.enter("s", prompt)
    for layer, states in enumerate(hidden[:-1]):
        played.staging.receive(layer, states)
    played.store.keep(torch.arange(12, 20))
    verdicts = played.classify(played.tracking.plan([Step("s", 8, True, [3, 4])]))["s"]
    assert (verdicts.verdicts, sorted(verdicts.failed)) == ((), names)
    played.enter("t", prompt)
    played.step([("t", hidden, [0, 1], 0, 7)])
    played.forget()
    played.step([("t", hidden, [0, 1], 7, 8)])
    verdicts = played.verdicts("t")
    assert (verdicts.verdicts, sorted(verdicts.failed)) == ((), names)


def projection_of(width, *, has_flags, offset=0):
    flags = (torch.arange(width) + offset) % 2 == 0 if has_flags else None
    return Projection(torch.randn(2, 577, width), torch.randn(2, width), flags)


def require_product(staging, projection, hidden, residual):
    """The columns of the last layer, with float32's error; no other row is written."""
    stream = hidden if residual is None else hidden + residual
    staging.receive(1, stream)
    stream = stream.double()
    weight, shift = projection.weight[1].double(), projection.shift[1].double()
    wanted, sizes = stream @ weight, (stream.square() @ weight.square()).sqrt()
    if projection.is_normalised is not None:
        rms = (stream.square().mean(1, keepdim=True) + EPSILON).sqrt()
        divisor = torch.where(projection.is_normalised, rms, 1)
        wanted, sizes = wanted / divisor, sizes / divisor
    off = (staging.rows[1, : len(hidden)] - (wanted + shift)).abs()
    assert (off < PRODUCT_ROUNDING * (sizes + shift.abs())).all()
    assert staging.rows[1, len(hidden) :].isnan().all()
    assert staging.rows[0].isnan().all()


@pytest.mark.parametrize("has_flags", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_staging_buffer_has_float32_error_and_loads_weights_in_place(dtype, has_flags):
    """What a captured CUDA graph asks for, as far as it can be said without a GPU."""
    torch.manual_seed(0)
    for tokens, width in ((1, 5), (33, 1), (130, 130)):
        first, second = (projection_of(width, has_flags=has_flags, offset=i) for i in (0, 1))
        weights_before = [first.weight.clone(), first.shift.clone()]
        staging = StagingBuffer.empty(first, tokens=tokens + 3)
        buffers = [staging.rows, staging.projection.weight, staging.projection.shift]
        addresses = [buffer.data_ptr() for buffer in buffers]
        hidden = torch.randn(tokens, 577).to(dtype)
        residual = (10 * torch.randn(tokens, 577) * torch.rand(tokens, 1)).to(dtype)
        require_product(staging, first, hidden, residual)
        staging.load(second)
        require_product(staging, second, hidden, None)
        assert [buffer.data_ptr() for buffer in buffers] == addresses
        # They belong to a probe.
        assert all(map(torch.equal, weights_before, (first.weight, first.shift)))
    broken = hidden.clone()
    broken[1, 3], broken[4, 0] = torch.nan, torch.inf
    plain = staging.rows[1].clone()
    staging.receive(1, broken)
    is_broken = torch.zeros(len(plain), dtype=torch.bool)
    is_broken[[1, 4]] = True
    assert not staging.rows[1, is_broken].isfinite().any()
    assert torch.equal(staging.rows[1, ~is_broken].nan_to_num(), plain[~is_broken].nan_to_num())
    # Fake tensors have shapes and no values: asking for one would raise.
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (second.weight, second.shift)]
        flags = mode.from_tensor(second.is_normalised) if has_flags else None
        StagingBuffer.empty(Projection(*fake, flags), tokens=133).receive(
            1, mode.from_tensor(hidden)
        )


class _Steps(TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    waits = ("nonzero", "_local_scalar_dense", "masked_select", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.waits), func
        assert func is not torch.ops.aten._to_copy.default or "device" not in (kwargs or {}), func
        return func(*args, **kwargs or {})


class _Captured(_Steps):
    """Refuses what a captured graph could not replay: also tensors that lie on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if torch.is_tensor(leaf)]
        assert all(tensor.is_meta for tensor in tensors), func
        return result


@pytest.mark.parametrize("has_flags", [False, True])
def test_captured_operations_stay_on_the_device(has_flags):
    """Neither a copy from the CPU nor a wait for a number may be captured."""
    staging = StagingBuffer.empty(projection_of(3, has_flags=has_flags).to("meta"), tokens=6)
    store = SlotStore(staging, blocks=2, block_size=4)
    hidden = torch.empty(5, 577, dtype=torch.bfloat16, device="meta")
    slots = torch.empty(5, dtype=torch.long, device="meta")
    with _Captured():
        staging.receive(1, hidden)
        store.keep(slots)


@pytest.fixture(scope="module")
def folders(backbone, tmp_path_factory):
    """Probes on disk, by name: two alike, two with more columns, and one of normalised states."""
    probes_by_name = {
        "old": untrained_probe(backbone, "old"),
        "new": untrained_probe(backbone, "new"),
        "both": untrained_probe(backbone, "both", reads=Reads("both")),
        "wide": untrained_probe(backbone, "wide", mechanism="attention", reads=Reads("both")),
    }
    scaling = replace(probes_by_name["old"].standardisation, is_normalised=True)
    probes_by_name["normalised"] = replace(
        probes_by_name["old"].changed(name="normalised"), standardisation=scaling
    )
    home = tmp_path_factory.mktemp("probes")
    return {name: str(save_probe(probe, home / name)) for name, probe in probes_by_name.items()}


def worker_of(backbone, *folders, start=0, projections=0):
    """Before vLLM has allocated its cache."""
    served = Served(folders, backbone.fingerprint, projections=projections)
    layers = range(start, backbone.fingerprint.layers)
    return Worker(served, layers=layers, tokens=8, device=torch.device("cpu"))


def started(*named, **options):
    worker = worker_of(*named, **options)
    worker.allocate(blocks=2, block_size=4)
    return worker


def change(worker, folder):
    worker.check([folder])
    worker.load(revision_of([load_probe(folder).version]))


@pytest.fixture
def worker(backbone, folders):
    return started(backbone, folders["old"], folders["both"])


def pass_of(worker, backbone, plans=(PLAN,), *, start=0):
    """The outcome of a pass over four tokens, in a worker that has the layers from ``start``."""
    hidden = states_of(backbone, range(10, 14))
    for layer, states in enumerate(hidden[start:]):
        worker.receive(layer, states)
    end_pass(worker, range(4, 8))
    return worker.classify(plans).result()


def test_worker_keeps_its_staging_buffer_when_the_cache_is_allocated(backbone, folders):
    """Graphs may have been captured before that: what passes through a tap lands in its pages."""
    worker = worker_of(backbone, folders["old"])
    served = Served((folders["old"],), backbone.fingerprint)
    shift = RequestClassifier.load(served).banks.projection.shift
    # One float32 number for each.
    assert worker.bytes_per_token == shift.numel() * 4
    for layer, states in enumerate(states_of(backbone, range(10, 14))):
        torch.ops.sidelight.project(states, None, layer, torch.zeros(()))
    worker.allocate(blocks=2, block_size=4)
    end_pass(worker, range(4, 8))
    (probe,) = served.load().probes
    require_equal([probe], worker.classify([PLAN]).result().by_request["r"], backbone, PROMPT)


def test_step_does_not_synchronise_with_the_device(backbone, worker):
    hidden = states_of(backbone, range(10, 14))
    with _Steps():
        for layer, states in enumerate(hidden):
            worker.receive(layer, states)
        end_pass(worker, range(4, 8))
        work = worker.classify([PLAN])
    assert len(work.result().by_request["r"].verdicts) == 2


def test_pass_without_stored_projections_fails_all_verdicts(backbone, worker):
    """Slots would hold what was there before, and a verdict would be another text's."""
    assert pass_of(worker, backbone).by_request["r"].failed == ()
    # A pass that has nothing to read, and another after it.
    worker.classify([])
    assert {*pass_of(worker, backbone).by_request["r"].failed} == {"old", "both"}


def test_failed_request_has_no_verdict_until_it_is_forgotten(backbone, worker, monkeypatch):
    later = replace(PLAN, start=3, token_roles=bytes([TokenRole.RESPONSE]), ends_prompt=False)
    with monkeypatch.context() as patch:
        # Too few arguments, so that it raises.
        patch.setattr(ProbeBanks, "read", lambda: None)
        failed = pass_of(worker, backbone).by_request["r"]
    assert (failed.verdicts, {*failed.failed}) == ((), {"old", "both"})
    assert pass_of(worker, backbone, [later]).by_request["r"] == failed
    worker.forget(["r"])
    assert pass_of(worker, backbone).by_request["r"].failed == ()


@pytest.mark.parametrize("names", [("old", "new"), ("old", "wide"), ("wide", "normalised")])
def test_new_probes_reuse_memory_but_no_old_projections(backbone, folders, names):
    first, then = (folders[name] for name in names)
    worker = started(backbone, first, projections=64)
    staging, rows = worker._staging, worker._store.rows
    for folder in (first, then, first):
        change(worker, folder)
        # A pass without a token of a text.
        end_pass(worker, [-1] * 4)
        (probe,) = Served((folder,), backbone.fingerprint).load().probes
        assert worker.classify([PLAN]).result().by_request["r"].failed == (probe.name,)
        step = pass_of(worker, backbone)
        require_equal([probe], step.by_request["r"], backbone, PROMPT)
        assert step.probes.revision == revision_of([probe.version])
        assert step.probes.reads_responses == probe.reads.includes_response
    assert worker._staging is staging
    assert worker._store.rows is rows


def test_incompatible_probes_are_rejected_and_the_old_ones_stay(backbone, folders):
    worker = started(backbone, folders["old"])
    wanted = pass_of(worker, backbone)
    for name, why in (("wide", "projections per layer"), ("normalised", "different normalisation")):
        with pytest.raises(SidelightError, match=f"{why}.* SIDELIGHT_PROJECTIONS=") as refused:
            change(worker, folders[name])
        assert pass_of(worker, backbone).by_request == wanted.by_request
        needed = int(str(refused.value).split("=")[1].split(",")[0])
        roomy = started(backbone, folders["old"], projections=needed)
        change(roomy, folders[name])
        assert not pass_of(roomy, backbone).by_request["r"].failed


def test_unchecked_probes_are_not_loaded(backbone, folders):
    worker = started(backbone, folders["old"])
    wanted = pass_of(worker, backbone)
    with pytest.raises(SidelightError, match=wordings.NOT_CHECKED):
        worker.load(revision_of([load_probe(folders["new"]).version]))
    assert pass_of(worker, backbone).by_request == wanted.by_request


def test_pipeline_stage_sends_projections_of_its_new_probes(backbone, folders):
    full, first = started(backbone, folders["wide"]), started(backbone, folders["wide"])
    last = started(backbone, folders["wide"], start=2)
    for worker in (full, last):
        change(worker, folders["new"])
        pass_of(worker, backbone, start=2 if worker is last else 0)
    (share,) = last.classify([PLAN]).result().projections
    new = Served((folders["new"],), backbone.fingerprint)
    width = RequestClassifier.load(new).banks.projection.shift.shape[1]
    assert (share.first_layer, share.projections.shape[2]) == (2, width)
    both = pass_of(full, backbone)
    mixed = pass_of(first, backbone) | last.classify([]).result()
    assert (both | last.classify([]).result()).probes == both.probes
    # Stages with different probes have no known one.
    assert mixed.probes.revision == ""


def test_layer_hooks_receive_the_full_residual_stream():
    class Split(nn.Linear):
        def forward(self, positions, hidden, residual=None):
            hidden = hidden if residual is None else hidden + residual
            return super().forward(hidden), hidden

    class Joined(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden)

    torch.manual_seed(0)
    split, joined = Split(8, 8), Joined(8, 8)
    assert tap_layers([split, joined], reads_embedding=True, width=8) == 3
    projection = Projection(torch.randn(3, 8, 2), torch.randn(3, 2))
    staging = StagingBuffer.empty(projection, tokens=6)
    passes = []
    set_receiver(SimpleNamespace(receive=staging.receive, end_pass=passes.append))
    hidden = torch.randn(5, 8)
    with torch.inference_mode():
        first, residual = split(torch.arange(5), hidden)
        last = joined(first + residual)
    assert passes == [5]
    for layer, stream in enumerate((hidden, first + residual, last)):
        wanted = stream @ projection.weight[layer] + projection.shift[layer]
        torch.testing.assert_close(staging.rows[layer, :5], wanted)
    assert staging.rows[:, 5:].isnan().all()


def test_layer_with_unexpected_output_shape_is_rejected():
    class Pooled(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden).mean(0)

    layer = Pooled(8, 8)
    tap_layers([layer], reads_embedding=False, width=8)
    with pytest.raises(SidelightError, match=wordings.CANNOT_TAP.format(name="Pooled")):
        layer(torch.randn(5, 8))


OF_THESE = {"tokens": token_hash([1, 2, 3]), "is_plain": False}


def test_prompt_description_round_trips_through_request_params():
    prompt = prompt_of(range(5, 40))
    for sent in (prompt, replace(prompt, is_plain=True)):
        params = json.loads(json.dumps(request_params(sent)))
        assert annotated_prompt(read_description(params), list(sent.token_ids)) == sent


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (None, "has no kv_transfer_params"),
        ({"token_roles": 3}, "malformed"),
        ({"token_roles": [[9, 3]], "tokens": "0", "is_plain": False}, "malformed"),
        ({"token_roles": [[1, 3]], "tokens": token_hash([1, 2, 3])}, "malformed"),
        ({"token_roles": [[1, 3]], "tokens": "0", "is_plain": False}, "different tokens"),
        ({"token_roles": [[1, 10**15]], **OF_THESE}, "different tokens"),
        ({"token_roles": [[1, 5], [1, -2]], **OF_THESE}, "malformed"),
        ("token_roles", "malformed"),
    ],
)
def test_malformed_token_descriptions_raise_an_error(params, message):
    params = params and {KEY: params}
    with pytest.raises(SidelightError, match=message):
        annotated_prompt(read_description(params), [1, 2, 3])
    tracking = Tracking(reads_responses=False)
    tracking.enter("r", params, [1, 2, 3])
    assert tracking.plan([Step("r", 3, True, [0])]) == []
    with pytest.raises(GenerationError, match=message):
        read_report(tracking.report("r")).require_verdicts()


@pytest.mark.parametrize("report", [None, 1, {}, {"verdicts": []}, {"verdicts": [{"probe": "p"}]}])
def test_incomplete_report_is_read_as_an_error(report):
    assert read_report({KEY: report}).error
    assert read_report(None).error


def test_report_before_classification_is_an_error():
    tracking, prompt = Tracking(reads_responses=False), prompt_of(range(5, 15))
    tracking.enter("r", request_params(prompt), prompt.token_ids)
    assert read_report(tracking.report("r")).error == "The request was not classified."
    tracking.leave("r")
    assert tracking.report("r") is None


def test_configuration_overrides_environment_for_probes_but_not_projections(monkeypatch):
    for name in (ENVIRONMENT, PROJECTIONS):
        monkeypatch.delenv(name, raising=False)
    assert (named_folders({}), reserved_projections()) == (None, 0)
    assert named_folders({"probes": []}) == ()
    monkeypatch.setenv(ENVIRONMENT, "a:b")
    monkeypatch.setenv(PROJECTIONS, "64")
    assert (named_folders({}), reserved_projections()) == (("a", "b"), 64)
    assert named_folders({"probes": ["c"]}) == ("c",)
    monkeypatch.setenv(PROJECTIONS, "-1")
    with pytest.raises(
        SidelightError, match=wordings.SETTING_IS.format(name=PROJECTIONS, value="'-1'")
    ):
        reserved_projections()


def test_served_probes_survive_json_and_must_match_the_model(backbone, tmp_path):
    probe = untrained_probe(backbone, "topics", task=TOPICS)
    folder = str(save_probe(probe, tmp_path / "topics"))
    served = Served((folder,), backbone.fingerprint, is_annotated=True, projections=7)
    extra = json.loads(json.dumps(served.to_json()))
    transfer = SimpleNamespace(kv_connector=CONNECTOR, kv_connector_extra_config=extra)
    again = Served.of(SimpleNamespace(kv_transfer_config=transfer))
    assert again == served
    assert [probe.name for probe in again.load().probes] == ["topics"]
    with pytest.raises(SidelightError, match=wordings.DISTINCT_NAMES):
        replace(served, folders=(folder, folder)).load()
    with pytest.raises(FingerprintMismatchError):
        replace(served, fingerprint=replace(backbone.fingerprint, weights="0")).load()


def test_every_engine_rejects_mixed_chat_and_raw_text_probes(backbone, tmp_path):
    chat = untrained_probe(backbone, "chat")
    raw, both = (chat.changed(name=name, prompt_format=name) for name in ("raw", "both"))
    folders = [str(save_probe(probe, tmp_path / probe.name)) for probe in (chat, raw)]
    for serve in (
        lambda: Runtime(model=None, dtype="auto", device="auto").load_engine([chat, raw]),
        lambda: fingerprint_of("smollm2", folders),
        lambda: require_same_model([chat, raw], backbone.fingerprint),
        lambda: common_format([raw, both]),
    ):
        with pytest.raises(SidelightError, match=wordings.NOT_TOGETHER):
            serve()
    formats = [common_format(probes) for probes in ([], [raw, raw], [both], [chat, both])]
    assert formats == [None, "raw", "chat", "chat"]
