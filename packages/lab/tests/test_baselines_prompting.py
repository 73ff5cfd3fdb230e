"""Baselines that ask the backbone by prompting."""

import numpy as np
import pytest
import torch
from planted_data import dataset_without_states

import wordings
from sidelight.errors import SidelightError
from sidelight.models.conversation import Message
from sidelight_lab.baselines.prompting import FewShot, ZeroShot, score_answers

pytestmark = pytest.mark.slow
# float32 sums in another order.
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def dataset(tiny, tmp_path_factory):
    return dataset_without_states(tiny, tmp_path_factory.mktemp("states"))


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_prompting_supports_multiclass_and_multilabel_tasks(tiny, tmp_path, kind):
    dataset = dataset_without_states(tiny, tmp_path, kind, training=24, validation=12)
    for baseline in (ZeroShot(), FewShot(shots=3, max_tokens=250)):
        logits = baseline.fit(dataset, seed=0).logits(dataset.validation)
        assert logits.shape == (12, 3)
        assert np.isfinite(logits).all()


def one_pass(backbone, prompt, answer):
    """The mean log-probability of the answer's tokens, by a literal pass over both."""
    with torch.inference_mode():
        logits = backbone.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
    chances = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return chances[range(len(answer)), answer].mean().item()


def test_score_answers_matches_one_pass_per_answer(tiny):
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


def test_zero_shot_logits_are_log_odds_of_label_names(dataset):
    few = dataset.validation.select(range(5))
    found = ZeroShot(names=("good", "bad"), question="How?").fit(dataset, seed=0).logits(few)
    for row, text in enumerate(few.texts):
        asked = f"How? Answer with one of: good, bad.\n\nText: {text}"
        prompt = dataset.reader.encoder.encode([Message("user", asked)]).token_ids
        good, bad = (
            one_pass(dataset.reader, prompt, dataset.reader.tokenizer(name)["input_ids"])
            for name in ("good", "bad")
        )
        assert found[row, 0] == pytest.approx(bad - good, abs=ROUNDING)
    with pytest.raises(
        SidelightError, match=wordings.TASK_HAS_LABELS.format(count=2, labels="fine, toxic")
    ):
        ZeroShot(names=("bad",)).fit(dataset, seed=0)


def test_few_shot_examples_are_balanced_and_drawn_by_seed(dataset):
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
