"""The regression that is fitted while a person labels equals one on all features."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from sidelight_label import regression
from sidelight_label.regression import fit_regression
from worlds.data import TASKS

TEXTS, LAYERS, WIDTH = 90, 3, 8
# Two optimisers on the same convex loss.
OPTIMISER = 0.02
# The same sums in another order, in float32.
ROUNDING = 1e-4

every_task = pytest.mark.parametrize("kind", TASKS)


def drawn(kind):
    """Pooled states in which the labels move the first dimensions of one layer."""
    random = np.random.default_rng(0)
    means, lasts = random.normal(size=(2, TEXTS, LAYERS, WIDTH)) * [5, 1, 0.1, 1, 1, 2, 1, 1] + 3
    hidden = means[:, 1, :3] - 3 + random.logistic(size=(TEXTS, 3)) * 2
    labels = {"binary": hidden[:, 0] > 0, "multiclass": hidden.argmax(1), "multilabel": hidden > 0}[
        kind
    ].astype(np.int64)
    # As the template's last embedding, which is the same for all texts.
    lasts[:, 0] = 1
    pooled = torch.from_numpy(np.stack([means, lasts])).float()
    return pooled, labels, tuple(np.array_split(random.permutation(TEXTS), 5))


@every_task
def test_regression_matches_scikit_learn_on_all_features(kind, monkeypatch):
    monkeypatch.setattr(regression, "relative_weights", torch.ones_like)
    monkeypatch.setattr(regression, "STRENGTHS", (10.0,))
    pooled, labels, folds = drawn(kind)
    solution = fit_regression(pooled, labels, TASKS[kind], folds)
    poolings = torch.cat([*pooled], 1).double()
    spread, center = torch.std_mean(poolings, 0, correction=0)
    # The view that is the same for all texts says nothing.
    scaled = ((poolings - center) / (spread + 1e-2 * spread.mean(1, keepdim=True)))[
        :, spread.any(1)
    ]
    scaled /= scaled.square().sum(2).mean(0)[:, None].sqrt()
    features = scaled.flatten(1).numpy() / np.sqrt(2 * LAYERS)
    outputs = labels.T if kind == "multilabel" else labels[None]
    expected = [
        LogisticRegression(C=10.0, tol=1e-8, max_iter=5000)
        .fit(features, targets)
        .decision_function(features)
        .reshape(TEXTS, -1)
        for targets in outputs
    ]
    np.testing.assert_allclose(solution.logits(pooled), np.hstack(expected), atol=OPTIMISER)


@every_task
def test_readout_reproduces_the_regression_logits(kind):
    pooled, labels, folds = drawn(kind)
    solution = fit_regression(pooled, labels, TASKS[kind], folds)
    # Three tokens whose mean and last one are those of a text.
    means, lasts = pooled
    first = (3 * means - lasts) / 2
    hidden = torch.stack([first, first, lasts], 2)
    found = solution.readout()(hidden, torch.ones(TEXTS, 3, dtype=torch.bool))
    np.testing.assert_allclose(found, solution.logits(pooled), atol=ROUNDING)


@every_task
def test_fold_logits_do_not_depend_on_labels_of_that_fold(kind, monkeypatch):
    """Not by the weights of the views either, which follow the labels."""
    monkeypatch.setattr(regression, "STRENGTHS", (1.0,))
    pooled, labels, folds = drawn(kind)
    # Two layers of which the labels of a fold decide how much each weighs.
    noise = torch.randn(TEXTS, WIDTH, generator=torch.Generator().manual_seed(0))
    pooled[0, :, 0] = pooled[0, :, 1] + 2 * noise
    changed = labels.copy()
    changed[folds[2]] = 0
    before, after = (
        fit_regression(pooled, fold_labels, TASKS[kind], folds).left_out
        for fold_labels in (labels, changed)
    )
    np.testing.assert_array_equal(before[folds[2]], after[folds[2]])
    assert not np.allclose(before[folds[1]], after[folds[1]])


@every_task
def test_selected_strength_minimises_the_held_out_loss(kind, monkeypatch):
    pooled, labels, folds = drawn(kind)
    chosen = fit_regression(pooled, labels, TASKS[kind], folds).strength
    assert min(regression.STRENGTHS) < chosen < max(regression.STRENGTHS)
    # Whatever else could have been chosen.
    near = regression.STRENGTHS.index(chosen)
    for strengths in (regression.STRENGTHS[near:], regression.STRENGTHS[: near + 1]):
        monkeypatch.setattr(regression, "STRENGTHS", strengths)
        assert fit_regression(pooled, labels, TASKS[kind], folds).strength == chosen
        monkeypatch.undo()


def test_label_present_in_all_texts_is_predicted():
    pooled, labels, folds = drawn("multilabel")
    labels[:, 1] = 1
    solution = fit_regression(pooled, labels, TASKS["multilabel"], folds)
    assert (solution.logits(pooled)[:, 1] > 0).all()
