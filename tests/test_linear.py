"""The linear mechanism is the optimum of a logistic regression on pooled states of all layers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from corpora import TASKS, rows, training_set
from sidelight.calibration import link
from sidelight.data.loading import load_examples
from sidelight.errors import SidelightError
from sidelight.mechanisms.base import mechanism_spec
from sidelight.metrics import log_losses
from sidelight.states.cache import Pooled
from sidelight.training import linear
from sidelight.training.dataset import ProbeDataset, choose_folds
from sidelight.training.fit import cross_fit, fit
from sidelight.training.linear import solve_linear
from sidelight.training.loop import train_mechanisms
from sidelight.training.settings import FitOptions, Job, suggested_settings

TEXTS, LAYERS, WIDTH = 90, 3, 8
# Two optimisers on the same convex loss; the kernel is in float32.
OPTIMISER = 0.02
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
    labels = {
        "binary": hidden[:, 0] > 0,
        "multiclass": hidden.argmax(1),
        "multilabel": hidden > 0,
    }[kind].astype(np.int64)
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
@pytest.mark.parametrize(
    ("strength", "class_weight"), [(1.0, None), (100.0, None), (1.0, "balanced")]
)
def test_the_solution_is_that_of_a_regression_on_all_features(
    kind, strength, class_weight, monkeypatch
):
    monkeypatch.setattr(linear, "relative_weights", torch.ones_like)
    pooled, labels = drawn(kind)
    balanced = class_weight == "balanced"
    solution = solve_linear(pooled, labels, TASKS[kind], strength=strength, balanced=balanced)
    found = logits_of(solution, pooled)
    features = features_of(pooled)
    columns = labels.T if kind == "multilabel" else labels[None]
    expected = [
        LogisticRegression(C=strength, class_weight=class_weight, tol=1e-8, max_iter=5000)
        .fit(features, own)
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
    unseen, truth = drawn(kind, texts=2000, seed=1)

    def loss_of(found):
        chance = link(kind, logits_of(found, unseen))
        return log_losses(TASKS[kind], chance, truth).mean()

    losses = {
        strength: loss_of(solve_linear(pooled, labels, TASKS[kind], strength=strength))
        for strength in (min(linear.STRENGTHS), solution.strength, max(linear.STRENGTHS))
    }
    assert min(losses, key=losses.get) == solution.strength


def test_a_part_of_many_texts_spans_nearly_the_same_solution(monkeypatch):
    pooled, labels = drawn("binary", texts=400)
    whole = solve_linear(pooled, labels, TASKS["binary"], strength=1.0)
    monkeypatch.setattr(linear, "_LANDMARKS", 200)
    part = solve_linear(pooled, labels, TASKS["binary"], strength=1.0)
    # 200 texts span all 48 dimensions.
    np.testing.assert_allclose(logits_of(part, pooled), logits_of(whole, pooled), atol=OPTIMISER)


def test_texts_that_are_all_alike_have_the_shares_of_their_classes():
    pooled, labels = drawn("multiclass")
    same = Pooled(torch.ones_like(pooled.means), torch.ones_like(pooled.lasts))
    logits = logits_of(solve_linear(same, labels, TASKS["multiclass"], strength=1.0), same)
    shares = np.bincount(labels) + 0.5
    expected = np.log(shares) - np.log(shares).mean()
    np.testing.assert_allclose(logits, np.tile(expected, (TEXTS, 1)), atol=1e-6)


def test_the_layer_that_predicts_the_labels_has_the_largest_weights():
    pooled, labels = drawn("binary")
    pooled.lasts[:, 0] = 7.0
    solution = solve_linear(pooled, labels, TASKS["binary"], strength=1.0)
    size = (solution.value * pooled.means.std(0)[..., None]).square().sum((1, 2)).sqrt()
    assert int(size.argmax()) == 1
    assert size[1] > 3 * size[[0, 2]].max()
    # A view that is the same for all texts is left out.
    assert not solution.last[0].any()
    assert solution.last[1].any()


def test_a_class_without_texts_is_the_least_likely_and_one_of_all_texts_is_likely():
    pooled, labels = drawn("multilabel")
    for present in ([0], [1], [0, 2], [1, 2]):
        own = np.resize(present, TEXTS)
        solution = solve_linear(pooled, own, TASKS["multiclass"], strength=1.0)
        mean = logits_of(solution, pooled).mean(0)
        absent = np.setdiff1d(range(3), present)
        assert mean[absent].max() < mean[present].min()
        assert np.isfinite(mean).all()
    labels[:, 1] = 1
    logits = logits_of(solve_linear(pooled, labels, TASKS["multilabel"], strength=1.0), pooled)
    np.testing.assert_allclose(logits[:, 1], np.log((TEXTS + 0.5) / 0.5), atol=OPTIMISER)


@pytest.mark.parametrize("strength", [0.0, -1.0, float("inf")])
def test_a_strength_that_is_not_above_zero_is_refused(strength):
    with pytest.raises(SidelightError, match="give a number above 0"):
        job(strength=strength)


@pytest.fixture(scope="module")
def corpora(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("activations")
    return {kind: training_set(tiny, root, kind, 60, seed=0) for kind in TASKS}


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
    rounding = BF16 if normalise else ROUNDING
    np.testing.assert_allclose(made.logits, logits_of(solution, pooled), **rounding)


@pytest.mark.slow
def test_the_strength_that_the_folds_choose_is_that_of_each_of_them(tiny, corpora):
    training = corpora["binary"]
    whole = ProbeDataset(tiny, training, training, choose_folds(training.examples))
    (made,) = cross_fit([job()], whole, whole.folds)
    (alone,) = train_mechanisms([job()], training=training, validation=None)
    assert made.job.settings.strength is not None
    assert alone.job.settings.strength == made.job.settings.strength
    for name, parameter in alone.mechanism.state_dict().items():
        assert made.mechanism.state_dict()[name].equal(parameter)
    fold = whole.folds[2]
    (rest,) = train_mechanisms(
        [made.job],
        training=training.without(fold),
        validation=None,
        to_score=training.select(fold),
    )
    np.testing.assert_allclose(made.logits[fold], rest.logits, **ROUNDING)


def test_it_is_solved_once_whatever_the_seeds():
    specs = (mechanism_spec("linear"), mechanism_spec("readout"))
    jobs = FitOptions(mechanisms=specs, seeds=(0, 1, 2)).jobs(20)
    assert [job.spec.name for job in jobs] == ["linear", *["readout"] * 3]
    with pytest.raises(SidelightError, match="learns whole texts alone"):
        FitOptions(mechanisms=specs, long_inputs=True)


def test_pooled_states_that_do_not_fit_into_memory_are_refused(tiny, tmp_path):
    specs = (mechanism_spec("linear"),)
    options = FitOptions(mechanisms=specs, cache_root=tmp_path, memory_bytes=1000)
    with pytest.raises(SidelightError, match=r"the limit is 0\.0 GiB\. Allow more \(--memory"):
        fit(tiny, load_examples(rows("binary", 40)), None, name="a", options=options)
    assert not any(tmp_path.iterdir())
