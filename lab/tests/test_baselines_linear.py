"""The regression on all layers is the optimum that a solver of all features finds."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from corpora import TASKS, split_of
from sidelight.states.cache import ActivationCache, Pooled, Shard
from sidelight.training.dataset import ProbeDataset
from sidelight.training.optimisation import validation_score
from sidelight.types import Task
from sidelight_lab.baselines import linear
from sidelight_lab.baselines.linear import KernelRegression, solve_linear
from sidelight_lab.baselines.pooled import pooled_states
from test_layer_weights import shifted

TEXTS, LAYERS, WIDTH = 90, 3, 8
# Two optimisers on the same convex loss; the kernel is in float32.
OPTIMISER = 0.02
# Of log losses that strengths are compared by.
CONVERGED = 3e-3

every_task = pytest.mark.parametrize("kind", TASKS)


def drawn(kind, *, texts=TEXTS, seed=0):
    """Pooled states in which the labels move the first dimensions of one layer."""
    random = np.random.default_rng(seed)
    means, lasts = random.normal(size=(2, texts, LAYERS, WIDTH)) * [5, 1, 0.1, 1, 1, 2, 1, 1] + 3
    hidden = means[:, 1, :3] - 3 + random.logistic(size=(texts, 3)) * 2
    labels = {"binary": hidden[:, 0] > 0, "multiclass": hidden.argmax(1), "multilabel": hidden > 0}[
        kind
    ].astype(np.int64)
    return Pooled(torch.from_numpy(means).float(), torch.from_numpy(lasts).float()), labels


def logits_of(solution, pooled):
    products = (
        torch.einsum("tld,ldc->tc", vectors.double(), weight.double())
        for vectors, weight in ((pooled.means, solution.value), (pooled.lasts, solution.last))
    )
    return (sum(products) + solution.bias).numpy()


def features_of(pooled):
    """Standardised like the solver's; a text's squares in all layers add up to about 1."""
    parts = []
    for vectors in (pooled.means, pooled.lasts):
        spread, center = torch.std_mean(vectors.double(), 0, correction=0)
        part = (vectors - center) / (spread + 1e-2 * spread.mean(1, keepdim=True))
        parts.append(part / part.square().sum(2).mean(0)[:, None].sqrt())
    return torch.cat(parts, 1).flatten(1).numpy() / np.sqrt(2 * LAYERS)


@every_task
@pytest.mark.parametrize(("strength", "balanced"), [(1.0, False), (100.0, False), (1.0, True)])
def test_the_solution_is_that_of_a_regression_on_all_features(
    kind, strength, balanced, monkeypatch
):
    monkeypatch.setattr(linear, "relative_weights", torch.ones_like)
    pooled, labels = drawn(kind)
    counts = np.random.default_rng(1).uniform(0.2, 1.8, TEXTS)
    solution = solve_linear(
        pooled, labels, TASKS[kind], strength=strength, weights=counts, balanced=balanced
    )
    found, features = logits_of(solution, pooled), features_of(pooled)
    columns = labels.T if kind == "multilabel" else labels[None]
    weight = "balanced" if balanced else None
    expected = [
        LogisticRegression(C=strength, class_weight=weight, tol=1e-8, max_iter=5000)
        .fit(features, own, counts)
        .decision_function(features)
        .reshape(TEXTS, -1)
        for own in columns
    ]
    np.testing.assert_allclose(found, np.hstack(expected), atol=OPTIMISER)


@pytest.mark.slow
@every_task
def test_the_strength_has_the_lowest_loss_on_texts_left_out(kind):
    pooled, labels = drawn(kind)
    folds = np.array_split(np.random.default_rng(0).permutation(TEXTS), 5)
    solution = solve_linear(pooled, labels, TASKS[kind], folds=folds)
    assert solution.losses[solution.strength] == min(solution.losses.values())
    assert min(linear.STRENGTHS) < solution.strength < max(linear.STRENGTHS)


@pytest.mark.parametrize("classes", [2, 6])
def test_the_loss_of_each_strength_is_that_of_a_converged_regression(classes, monkeypatch):
    """More dimensions than texts: the weaker the penalty, the longer the way to the optimum."""
    monkeypatch.setattr(linear, "relative_weights", torch.ones_like)
    random = np.random.default_rng(0)
    labels = np.arange(16 * classes) % classes
    centers = random.normal(size=(classes, LAYERS, 64)) * 0.3
    means, lasts = random.normal(size=(2, len(labels), LAYERS, 64)) + centers[labels]
    pooled = Pooled(torch.from_numpy(means).float(), torch.from_numpy(lasts).float())
    task = Task("binary" if classes == 2 else "multiclass", tuple("abcdef"[:classes]))
    folds = np.array_split(random.permutation(len(labels)), 4)
    solution = solve_linear(pooled, labels, task, folds=folds)
    features = features_of(pooled)
    for strength, loss in solution.losses.items():
        regression = LogisticRegression(C=strength, tol=1e-9, max_iter=20_000)
        losses = np.empty(len(labels))
        for fold in folds:
            rest = np.setdiff1d(range(len(labels)), fold)
            logs = regression.fit(features[rest], labels[rest]).predict_log_proba(features[fold])
            losses[fold] = -logs[range(len(fold)), labels[fold]]
        assert loss == pytest.approx(losses.mean(), rel=CONVERGED), strength
    assert len(solution.losses) > 5


@every_task
def test_the_labels_of_a_fold_have_no_part_in_its_own_logits(kind, monkeypatch):
    """Not by the weights of the views either, which follow the labels."""
    monkeypatch.setattr(linear, "STRENGTHS", (1.0,))
    pooled, labels = drawn(kind)
    # Two layers of which the labels of a fold decide how much each weighs.
    noise = torch.randn(TEXTS, WIDTH, generator=torch.Generator().manual_seed(0))
    pooled.means[:, 0] = pooled.means[:, 1] + 2 * noise
    folds = np.array_split(np.random.default_rng(0).permutation(TEXTS), 5)
    changed = labels.copy()
    changed[folds[2]] = 0
    before, after = (
        solve_linear(pooled, own, TASKS[kind], folds=folds).left_out for own in (labels, changed)
    )
    np.testing.assert_array_equal(before[folds[2]], after[folds[2]])
    assert not np.allclose(before[folds[1]], after[folds[1]])


def test_a_part_of_many_texts_spans_nearly_the_same_solution(monkeypatch):
    pooled, labels = drawn("binary", texts=400)
    whole = solve_linear(pooled, labels, TASKS["binary"], strength=1.0)
    monkeypatch.setattr(linear, "_LANDMARKS", 200)
    part = solve_linear(pooled, labels, TASKS["binary"], strength=1.0)
    # 200 texts span all 48 dimensions.
    np.testing.assert_allclose(logits_of(part, pooled), logits_of(whole, pooled), atol=OPTIMISER)


def test_a_class_without_texts_is_the_least_likely_and_one_of_all_texts_is_likely():
    pooled, labels = drawn("multilabel")
    for present in ([0], [1], [0, 2], [1, 2]):
        own = np.resize(present, TEXTS)
        solution = solve_linear(pooled, own, TASKS["multiclass"], strength=1.0)
        mean = logits_of(solution, pooled).mean(0)
        absent = np.setdiff1d(range(3), present)
        assert mean[absent].max() < mean[present].min()
        assert np.isfinite(mean).all()
    # Texts that are all alike have the shares of their classes.
    same, own = Pooled(torch.ones_like(pooled.means), torch.ones_like(pooled.lasts)), labels[:, 0]
    shares = np.bincount(own) + 0.5
    logits = logits_of(solve_linear(same, own, TASKS["binary"], strength=1.0), same)
    np.testing.assert_allclose(logits, np.log(shares[1] / shares[0]), atol=1e-6)
    labels[:, 0], labels[:, 1] = 0, 1
    logits = logits_of(solve_linear(pooled, labels, TASKS["multilabel"], strength=1.0), pooled)
    certain = np.log((TEXTS + 0.5) / 0.5)
    np.testing.assert_allclose(logits[:, :2], [[-certain, certain]] * TEXTS, atol=OPTIMISER)


@pytest.mark.parametrize("view", ["means", "lasts"])
@pytest.mark.parametrize("kind", ["binary", "multilabel"])
def test_the_layer_that_predicts_the_labels_weighs_most_and_a_constant_one_nothing(kind, view):
    shape = (TEXTS,) if kind == "binary" else (TEXTS, 3)
    labels = np.random.default_rng(0).integers(0, 2, shape)
    pooled = shifted(labels, layer=1, view=view)
    solution = solve_linear(pooled, labels, TASKS[kind], strength=1.0)
    own = solution.value if view == "means" else solution.last
    size = own.square().sum((1, 2)).sqrt()
    assert size[1] > 3 * size[[0, 2]].max()
    pooled.lasts[:, 0] = pooled.means[:, 0] = 1.0
    solution = solve_linear(pooled, labels, TASKS[kind], strength=1.0)
    assert not solution.value[0].any()
    assert solution.value[1].any()


@pytest.mark.slow
@every_task
def test_the_baseline_learns_what_is_planted(tiny, tmp_path, kind):
    training, validation = (split_of(tiny, tmp_path, kind, n, n) for n in (120, 60))
    fitted = KernelRegression().fit(ProbeDataset(tiny, training, validation), seed=0)
    logits = fitted.logits(validation)
    assert validation_score(TASKS[kind], logits, validation.labels) > 0.8
    assert fitted.parameters == (2 * 4 * 32 + 1) * TASKS[kind].outputs


def test_states_are_pooled_shard_by_shard(tiny, tmp_path, monkeypatch):
    """What training holds in memory meanwhile may be all that --memory allows."""
    texts = split_of(tiny, tmp_path, "binary", 12, seed=0, shard_bytes=1)
    read, read_before = [], []
    text, pool = ActivationCache.text, Shard.pooled

    def reading(cache, row):
        read.append(row)
        return text(cache, row)

    def pooling(shard, **options):
        read_before.append(len(read))
        return pool(shard, **options)

    monkeypatch.setattr(ActivationCache, "text", reading)
    monkeypatch.setattr(Shard, "pooled", pooling)
    assert len(pooled_states(texts).means) == 12
    assert read_before == [*range(1, 13)]
