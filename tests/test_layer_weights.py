"""The weights of layers follow how well each predicts texts that were left out."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeCV

from sidelight.training.scaling import layer_scores, layer_weights
from worlds.data import TASKS

TEXTS, LAYERS, WIDTH = 90, 3, 8
POOLINGS = ("means", "lasts")


def weights_of(poolings, labels, kind="binary"):
    return layer_weights(layer_scores(poolings, labels, TASKS[kind]))


def shifted(labels, *, layer, pooling):
    """Noise, but for one layer's view, which the labels shift."""
    random = torch.Generator().manual_seed(0)
    poolings = torch.randn(2, TEXTS, LAYERS, WIDTH, generator=random)
    shift = torch.from_numpy(labels).reshape(TEXTS, -1).float()
    poolings[POOLINGS.index(pooling), :, layer, : shift.shape[1]] += 3 * shift
    return poolings


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", ["binary", "multilabel"])
def test_most_predictive_layer_gets_largest_weight(kind, pooling):
    shape = (TEXTS,) if kind == "binary" else (TEXTS, 3)
    labels = np.random.default_rng(0).integers(0, 2, shape)
    poolings = shifted(labels, layer=1, pooling=pooling)
    weights = weights_of(poolings, labels, kind)
    assert int(weights.argmax()) == 1
    assert weights.square().mean().item() == pytest.approx(1)
    # The others hold noise, and are still not shut out.
    remaining = weights[[0, 2]] / weights[1]
    assert remaining.max() < 0.1
    assert remaining.min() >= 0.01 - 1e-6
    # A view that is the same for all texts is worth nothing.
    poolings[:, :, 0] = 1.0
    weights = weights_of(poolings, labels, kind)
    assert torch.isfinite(weights).all()
    assert weights[0] / weights[1] == pytest.approx(0.01)


def test_layers_without_predictive_signal_get_equal_weights():
    labels = np.ones(TEXTS, dtype=np.int64)
    poolings = shifted(np.zeros(TEXTS), layer=0, pooling="means")
    assert torch.equal(weights_of(poolings, labels), torch.ones(LAYERS))
    # Two texts of a class say more about those texts than about layers.
    labels = (np.arange(200) < 2).astype(np.int64)
    noise = torch.randn(200, LAYERS, WIDTH, generator=torch.Generator().manual_seed(0))
    assert torch.equal(weights_of(torch.stack([noise, noise]), labels), torch.ones(LAYERS))


@pytest.mark.parametrize(("texts", "width"), [(60, 100), (100, 32)])
def test_layer_score_matches_leave_one_out_ridge_regression(texts, width):
    random = np.random.default_rng(0)
    labels = random.permutation(np.arange(texts) % 2)
    noise = random.normal(size=(texts, width))
    noise[:, :10] += labels[:, None]
    pooling = torch.from_numpy(noise).float()
    spread, center = noise.std(0), noise.mean(0)
    features = (noise - center) / (spread + 1e-2 * spread.mean())
    signs = 2.0 * labels - 1
    alphas = 10.0 ** np.arange(-2, 1.51, 0.5) * (features**2).sum() / texts
    ridge = RidgeCV(alphas=alphas, store_cv_results=True).fit(features, signs)
    errors = ridge.cv_results_.sum(0)
    expected = 1 - errors.min() / np.square(signs - signs.mean()).sum()
    poolings = torch.stack([pooling[:, None], pooling[:, None]])
    scores = layer_scores(poolings, labels, TASKS["binary"])
    assert expected > 0.1
    assert scores[0, 0].item() == pytest.approx(expected, abs=2e-3)
