"""Baselines that ask a model: the backbone by prompting, others by URL."""

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from planted_data import dataset_without_states

from live import running, served
from sidelight.bank import Bank
from sidelight.engines.transformers import TransformersEngine
from sidelight.errors import SidelightError, VerdictError
from sidelight.prompts import Message
from sidelight.states.extraction import score
from sidelight_lab.baselines.endpoints import GuardEndpoint, ModerationEndpoint
from sidelight_lab.baselines.prompting import FewShot, ZeroShot, score_answers
from tiny import untrained_probe

pytestmark = pytest.mark.slow
# float32 sums in another order.
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def dataset(tiny, tmp_path_factory):
    return dataset_without_states(tiny, tmp_path_factory.mktemp("states"))


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_prompting_takes_every_kind_of_task_and_an_endpoint_a_binary_one(tiny, tmp_path, kind):
    dataset = dataset_without_states(tiny, tmp_path, kind, training=24, validation=12)
    for baseline in (ZeroShot(), FewShot(shots=3, max_tokens=250)):
        logits = baseline.fit(dataset, seed=0).logits(dataset.validation)
        assert logits.shape == (12, 3)
        assert np.isfinite(logits).all()
    url = "http://x/v1"
    for endpoint in (ModerationEndpoint(url=url), GuardEndpoint(url=url, model="g")):
        with pytest.raises(SidelightError, match=f"{kind} with labels x, y, z"):
            endpoint.fit(dataset, seed=0)


def one_pass(backbone, prompt, answer):
    """The mean log-probability of the answer's tokens, by a literal pass over both."""
    with torch.inference_mode():
        logits = backbone.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
    chances = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return chances[range(len(answer)), answer].mean().item()


def test_answers_score_as_by_one_pass_each(tiny):
    random = np.random.default_rng(0)
    shared = [1, 7, 9]
    prompts = [shared + random.integers(5, 300, size).tolist() for size in (4, 9, 1, 6)]
    # Two are identical to the shared beginning.
    prompts += [shared, shared]
    answers = [[10], [11, 12], [13, 14, 15]]
    expected = [[one_pass(tiny, prompt, answer) for answer in answers] for prompt in prompts]
    for some in (slice(None), slice(-2, None)):
        found = score_answers(tiny, prompts[some], answers)
        np.testing.assert_allclose(found, expected[some], atol=ROUNDING)


def test_zero_shot_is_the_log_odds_of_the_names(dataset):
    few = dataset.validation.select(range(5))
    found = ZeroShot(names=("good", "bad"), question="How?").fit(dataset, seed=0).logits(few)
    for row, text in enumerate(few.texts):
        asked = f"How? Answer with one of: good, bad.\n\nText: {text}"
        prompt = dataset.backbone.encoder.encode([Message("user", asked)]).token_ids
        good, bad = (
            one_pass(dataset.backbone, prompt, dataset.backbone.tokenizer(name)["input_ids"])
            for name in ("good", "bad")
        )
        assert found[row, 0] == pytest.approx(bad - good, abs=ROUNDING)
    with pytest.raises(SidelightError, match="2 labels: fine, toxic"):
        ZeroShot(names=("bad",)).fit(dataset, seed=0)


def test_shots_are_balanced_and_drawn_by_seed(dataset):
    def shots(seed):
        return FewShot(shots=6).examples(dataset, seed=seed)

    answers = [answer for _, answer in shots(0)]
    assert sorted(answers) == ["fine"] * 3 + ["toxic"] * 3
    assert len({text for text, _ in shots(0)}) == 6
    assert {text for text, _ in shots(0)} <= set(dataset.training.texts)
    assert shots(0) == shots(0) != shots(1)
    for text, answer in shots(0):
        assert ("X" in text) == (answer == "toxic")
    turns = FewShot().turns("own text", dataset.task.labels, shots(0)[:2])
    users = [turn.content for turn in turns if turn.role == "user"]
    assert len(users) == 3
    assert users[-1].endswith("own text")
    assert all("fine, toxic" in text for text in users)


@contextmanager
def listening(app):
    """The base URL of a live application on loopback."""
    with running(uvicorn.Config(app, log_level="warning", ws="none")) as address:
        yield f"{address}/v1"


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
        message = {"role": "assistant", "content": content}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        if body.get("logprobs"):
            top = [("un", unsafe), ("safe", 0.9 - unsafe * 0.9), (" Yes", 0.01), ("What", 0.01)]
            entries = [{"token": t, "logprob": math.log(p)} for t, p in top]
            blank = {"token": "\n\n", "logprob": 0.0, "top_logprobs": [entries[0]]}
            choice["logprobs"] = {"content": [blank, {**entries[0], "top_logprobs": entries}]}
        return {"id": "1", "object": "chat.completion", "created": 0, "model": "g",
                "choices": [choice]}  # fmt: skip

    return app


def test_a_guard_scores_by_its_log_probabilities(dataset, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    seen = []
    with listening(guard_app(seen=seen)) as url:
        logits = GuardEndpoint(url=url, model="g").fit(dataset, seed=0).logits(dataset.validation)
    bad = math.log(0.91) - math.log(0.09)
    fine = math.log(0.21) - math.log(0.72)
    expected = [bad if "X" in text else fine for text in dataset.validation.texts]
    np.testing.assert_allclose(logits[:, 0], expected)
    assert {key for key, _ in seen} == {"Bearer none"}


def test_a_guard_without_log_probabilities_gives_a_sign(dataset, monkeypatch):
    monkeypatch.setenv("GUARD_KEY", "secret")
    seen = []
    with listening(guard_app(seen=seen)) as url:
        guard = GuardEndpoint(
            url=url, model="g", prompt="Unsafe? {text} {x}", key_env="GUARD_KEY", alternatives=0
        )
        logits = guard.fit(dataset, seed=0).logits(dataset.validation)
    assert np.array_equal(logits[:, 0] > 0, dataset.validation.labels == 1)
    assert np.isfinite(logits).all()
    assert {key for key, _ in seen} == {"Bearer secret"}
    for _, body in seen:
        assert body["messages"][0]["content"].startswith("Unsafe? t")
        assert body["messages"][0]["content"].endswith(" {x}")
        assert "logprobs" not in body


def test_a_guard_that_does_not_answer_is_an_error(dataset):
    with listening(guard_app(seen=[])) as url:
        guard = GuardEndpoint(url=url, model="g", prompt="mumble {text}", alternatives=0)
        fitted = guard.fit(dataset, seed=0)
        with pytest.raises(VerdictError, match="60 of 60 answers"):
            fitted.logits(dataset.validation)


def test_a_failing_guard_is_asked_again(dataset):
    few = dataset.validation.select(range(4))
    with listening(guard_app(seen=[], fails=1)) as url:
        assert GuardEndpoint(url=url, model="g").fit(dataset, seed=0).logits(few).shape == (4, 1)
    with listening(guard_app(seen=[], fails=99)) as url:
        fitted = GuardEndpoint(url=url, model="g", retries=0).fit(dataset, seed=0)
        with pytest.raises(SidelightError, match=f"{url} answered 503") as raised:
            fitted.logits(few)
    assert not any(text in str(raised.value) for text in few.texts)
    with pytest.raises(SidelightError, match="Cannot reach"):
        GuardEndpoint(url=url, model="g", retries=0).fit(dataset, seed=0).logits(few)


def test_a_moderation_endpoint_gives_the_log_odds_of_its_scores(tiny, dataset, monkeypatch):
    """Against our own server, whose probe's logits are known."""
    monkeypatch.setenv("GUARD_KEY", "secret")
    monkeypatch.setenv("WRONG_KEY", "confidential")
    probes = [untrained_probe(tiny, "toxicity"), untrained_probe(tiny, "other")]
    few = dataset.validation.select(range(6))
    toxicity, other = score(tiny, Bank(probes), few.prompts)
    with served(TransformersEngine(tiny, probes), api_key="secret") as address:

        def logits(key_env="GUARD_KEY", **options):
            endpoint = ModerationEndpoint(url=f"{address}/v1", key_env=key_env, **options)
            return endpoint.fit(dataset, seed=0).logits(few)

        named, highest = logits(category="toxicity/toxic"), logits(concurrency=1)
        with pytest.raises(SidelightError, match="Did you mean 'toxicity/toxic'"):
            logits(category="toxicity")
        # A key that is refused is named, and not shown.
        with pytest.raises(SidelightError, match=r"key into .* WRONG_KEY") as raised:
            logits("WRONG_KEY")
    assert "confidential" not in str(raised.value)
    np.testing.assert_allclose(named, toxicity, atol=ROUNDING)
    np.testing.assert_allclose(highest, np.maximum(toxicity, other), atol=ROUNDING)
