"""Baselines of one vector per text learn what is planted; their mathematics equals references."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression

import wordings
from sidelight.errors import SidelightError
from sidelight.models.conversation import Message, Reads
from sidelight.states import cache as states_cache
from sidelight.states.cache import Shard
from sidelight.training.dataset import Split
from sidelight.training.optimisation import validation_score
from sidelight.training.preparing import ProbeDataset
from sidelight.types import TaskKind
from sidelight_lab.baselines.base import Baseline, TfIdf
from sidelight_lab.baselines.muli import FirstToken, Muli
from sidelight_lab.baselines.pooled import (
    LastTokenOfBestLayer,
    LastTokenOfLastLayer,
    MeanOfBestLayer,
    MeanOfLastLayer,
    MeansOfAllLayers,
    Mlpm,
    fit_logistic,
    gaussian_discriminant,
    pooled_states,
)
from sidelight_lab.baselines.siren import Siren, sparse_path
from worlds.data import TASKS, split_of
from worlds.models import FAMILIES, family_backbone

pytestmark = pytest.mark.slow
LAYERS, WIDTH, VOCABULARY = 4, 32, 300
BASELINES: list[Baseline] = [
    MeanOfLastLayer(),
    LastTokenOfLastLayer(),
    MeanOfBestLayer(),
    LastTokenOfBestLayer(),
    MeansOfAllLayers(),
    Muli(shares=(0.1, 0.03), iterations=30),
    Siren(iterations=20, hidden=16, settings=replace(Siren().settings, epochs=5)),
    Mlpm(),
    TfIdf(),
]
every_baseline = pytest.mark.parametrize(
    "baseline", BASELINES, ids=lambda baseline: type(baseline).__name__
)
every_kind = pytest.mark.parametrize("kind", TASKS)


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def datasets(tiny, states) -> dict[TaskKind, ProbeDataset]:
    splits = {kind: [split_of(tiny, states, kind, n, n) for n in (240, 100)] for kind in TASKS}
    return {kind: ProbeDataset.held_out(tiny, *pair) for kind, pair in splits.items()}


@pytest.fixture(scope="module")
def unseen(tiny, states) -> dict[TaskKind, Split]:
    return {kind: split_of(tiny, states, kind, 200, 3) for kind in TASKS}


@pytest.fixture(scope="module")
def fitted(datasets):
    """Each baseline fitted once to each kind of task."""
    return cache(lambda baseline, kind: baseline.fit(datasets[kind], seed=0))


@every_kind
@every_baseline
def test_baselines_find_planted_signal_in_unseen_texts(baseline, kind, fitted, unseen):
    logits = fitted(baseline, kind).logits(unseen[kind])
    labels = unseen[kind].labels
    # Chance: the share of positives (.4), or one in three.
    assert logits.shape == (200, TASKS[kind].outputs)
    assert validation_score(TASKS[kind], logits, labels) > 0.6


@every_baseline
def test_same_seed_gives_same_logits_regardless_of_batch(baseline, fitted, datasets, unseen):
    logits = fitted(baseline, "multiclass").logits(unseen["multiclass"])
    again = baseline.fit(datasets["multiclass"], seed=0)
    assert np.array_equal(logits, again.logits(unseen["multiclass"]))
    some = unseen["multiclass"].select([7, 3, 90])
    # Float32 sums in another order.
    assert again.logits(some) == pytest.approx(logits[[7, 3, 90]], rel=1e-3, abs=1e-3)


@pytest.mark.filterwarnings("ignore:Label .* is present in all training examples")
@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
@every_baseline
def test_classes_without_training_texts_are_rarely_predicted(baseline, kind, datasets, unseen):
    labels = datasets[kind].training.labels
    present = labels != 2 if kind == "multiclass" else labels[:, 2] == 0
    few = datasets[kind].training.select(np.flatnonzero(present)[:24])
    dataset = ProbeDataset.held_out(datasets[kind].reader, few, datasets[kind].validation)
    rival = baseline.fit(dataset, seed=0)
    logits = rival.logits(unseen[kind])
    assert np.isfinite(logits).all()
    predicted = logits.argmax(1) == 2 if kind == "multiclass" else logits[:, 2] > 0
    assert predicted.mean() < 0.2


@every_kind
def test_parameters_are_counted_and_best_layer_never_trails_last_layer(kind, fitted, datasets):
    outputs, held_out = TASKS[kind].outputs, datasets[kind].validation
    models = {type(baseline): fitted(baseline, kind) for baseline in BASELINES}
    counts = {name: model.parameters for name, model in models.items()}
    one_layer = (WIDTH + 1) * outputs
    assert counts[MeansOfAllLayers] == (LAYERS * WIDTH + 1) * outputs
    assert counts[Mlpm] == LAYERS * one_layer + (LAYERS * outputs + 1) * outputs
    # Both keep a part of what they are offered.
    assert counts[Siren] < (LAYERS * WIDTH + 1) * 16 + 17 * outputs
    assert counts[Muli] < (VOCABULARY + 1) * outputs
    for pair in ((MeanOfLastLayer, MeanOfBestLayer), (LastTokenOfLastLayer, LastTokenOfBestLayer)):
        assert [counts[single] for single in pair] == [one_layer] * 2
        last, best = (
            validation_score(held_out.task, models[name].logits(held_out), held_out.labels)
            for name in pair
        )
        assert best >= last


def blobs(kind: TaskKind, *, rows: int, features: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Correlated inputs of unequal scale with overlapping classes, and their labels."""
    random = np.random.default_rng(seed)
    inputs = random.standard_normal((rows, features)) @ random.standard_normal((features,) * 2) + 3
    logits = inputs @ random.standard_normal((features, 3)) / features
    logits += random.standard_normal((rows, 3))
    if kind == "multiclass":
        return inputs, logits.argmax(1)
    labels = (logits > logits.mean(0)).astype(np.int64)
    return inputs, labels[:, 0] if kind == "binary" else labels


def standardised(inputs: np.ndarray) -> np.ndarray:
    return (inputs - inputs.mean(0)) / inputs.std(0)


@pytest.mark.parametrize("penalty", [1.0, 0.01])
@every_kind
def test_logistic_regression_matches_scikit_learn(kind, penalty):
    inputs, labels = blobs(kind, rows=300, features=6, seed=0)
    if kind == "multiclass":
        labels = np.where(np.arange(300) % 7 == 0, labels, 0)  # classes of unequal size
    mine = fit_logistic(inputs, labels, TASKS[kind], penalty=penalty, iterations=1000)
    outputs = labels.reshape(300, -1).T
    reference = LogisticRegression(
        C=1 / (300 * penalty), class_weight="balanced", tol=1e-8, max_iter=1000
    )
    scaled = standardised(inputs)
    found = [reference.fit(scaled, output).decision_function(scaled) for output in outputs]
    expected = np.stack(found, 1).reshape(300, -1)
    # Default and tight tolerance of L-BFGS, and weights that are kept in float32.
    assert mine(inputs) == pytest.approx(expected, abs=1e-2)


@every_kind
def test_sparse_regression_satisfies_its_optimality_conditions(kind):
    rows, labels = blobs(kind, rows=300, features=8, seed=3)
    inputs, outputs = standardised(rows), TASKS[kind].outputs
    (nothing, _), (weight, bias), (more, _) = sparse_path(
        torch.from_numpy(inputs).float().matmul,
        torch.from_numpy(labels),
        TASKS[kind],
        features=8,
        shares=(1.001, 0.3, 0.01),  # rounding decides at exactly 1
        iterations=500,
    )
    assert not nothing.any()
    assert (weight != 0).sum() < (more != 0).sum()
    target = labels.reshape(300, -1)
    if kind == "multiclass":
        target = np.eye(3)[target[:, 0]]
        weights = (1 / (3 * target.mean(0)))[labels, None]
    else:
        weights = np.where(target == 1, 1 / target.mean(0) - 1, 1)

    def gradient(logits: np.ndarray) -> np.ndarray:
        """Of the weighted cross-entropy, bias last."""
        odds = np.exp(logits)
        chance = odds / (odds.sum(1, keepdims=True) if kind == "multiclass" else 1 + odds)
        count = 300 * (outputs if kind == "multilabel" else 1)
        return np.c_[inputs, np.ones(300)].T @ (weights * (chance - target)) / count

    penalty = 0.3 * np.abs(gradient(np.zeros((300, outputs)))[:-1]).max()
    weight = weight.double().numpy()
    slope = gradient(inputs @ weight + bias.double().numpy())
    tolerance = 1e-2 * penalty  # float32 steps
    assert 0 < (weight == 0).sum() < weight.size
    assert slope[-1] == pytest.approx(0, abs=tolerance)
    assert (np.abs(slope[:-1]) <= penalty + tolerance).all()
    is_nonzero = weight != 0
    assert slope[:-1][is_nonzero] == pytest.approx(
        -penalty * np.sign(weight[is_nonzero]), abs=tolerance
    )


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_gaussian_discriminant_converges_to_linear_discriminant_analysis(kind):
    inputs, labels = blobs(kind, rows=20_000, features=4, seed=6)
    mine = gaussian_discriminant(inputs, labels, TASKS[kind])(inputs)
    logits = mine if kind == "multiclass" else np.hstack([np.zeros_like(mine), mine])
    scaled = standardised(inputs)
    expected = LinearDiscriminantAnalysis(solver="lsqr").fit(scaled, labels).predict_proba(scaled)
    # With so many texts, hardly anything is shrunk.
    assert softmax(logits, 1) == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gemma2"])
def test_muli_log_odds_match_the_models_first_token_probabilities(name, tmp_path):
    backbone = family_backbone(name)
    split = split_of(backbone, tmp_path, "binary", 6, 7)
    first = FirstToken.of(backbone)
    first.require(backbone, split.states.prompts[0])
    odds = first.log_odds(first.directions(pooled_states(split)[1][:, -1])).double()
    logits = [
        backbone.model(input_ids=torch.tensor([prompt.token_ids])).logits[0, -1]
        for prompt in split.states.prompts
    ]
    chance = torch.stack(logits).double().softmax(1)
    # Cached states are rounded to bf16.
    assert (odds - torch.log(chance / (1 - chance))).abs().max() < 0.15


def test_muli_rejects_unsupported_models_and_states(tiny, tmp_path):
    gemma = family_backbone("gemma2")
    prompt = gemma.encoder.encode([Message("user", "hello")])
    with pytest.raises(SidelightError, match=wordings.NOT_A_PLAIN_HEAD):
        FirstToken.of(gemma).require(gemma, prompt)
    split = split_of(tiny, tmp_path, "binary", 8, 8, reads=Reads(template=False))
    with pytest.raises(SidelightError, match="template=True"):
        Muli().fit(ProbeDataset.held_out(tiny, split, split), seed=0)


def test_states_are_pooled_shard_by_shard(tiny, tmp_path, monkeypatch):
    """What training holds in memory meanwhile may be all that --memory allows."""
    texts = split_of(tiny, tmp_path, "binary", 12, seed=0, shard_bytes=1)
    read, read_before = [], []
    from_disk, pool = states_cache.read_tensors, Shard.pooled

    def counted_read(path):
        read.append(path)
        return from_disk(path)

    def pooling(shard, **options):
        read_before.append(len(read))
        return pool(shard, **options)

    monkeypatch.setattr(states_cache, "read_tensors", counted_read)
    monkeypatch.setattr(Shard, "pooled", pooling)
    assert pooled_states(texts).shape[:2] == (2, 12)
    assert read_before == [*range(1, 13)]
