"""What works on the CPU works on another device with the same numbers, shown without a GPU."""

import json
from contextlib import suppress

import numpy as np
import pytest
import torch

import wordings
from sidelight.classifier import Classifier
from sidelight.data.examples import Example
from sidelight.engines.transformers.backbone import TransformersBackbone
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.models.conversation import EncodedPrompt, Message, Reads, TokenRole
from sidelight.policy.rules import Policy, Rule
from sidelight.probes.artifact import load_probe, save_probe
from sidelight.probes.bank import Bank, ProbeBanks
from sidelight.probes.mechanisms.base import mechanism_names, mechanism_spec
from sidelight.probes.standardisation import Standardisation
from sidelight.states.extraction import text_logits
from sidelight.training.loop import train_mechanisms
from sidelight.training.preparing import ProbeDataset
from sidelight.training.settings import TrainingSettings
from sidelight_vllm.settings import Served, revision_of
from sidelight_vllm.slots import GatherPlan, set_receiver
from sidelight_vllm.worker import Worker
from worlds.data import encoded, planted_rows, span_rows, split_of
from worlds.models import saved, spans_probe, tiny_backbone, untrained_probe
from worlds.pretended_device import CPU, FIRST, SECOND, pretended
from worlds.servers import cli, in_process
from worlds.vllm import end_pass

# The numbers are computed by the same kernels, in batches of the same shapes.
ROUNDING = 1e-6
# Of probabilities after two epochs in bfloat16 and a calibration.
TRAINED = 1e-3
TEXTS = ["Who is Ann?", "a", "It rains in the mountains, they say."]
every_mechanism = pytest.mark.parametrize("mechanism", mechanism_names())


def on(device: torch.device) -> TransformersBackbone:
    backbone = tiny_backbone()
    backbone.model.to(device)
    return backbone


@pytest.fixture(autouse=True)
def one_arithmetic(monkeypatch):
    """Training in bfloat16 on both devices, also where a CPU would rather train in float32."""
    monkeypatch.setattr("sidelight.training.loop.lacks_bfloat16", lambda device: False)


@pytest.fixture(scope="module")
def there():
    """The tiny backbone on the pretended device, for the tests of this file."""
    with pretended():
        yield on(FIRST)


@pytest.fixture
def pretending():
    with pretended():
        yield


def loaded(backbone, name, folder, **options):
    """A probe of this mechanism as a server loads it: from its folder."""
    probe = (
        spans_probe(backbone, name)
        if name == "spans"
        else untrained_probe(backbone, name, mechanism=name, **options)
    )
    return load_probe(save_probe(probe, folder / name))


# The device itself.


def test_pretended_device_enforces_gpu_rules(pretending):
    there, here = torch.ones(3, 2, device=FIRST), torch.ones(3, 2)
    rows = torch.tensor([0, 2])
    assert {there.device, (there + 1).device, (there @ here.T.to(FIRST)).device} == {FIRST}
    assert torch.tensor([1, 2], device=FIRST).device == there.new_tensor([1, 2]).device == FIRST
    assert torch.zeros(3).device == torch.arange(3).device == CPU
    # A number without dimensions and an index may lie on the CPU.
    assert (there * torch.tensor(2.0)).device == there[rows].device == there[[0, 2]].device == FIRST
    for mixed in (
        lambda: there + here,
        lambda: here.index_select(0, rows.to(FIRST)),
        lambda: here[rows.to(FIRST)],
        lambda: there.index_select(0, rows),
        lambda: torch.cat([here, there]),
        lambda: torch.where(there > 0, there, here),
        lambda: there + torch.ones(2, device=SECOND),
        lambda: torch.rand(3, device=FIRST, generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError, match=wordings.PRETENDED_DEVICE):
            mixed()
    for array in (there.numpy, lambda: np.asarray(there), there.to(SECOND).double):
        with pytest.raises(TypeError):
            array()
    # A copy elsewhere has a memory of its own.
    copy = here.to(FIRST)
    copy.zero_()
    assert here.all()
    assert not copy.cpu().any()


# Probes and banks.


@every_mechanism
def test_bank_of_any_mechanism_runs_on_meta_device(tiny, tmp_path, mechanism):
    """Shapes without numbers: enough to see a tensor that was left on the CPU."""
    probe = loaded(tiny, mechanism, tmp_path)
    for bank in (Bank([probe], device="meta"), ProbeBanks([probe], device="meta").prompt_probes):
        tap = bank.tap()
        who = tiny.fingerprint
        for layer in range(who.layers):
            tap(layer, torch.zeros(2, 5, who.width, dtype=torch.bfloat16, device="meta"))
        projections = tap.projected()
        assert projections.device.type == "meta"
        assert projections.shape == (2, 5, who.layers, bank.projection.shift.shape[1])
        assert projections.dtype == torch.float32


@every_mechanism
@pytest.mark.parametrize("device", [FIRST, SECOND], ids=str)
def test_every_mechanism_matches_cpu_verdicts_and_explanations(
    pretending, tiny, tmp_path, mechanism, device
):
    """The second device has no float64."""
    results = []
    for backbone in (tiny, on(device)):
        probe = loaded(tiny, mechanism, tmp_path)
        logits = text_logits(backbone, Bank([probe], device=backbone.device), encoded(tiny, TEXTS))[
            0
        ]
        why = Classifier(backbone, probe).explain(Example((Message("user", TEXTS[0]),)))
        tokens = [text.tokens for text in logits if text.tokens is not None]
        results.append([*(text.logits for text in logits), *tokens, why.shares])
        assert len(tokens) == len(TEXTS) * (mechanism == "spans")
    for wanted, actual in zip(*results, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=ROUNDING)


# Training.


@pytest.mark.slow
def test_every_trained_mechanism_matches_cpu(there, tiny, tmp_path):
    settings = TrainingSettings(learning_rate=1e-2, epochs=2, batch_size=20, least_steps=0)
    candidates = [(mechanism_spec(name), settings) for name in mechanism_names()]
    results = []
    for backbone in (tiny, there):
        folder = tmp_path / backbone.device.type
        training, validation = (
            split_of(backbone, folder, "binary", count, seed=count) for count in (60, 30)
        )
        dataset = ProbeDataset.held_out(backbone, training, validation)
        results.append(
            train_mechanisms(
                candidates,
                split=dataset.split,
                left_out=dataset.left_out,
                device=backbone.device,
            )
        )
    for (spec, _), wanted, actual in zip(candidates, *results, strict=True):
        np.testing.assert_allclose(actual.logits, wanted.logits, atol=1e-3, err_msg=str(spec))


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """A backbone on disk, and labelled files."""
    home = tmp_path_factory.mktemp("files")
    asked = [{**row, "asked": f"Question {i}?"} for i, row in enumerate(planted_rows("binary", 60))]
    row_sets = {"train": asked, "new": planted_rows("binary", 40, seed=1), "spans": span_rows(40)}
    for name, lines in row_sets.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIDELIGHT_CACHE", str(home / "cache"))
        saved(tiny, home / "model")
        yield home


def command(home, *arguments, device="pretend"):
    device_options = ["--model", str(home / "model"), "--device", device]
    assert cli(*map(str, arguments), *device_options) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["texts", "responses", "spans"])
def test_command_line_training_and_predictions_match_cpu(there, files, tmp_path, capsys, kind):
    """Few texts: cross-fitted, in contexts of background traffic, and calibrated."""
    quickly = {"epochs": 2, "batch_size": 16, "learning_rate": 0.03, "context_tokens": 4000}
    settings = [word for pair in quickly.items() for word in ("--set", "{}={}".format(*pair))]
    train, new, spans = (files / f"{name}.jsonl" for name in ("train", "new", "spans"))
    options = {
        "texts": [],
        "responses": ["--text", "asked", "--response", "text"],
        "spans": ["--spans", "spans"],
    }[kind]
    results = []
    for device in ("cpu", "pretend"):
        probe, data = tmp_path / device, spans if kind == "spans" else train
        command(files, "train", "--data", data, *options, *settings, "--out", probe, device=device)
        if kind == "texts":
            command(files, "eval", probe, "--data", new, device=device)
            command(files, "recalibrate", probe, "--data", new, "--force", device=device)
        read = ["--data", train, *options] if kind == "responses" else [*TEXTS, "--explain"]
        capsys.readouterr()
        command(files, "predict", probe, *read, device=device)
        lines = map(json.loads, capsys.readouterr().out.splitlines())
        results.append([value for line in lines for value in line["probabilities"].values()])
    wanted, actual = results
    np.testing.assert_allclose(actual, wanted, atol=TRAINED)


# Serving.

CHAT = {"model": "tiny/llama", "temperature": 0, "max_tokens": 12}
CHATS = "/v1/chat/completions"


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    home = tmp_path_factory.mktemp("probes")
    probes = [
        untrained_probe(tiny, "toxicity"),
        untrained_probe(tiny, "answers", reads=Reads("response"), mechanism="gate"),
        spans_probe(tiny, "words", side="response"),
        spans_probe(tiny, "early"),
    ]
    return {probe.name: save_probe(probe, home / probe.name) for probe in probes}


def without_chance(answer):
    """Status and body, without what differs from request to request."""
    drawn = {"id", "created", "request_id", "timing", "probe_seconds"}

    def deterministic(value):
        if isinstance(value, dict):
            return {key: deterministic(each) for key, each in value.items() if key not in drawn}
        if isinstance(value, list):
            return [deterministic(each) for each in value]
        return round(value, 4) if isinstance(value, float) else value

    return answer.status_code, deterministic(answer.json())


@pytest.mark.slow
def test_server_answers_match_cpu(there, tiny, folders):
    """Chats, among them one that is blocked and one that is redacted; checks; other probes."""
    probes = [load_probe(folder) for folder in folders.values()]
    policy = Policy(
        input={"toxicity": Rule("block", threshold=0.5)}, output={"words": Rule("redact")}
    )
    requests = [
        *((CHATS, {**CHAT, "messages": [{"role": "user", "content": text}]}) for text in TEXTS),
        ("/v1/moderations", {"input": TEXTS}),
        ("/v1/redact", {"input": TEXTS[0]}),
        ("/v1/completions", {**CHAT, "prompt": TEXTS[2], "n": 2, "temperature": 1, "seed": 3}),
    ]
    results = []
    for backbone in (tiny, there):
        engine = TransformersEngine(backbone, probes)
        key = {"Authorization": "Bearer admin"}
        with in_process(
            engine, policy=policy, probe=[*folders.values()], admin_key=("admin",)
        ) as http:
            answers = [http.post(path, json=body, headers=key) for path, body in requests]
            changed = http.put(
                "/admin/probes",
                json={"probe": [str(folder) for folder in folders.values()]},
                headers=key,
            )
            assert changed.status_code == 200, changed.text
            answers.append(http.post(requests[0][0], json=requests[0][1], headers=key))
            results.append([without_chance(answer) for answer in answers])
    wanted, actual = results
    assert actual == wanted
    assert {status for status, _ in actual} == {200, 400}


# Inside vLLM.

PROMPT = EncodedPrompt(tuple(range(10, 14)), (TokenRole.PROMPT,) * 4)
PLAN = GatherPlan("r", (1,), 0, bytes([TokenRole.PROMPT] * 4), ends_prompt=True, is_plain=False)


@pytest.fixture
def no_receiver():
    yield
    set_receiver(None)


def worker_verdicts(backbone, *named):
    """The verdicts of a worker on the backbone's device, with one probe after another."""
    first = Served((str(named[0]),), backbone.fingerprint, projections=64)
    layers = range(backbone.fingerprint.layers)
    worker = Worker(first, layers=layers, tokens=8, device=backbone.device)
    worker.allocate(blocks=2, block_size=4)
    answers = []
    for folder in named:
        worker.check([str(folder)])
        worker.load(revision_of([load_probe(folder).version]))
        with backbone.tapped(lambda layer, hidden: worker.receive(layer, hidden[0])):
            backbone.run([PROMPT])
        end_pass(worker, range(4, 8), device=backbone.device)
        answers.append(worker.classify([PLAN]).result().by_request["r"])
    return answers


def test_vllm_worker_verdicts_match_cpu(there, tiny, folders, no_receiver):
    """Its streams and events are those of the device."""
    named = [folders["toxicity"], folders["early"], folders["toxicity"]]
    results = [worker_verdicts(backbone, *named) for backbone in (tiny, there)]
    for wanted, actual in zip(*results, strict=True):
        assert (wanted.failed, actual.failed) == ((), ())
        for one, another in zip(wanted.verdicts, actual.verdicts, strict=True):
            assert [*another.probabilities.values()] == pytest.approx(
                [*one.probabilities.values()], abs=ROUNDING
            )
            assert another.spans == one.spans


# The device sees a fault.


@pytest.mark.parametrize(
    ("owner", "name", "faulty"),
    [
        (Standardisation, "to", lambda self, _device: self),
        (torch.Tensor, "cpu", lambda self: self),
        (Worker, "_projection", lambda self, banks: banks.projection.to("cpu")),
    ],
    ids=["a buffer left behind", "an array too early", "a tensor made without a device"],
)
def test_planted_device_fault_is_detected(
    there, folders, no_receiver, monkeypatch, owner, name, faulty
):
    assert worker_verdicts(there, folders["toxicity"])[0].verdicts
    monkeypatch.setattr(owner, name, faulty)
    # A worker that is loaded fails closed: it logs the error, and there is no verdict.
    with suppress(RuntimeError, TypeError):
        assert worker_verdicts(there, folders["toxicity"])[0].failed
