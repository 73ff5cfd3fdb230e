"""What training makes of pooled states: the linear mechanism and layers' weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, RidgeCV

from corpora import TASKS, rows, split_of
from sidelight.data.loading import load_examples
from sidelight.errors import SidelightError
from sidelight.mechanisms.base import mechanism_spec
from sidelight.states.cache import ActivationCache, Pooled, Shard
from sidelight.training import linear
from sidelight.training.background import load_background
from sidelight.training.fit import fit
from sidelight.training.linear import solve_linear
from sidelight.training.loop import cross_fit, train_mechanisms
from sidelight.training.scaling import layer_weights, view_worths
from sidelight.training.settings import FitOptions, Job, suggested_settings
from sidelight.training.validation import choose_folds
from sidelight.types import Task

TEXTS, LAYERS, WIDTH = 90, 3, 8
# Two optimisers on the same convex loss; the kernel is in float32.
OPTIMISER = 0.02
# Of log losses that strengths are compared by.
CONVERGED = 3e-3
# Sums of raw states and of standardised ones, in float32.
ROUNDING = {"rtol": 1e-3, "atol": 1e-3}
# Pooled states that are normalised first are rounded to bf16 before.
BF16 = {"rtol": 0.02, "atol": 0.02}

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


def weights_of(pooled, labels, kind="binary"):
    return layer_weights(view_worths(pooled, labels, TASKS[kind]))


def shifted(labels, *, layer, view):
    """Noise, but for one layer's view, which the labels shift."""
    random = torch.Generator().manual_seed(0)
    means, lasts = (torch.randn(TEXTS, LAYERS, WIDTH, generator=random) for _ in range(2))
    shift = torch.from_numpy(labels).reshape(TEXTS, -1).float()
    {"means": means, "lasts": lasts}[view][:, layer, : shift.shape[1]] += 3 * shift
    return Pooled(means, lasts)


@pytest.mark.parametrize("view", ["means", "lasts"])
@pytest.mark.parametrize("kind", ["binary", "multilabel"])
def test_the_layer_that_predicts_the_labels_weighs_most(kind, view):
    shape = (TEXTS,) if kind == "binary" else (TEXTS, 3)
    labels = np.random.default_rng(0).integers(0, 2, shape)
    pooled = shifted(labels, layer=1, view=view)
    weights = weights_of(pooled, labels, kind)
    assert int(weights.argmax()) == 1
    solution = solve_linear(pooled, labels, TASKS[kind], strength=1.0)
    own = solution.value if view == "means" else solution.last
    size = own.square().sum((1, 2)).sqrt()
    assert size[1] > 3 * size[[0, 2]].max()
    assert weights.square().mean().item() == pytest.approx(1)
    # The others hold noise, and are still not shut out.
    others = weights[[0, 2]] / weights[1]
    assert others.max() < 0.1
    assert others.min() >= 0.01 - 1e-6
    # A view that is the same for all texts is worth nothing.
    pooled.lasts[:, 0] = pooled.means[:, 0] = 1.0
    weights = weights_of(pooled, labels, kind)
    assert torch.isfinite(weights).all()
    assert weights[0] / weights[1] == pytest.approx(0.01)
    solution = solve_linear(pooled, labels, TASKS[kind], strength=1.0)
    assert not solution.value[0].any()
    assert solution.value[1].any()


def test_without_a_layer_that_predicts_anything_all_weigh_alike():
    labels = np.ones(TEXTS, dtype=np.int64)
    pooled = shifted(np.zeros(TEXTS), layer=0, view="means")
    assert torch.equal(weights_of(pooled, labels), torch.ones(LAYERS))
    # Two texts of a class say more about those texts than about layers.
    labels = (np.arange(200) < 2).astype(np.int64)
    noise = torch.randn(200, LAYERS, WIDTH, generator=torch.Generator().manual_seed(0))
    assert torch.equal(weights_of(Pooled(noise, noise), labels), torch.ones(LAYERS))


@pytest.mark.parametrize(("texts", "width"), [(60, 100), (100, 32)])
def test_a_worth_is_that_of_a_ridge_regression_on_texts_left_out(texts, width):
    random = np.random.default_rng(0)
    labels = random.permutation(np.arange(texts) % 2)
    noise = random.normal(size=(texts, width))
    noise[:, :10] += labels[:, None]
    view = torch.from_numpy(noise).float()
    spread, center = noise.std(0), noise.mean(0)
    features = (noise - center) / (spread + 1e-2 * spread.mean())
    signs = 2.0 * labels - 1
    alphas = 10.0 ** np.arange(-2, 1.51, 0.5) * (features**2).sum() / texts
    ridge = RidgeCV(alphas=alphas, store_cv_results=True).fit(features, signs)
    errors = ridge.cv_results_.sum(0)
    expected = 1 - errors.min() / np.square(signs - signs.mean()).sum()
    pooled = Pooled(view[:, None], view[:, None])
    worths = view_worths(pooled, labels, TASKS["binary"])
    assert expected > 0.1
    assert worths[0, 0].item() == pytest.approx(expected, abs=2e-3)


@pytest.fixture(scope="module")
def corpora(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("activations")
    return {kind: split_of(tiny, root, kind, 60, seed=0) for kind in TASKS}


def job(mechanism="linear", **settings):
    return Job(mechanism_spec(mechanism), 0, replace(suggested_settings(mechanism), **settings))


@every_task
@pytest.mark.parametrize("normalise", [False, True])
def test_training_gives_the_solution_on_states_as_they_are_served(corpora, kind, normalise):
    training = corpora[kind]
    (made,) = train_mechanisms(
        [job(normalise=normalise, strength=10.0)],
        training=training,
        validation=None,
        to_score=training,
    )
    pooled = training.pooled_normalised if normalise else training.pooled
    solution = solve_linear(pooled, training.labels, TASKS[kind], strength=10.0)
    assert made.standardisation.is_normalised == normalise
    expected = logits_of(solution, pooled)
    np.testing.assert_allclose(made.logits, expected, **(BF16 if normalise else ROUNDING))


@pytest.mark.slow
def test_the_strength_that_the_folds_choose_is_that_of_each_of_them(corpora):
    training = corpora["binary"]
    folds = choose_folds(training.examples)
    (made,) = cross_fit([job()], training, folds)
    (alone,) = train_mechanisms([job()], training=training, validation=None)
    assert made.job.settings.strength is not None
    assert alone.job.settings.strength == made.job.settings.strength
    for name, parameter in alone.mechanism.state_dict().items():
        assert made.mechanism.state_dict()[name].equal(parameter)
    fold = folds[2]
    (rest,) = train_mechanisms(
        [made.job], training=training.without(fold), validation=None, to_score=training.select(fold)
    )
    np.testing.assert_allclose(made.logits[fold], rest.logits, **ROUNDING)


def test_a_strength_that_is_no_penalty_is_refused():
    for strength in (0.0, -1.0, float("inf")):
        with pytest.raises(SidelightError, match="Cannot train with strength"):
            job(strength=strength)


def test_pooled_states_that_do_not_fit_into_memory_are_refused(tiny, tmp_path):
    options = FitOptions(mechanism=mechanism_spec("linear"), cache_root=tmp_path, memory_bytes=1000)
    examples = load_examples(rows("binary", 40))
    with pytest.raises(SidelightError, match=r"the limit is 0\.0 GiB\. Allow more \(--set memory"):
        fit(tiny, examples, None, name="a", options=options)
    # Contexts count.
    alone = 8 * 40 * tiny.fingerprint.layers * tiny.fingerprint.width
    more = replace(options, memory_bytes=alone, background=load_background("packaged"))
    with pytest.raises(SidelightError, match="Allow more"):
        fit(tiny, examples, None, name="a", options=more)
    assert not any(tmp_path.iterdir())


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
    assert len(texts.pooled.means) == 12
    assert read_before == [*range(1, 13)]
