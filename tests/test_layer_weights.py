"""How much each layer counts when training starts."""

import numpy as np
import pytest
import torch

from sidelight.states.cache import Pooled
from sidelight.training.layer_weights import layer_weights, view_worths
from sidelight.types import Task

BINARY = Task("binary", ("no", "yes"))
SEVERAL = Task("multilabel", ("a", "b"))
TEXTS, LAYERS, WIDTH = 120, 4, 6


def weights_of(pooled: Pooled, labels: np.ndarray, task: Task = BINARY) -> torch.Tensor:
    return layer_weights(view_worths(pooled, labels, task))


def drawn(labels: np.ndarray, *, layer: int, view: str) -> Pooled:
    """Noise, but for one layer's view, which the labels shift."""
    random = torch.Generator().manual_seed(0)
    means, lasts = (torch.randn(TEXTS, LAYERS, WIDTH, generator=random) for _ in range(2))
    shift = torch.from_numpy(labels).reshape(TEXTS, -1).float()
    {"means": means, "lasts": lasts}[view][:, layer, : shift.shape[1]] += 3 * shift
    return Pooled(means, lasts)


@pytest.mark.parametrize("view", ["means", "lasts"])
@pytest.mark.parametrize("task", [BINARY, SEVERAL], ids=lambda task: task.kind)
def test_the_layer_that_predicts_the_labels_weighs_most(task, view):
    shape = (TEXTS,) if task is BINARY else (TEXTS, 2)
    labels = np.random.default_rng(0).integers(0, 2, shape)
    weights = weights_of(drawn(labels, layer=2, view=view), labels, task)
    assert int(weights.argmax()) == 2
    assert weights.square().mean().item() == pytest.approx(1)
    # The others hold noise, and are still not shut out.
    others = weights[[0, 1, 3]] / weights[2]
    assert others.max() < 0.1
    assert others.min() >= 0.01 - 1e-6


def test_without_a_layer_that_predicts_anything_all_weigh_alike():
    labels = np.ones(TEXTS, dtype=np.int64)
    pooled = drawn(np.zeros(TEXTS), layer=0, view="means")
    assert torch.equal(weights_of(pooled, labels), torch.ones(LAYERS))
    # Two texts of a class say more about those texts than about layers.
    labels = (np.arange(200) < 2).astype(np.int64)
    noise = torch.randn(200, LAYERS, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(weights_of(Pooled(noise, noise), labels), torch.ones(LAYERS))


def test_a_view_that_is_the_same_for_all_texts_is_worth_nothing():
    labels = np.random.default_rng(0).integers(0, 2, TEXTS)
    pooled = drawn(labels, layer=2, view="means")
    pooled.lasts[:, 0] = 1.0
    pooled.means[:, 0] = 1.0
    weights = weights_of(pooled, labels)
    assert torch.isfinite(weights).all()
    assert weights[0] / weights[2] == pytest.approx(0.01)


@pytest.mark.parametrize(("texts", "width"), [(60, 100), (100, 32)])
def test_a_worth_is_what_refitting_without_each_text_gives(texts, width):
    random = np.random.default_rng(0)
    labels = random.permutation(np.arange(texts) % 2)
    noise = random.normal(size=(texts, width))
    noise[:, :10] += labels[:, None]
    view = torch.from_numpy(noise).float()
    spread, center = noise.std(0), noise.mean(0)
    features = (noise - center) / (spread + 1e-2 * spread.mean())
    signs = 2.0 * labels - 1
    errors = []
    for strength in 10.0 ** np.arange(-2, 1.51, 0.5):
        ridge = strength * float((features**2).sum()) / texts * np.eye(texts - 1)
        left_out = []
        for text in range(texts):
            others = np.arange(texts) != text
            own = features[others] - features[others].mean(0)
            dual = np.linalg.solve(own @ own.T + ridge, signs[others] - signs[others].mean())
            moved = (features[text] - features[others].mean(0)) @ own.T @ dual
            left_out.append(signs[text] - signs[others].mean() - moved)
        errors.append(np.square(left_out).sum())
    expected = 1 - min(errors) / np.square(signs - signs.mean()).sum()
    pooled = Pooled(view[:, None], view[:, None])
    worths = view_worths(pooled, labels, BINARY)
    assert expected > 0.1
    assert worths[0, 0].item() == pytest.approx(expected, abs=2e-3)
