"""Fine-tuned baselines: they learn, count what they fit, and keep the best epoch."""

import json

import numpy as np
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from planted_data import dataset_without_states, tiny_bert
from sklearn.metrics import roc_auc_score
from torch import nn
from transformers import BertModel

import wordings
from sidelight.errors import SidelightError
from sidelight.models.conversation import Reads
from sidelight.training.optimisation import validation_score
from sidelight.training.preparing import ProbeDataset
from sidelight_lab.baselines import fine_tuning
from sidelight_lab.baselines.encoders import Encoder, SentenceEmbeddings
from sidelight_lab.baselines.fine_tuning import (
    FineTunedEncoder,
    Lora,
    SequenceClassifier,
    prompt_items,
    score_items,
)

# Whole models run in bf16: 8 bits of mantissa, a few roundings deep.
BF16 = 0.05
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("temporary_cache")]
QUICK = {"epochs": 6, "batch_size": 16, "learning_rate": 1e-2}
BRIEF = {**QUICK, "epochs": 2}


@pytest.fixture(scope="module")
def dataset(tiny, tmp_path_factory):
    return dataset_without_states(tiny, tmp_path_factory.mktemp("states"))


def test_lora_learns_counts_parameters_and_restores_the_backbone(dataset):
    backbone = dataset.reader

    def hooks():
        return sum(len(module._forward_hooks) for module in backbone.model.modules())

    # transformers leaves hooks of its own where a test asked for all hidden states before.
    hooks_before = hooks()
    before = {name: weight.clone() for name, weight in backbone.model.state_dict().items()}
    fitted = Lora(**QUICK).fit(dataset, seed=0)
    logits = fitted.logits(dataset.validation)
    assert logits.shape == (60, 1)
    assert roc_auc_score(dataset.validation.labels, logits[:, 0]) > 0.95
    layers = [m for m in backbone.model.base_model.modules() if isinstance(m, nn.Linear)]
    adapters = sum(16 * (layer.in_features + layer.out_features) for layer in layers)
    assert fitted.parameters == adapters + 32 + 1
    weights = backbone.model.state_dict()
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert not any(isinstance(m, BaseTunerLayer) for m in backbone.model.modules())
    assert hooks() == hooks_before
    assert not any(p.requires_grad for p in backbone.model.parameters())


def subset_of(dataset, count):
    return ProbeDataset.held_out(
        dataset.reader, dataset.training.select(range(count)), dataset.validation
    )


def test_fine_tuning_keeps_the_best_epoch(dataset, tmp_path):
    """With a rate that makes the head jump: the last epoch is not the best."""
    torch.manual_seed(0)
    model = SequenceClassifier(dataset.reader.model.base_model, dataset)
    tuning = Lora(learning_rate=0.5, epochs=6)
    fitted = tuning.tune(model, dataset, prompt_items, folder=tmp_path, seed=0)
    log = json.loads((tmp_path / "checkpoint-30" / "trainer_state.json").read_text())["log_history"]
    scores = [entry["eval_score"] for entry in log if "eval_score" in entry]
    assert len(scores) == 6 > 1 + scores.index(max(scores))
    logits = fitted.logits(dataset.validation)
    found = validation_score(dataset.task, logits, dataset.validation.labels)
    # Batches differ, and the body runs in bf16.
    assert found == pytest.approx(max(scores), abs=0.01)


def test_gradient_accumulation_matches_a_single_pass(dataset, tmp_path, monkeypatch):
    subset = subset_of(dataset, 32)
    lora = Lora(epochs=1, batch_size=16, dropout=0.0)
    untrained, another = (
        np.stack(score_items(lora.adapted(subset, seed=seed), prompt_items(subset.validation)))
        for seed in (0, 1)
    )
    assert not np.array_equal(untrained, another)
    found = []
    for tokens in (10_000, 100):
        monkeypatch.setattr(fine_tuning, "_PASS_TOKENS", tokens)
        model, folder = lora.adapted(subset, seed=0), tmp_path / str(tokens)
        fitted = lora.tune(model, subset, prompt_items, seed=0, folder=folder)
        found.append(fitted.logits(subset.validation))
        assert [*folder.glob("checkpoint-2")]
    # Sums of gradients in another order, of bf16 products.
    assert np.abs(found[0] - found[1]).max() < 0.1 * np.abs(found[0] - untrained).max()


def test_diverged_fine_tuning_error_names_learning_rate(dataset):
    lora = Lora(learning_rate=1e30, batch_size=4)
    with pytest.raises(SidelightError, match=wordings.BASELINE_DIVERGED.format(rate=r"1e\+30")):
        lora.fit(subset_of(dataset, 16), seed=0)


def test_scores_do_not_depend_on_batching(dataset):
    body = dataset.reader.model.base_model
    model = SequenceClassifier(body, dataset).eval()
    together = score_items(model, prompt_items(dataset.validation))
    for row, prompt in enumerate(dataset.validation.states.prompts[:6]):
        with torch.inference_mode():
            hidden = body(input_ids=torch.tensor([prompt.token_ids])).last_hidden_state[0]
            read = hidden[prompt.mask(Reads())]
            single = model.head(read.mean(0))
        np.testing.assert_allclose(together[row], single, atol=BF16)


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_lora_supports_multiclass_and_multilabel_tasks(tiny, tmp_path, kind):
    dataset = dataset_without_states(tiny, tmp_path, kind, training=24, validation=12)
    logits = Lora(epochs=1).fit(dataset, seed=0).logits(dataset.validation)
    assert logits.shape == (12, 3)
    assert np.isfinite(logits).all()


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("encoder"), "abcdefghijklmnopqrstuvwxyzXYZ")


def test_fine_tuned_encoder_and_sentence_embeddings_learn_a_separable_task(dataset, encoder_folder):
    plain = BertModel.from_pretrained(encoder_folder)
    for baseline, least in (
        (FineTunedEncoder(path=encoder_folder, **QUICK), 0.95),
        (SentenceEmbeddings(path=encoder_folder), 0.9),
    ):
        fitted = baseline.fit(dataset, seed=0)
        logits = fitted.logits(dataset.validation)
        assert roc_auc_score(dataset.validation.labels, logits[:, 0]) > least
        assert fitted.parameters == sum(p.numel() for p in plain.parameters()) + 32 + 1


def test_embeddings_do_not_depend_on_other_texts_in_the_batch(dataset, encoder_folder):
    encoder = Encoder(encoder_folder, max_tokens=32)
    together = encoder.embeddings(dataset.validation)
    single = encoder.embeddings(dataset.validation.select(np.array([3])))
    np.testing.assert_allclose(single[0], together[3], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-6)


def test_missing_encoder_is_rejected_with_a_remedy(dataset):
    with pytest.raises(SidelightError, match=wordings.NO_ENCODER):
        FineTunedEncoder(path="/nowhere").fit(dataset, seed=0)
