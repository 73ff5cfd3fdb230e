"""Training is reproducible to the byte, learns what is there, and keeps the best epoch."""

import math
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch.nn import functional

import wordings
from sidelight.data.loading import load_examples
from sidelight.errors import SidelightError
from sidelight.models.conversation import Reads
from sidelight.probes.mechanisms.base import Geometry, mechanism_names, mechanism_spec
from sidelight.probes.ragged import Ragged
from sidelight.probes.standardisation import Projection, Standardisation
from sidelight.states import cache
from sidelight.training import loop
from sidelight.training.dataset import make_split
from sidelight.training.loop import train_mechanisms
from sidelight.training.optimisation import (
    TrainingRun,
    make_loss,
    random_prefixes,
    validation_score,
)
from sidelight.training.preparing import prepare
from sidelight.training.settings import FitOptions, TrainingSettings, suggested_settings
from sidelight.training.targets import Targets
from worlds.data import TASKS, planted_rows, split_of

LEAST = {"epochs": 1, "batch_size": 1, "patience": 1, "least_steps": 0}
QUICK = TrainingSettings(
    learning_rate=1e-2, weight_decay=0.01, epochs=3, batch_size=20, least_steps=0
)
BRIEF = replace(QUICK, epochs=2)
TWO_TEXTS = Targets(Ragged.one_row_each(torch.tensor([0, 1])), torch.ones(2))


@pytest.fixture(scope="module")
def corpora(tiny, tmp_path_factory):
    """For each kind of task 120 texts, and 60 that are left out."""
    root = tmp_path_factory.mktemp("activations")
    parts = {kind: [split_of(tiny, root, kind, n, seed=n) for n in (120, 60)] for kind in TASKS}
    return {kind: held_out(*splits) for kind, splits in parts.items()}


def held_out(training, validation):
    """What trains on one split, and leaves another out."""
    rows = len(training) + np.arange(len(validation))
    return {"split": training.joined(validation), "left_out": (rows,)}


def labels_left_out(corpus):
    (rows,) = corpus["left_out"]
    return corpus["split"].labels[rows]


def candidate(mechanism="readout", *, seed=0, settings=QUICK, normalise=False, **options):
    settings = replace(settings, seed=seed, normalise=normalise)
    return mechanism_spec(mechanism, options), settings


def candidate_of(one):
    return one.spec, one.settings


def contents(one):
    """Every byte that training decided."""
    tensors = {key: value.numpy().tobytes() for key, value in one.mechanism.state_dict().items()}
    return {**tensors, "logits": one.logits.tobytes(), "validation_scores": one.validation_scores}


@pytest.fixture(scope="module")
def together(corpora):
    """All mechanisms and two seeds, side by side, trained under one random state of the caller."""
    candidates = {name: candidate(name, settings=BRIEF) for name in mechanism_names()} | {
        "seed 1": candidate("gate", seed=1, settings=BRIEF),
        "raw": candidate("readout", settings=replace(BRIEF, standardise=False)),
        "normalised": candidate("readout", normalise=True, settings=BRIEF),
        "balanced": candidate("gate", settings=replace(BRIEF, class_weight="balanced")),
        "weighted": candidate("readout", settings=replace(BRIEF, layer_weights="predictive")),
    }
    torch.manual_seed(7)
    runs_by_name = dict(
        zip(candidates, train_mechanisms([*candidates.values()], **corpora["binary"]), strict=True)
    )
    after = torch.rand(1)
    torch.manual_seed(7)
    # Training leaves the caller's random state alone.
    assert torch.equal(torch.rand(1), after)
    return runs_by_name


@pytest.mark.slow
def test_run_depends_only_on_its_seed(corpora, together):
    assert contents(together["gate"]) != contents(together["seed 1"])
    torch.manual_seed(1234)
    names = [*mechanism_names(), "normalised"]
    # Beside other neighbours than before, and then again.
    for subset in (names[::2], names[1::2]):
        runs = train_mechanisms(
            [candidate_of(together[name]) for name in subset], **corpora["binary"]
        )
        for name, one in zip(subset, runs, strict=True):
            before, now = contents(together[name]), contents(one)
            assert {**now, "logits": b""} == {**before, "logits": b""}, name
            # The width of a matmul, which neighbours share, decides the order of float32 sums.
            np.testing.assert_allclose(one.logits, together[name].logits, rtol=1e-4, err_msg=name)
    again = train_mechanisms([candidate_of(one) for one in runs], **corpora["binary"])
    assert [contents(one) for one in again] == [contents(one) for one in runs]


@pytest.mark.slow
@pytest.mark.parametrize("kind", TASKS)
def test_mechanisms_learn_planted_signals(corpora, kind):
    # Only the head learns under pooling, so it takes larger steps.
    rates = {name: 0.2 if name == "pooling" else 3e-2 for name in mechanism_names()}
    names = mechanism_names() if kind == "binary" else ["gate", "readout"]
    learn = replace(QUICK, epochs=6, batch_size=16)
    candidates = [
        candidate(name, settings=replace(learn, learning_rate=rates[name])) for name in names
    ]
    candidates.append(candidate(settings=candidates[names.index("readout")][1], normalise=True))
    labels = labels_left_out(corpora[kind])
    target = np.eye(3)[labels] if kind == "multiclass" else labels.reshape(len(labels), -1)
    for one in train_mechanisms(candidates, **corpora[kind]):
        auprc = average_precision_score(target, one.logits, average="macro")
        assert auprc > 0.95, candidate_of(one)


@pytest.mark.slow
def test_training_returns_best_epoch_and_stops_after_patience(corpora):
    # A rate so high that later epochs undo what the first ones learned, and none at all.
    wild = replace(QUICK, learning_rate=0.3, epochs=6, patience=6)
    still = replace(QUICK, learning_rate=0.0, weight_decay=0.0, epochs=9, patience=2)
    candidates = [
        candidate(settings=wild),
        candidate("gate", settings=wild),
        candidate("gate", settings=still),
    ]
    runs = train_mechanisms(candidates, **corpora["binary"])
    for one in runs:
        assert one.best_epoch == 1 + int(np.argmax(one.validation_scores))
        labels = labels_left_out(corpora["binary"])
        score = validation_score(TASKS["binary"], one.logits, labels)
        # Epochs are scored in bf16, the result in float32.
        assert score == pytest.approx(one.validation_scores[one.best_epoch - 1], abs=0.02)
    assert [len(one.validation_scores) for one in runs] == [6, 6, 3]


@pytest.fixture
def gate_run():
    return TrainingRun(
        *candidate("gate", settings=replace(QUICK, epochs=2, weight_decay=0.0)),
        Standardisation.identity(Geometry(2, 4, 1)),
        TASKS["binary"],
        TWO_TEXTS,
        torch.tensor([True, True]),
        steps=3,
    )


def test_restore_best_recovers_parameters_of_best_epoch(gate_run):
    bias = gate_run.mechanism.head.bias
    for value, score in [(1.0, 0.5), (2.0, 0.9), (3.0, 0.9), (4.0, 0.1)]:
        with torch.no_grad():
            bias.fill_(value)
        gate_run.end_epoch(score)
    gate_run.restore_best()
    assert (gate_run.best_epoch, bias.item(), gate_run.mechanism.training) == (2, 2.0, False)


def test_learning_rate_follows_cosine_to_zero(gate_run):
    """Under a constant gradient, Adam moves a parameter by its rate."""
    bias, places = gate_run.mechanism.head.bias, []
    for _ in range(8):
        places.append(bias.item())
        for parameter in gate_run.mechanism.parameters():
            parameter.grad = torch.ones_like(parameter)
        gate_run.take(1.0)
    expected = 1e-2 * (1 + np.cos(np.pi * np.arange(7) / 6)) / 2
    np.testing.assert_allclose(-np.diff(places), expected, rtol=1e-4, atol=1e-7)


LOGITS = torch.tensor([[0.3, -1.0, 2.0], [1.0, 0.2, -0.5], [0.1, 0.1, 0.4], [-2.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("binary", [1, 0, 0, 0]),
        ("multiclass", [0, 0, 1, 2]),
        ("multilabel", [[1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1]]),
    ],
)
def test_balanced_loss_weights_classes_by_inverse_frequency(kind, labels):
    labels = torch.tensor(labels)
    logits = LOGITS[:, :1] if kind == "binary" else LOGITS
    if kind == "multiclass":
        each = functional.cross_entropy(logits, labels, reduction="none")
        weight = (len(labels) / 3 / torch.bincount(labels, minlength=3))[labels]
        total = weight.sum()
    else:
        output_logits, positives = logits[:, 0] if kind == "binary" else logits, labels.sum(0)
        each = functional.binary_cross_entropy_with_logits(
            output_logits, labels.float(), reduction="none"
        )
        weight = torch.where(labels.bool(), (len(labels) - positives) / positives, 1.0)
        total = weight.numel()
    plain, balanced = (
        make_loss(TASKS[kind], labels, balanced=is_balanced) for is_balanced in (False, True)
    )
    torch.testing.assert_close(plain(logits, labels), each.mean())
    torch.testing.assert_close(balanced(logits, labels), (weight * each).sum() / total)
    # A class without examples does not break it.
    assert make_loss(TASKS[kind], 0 * labels, balanced=True)(logits, 0 * labels).isfinite()
    # A text that counts twice is there twice.
    twice = torch.tensor([0, 0, 2, 3])
    weighted = plain(logits, labels, torch.tensor([2.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(weighted, plain(logits[twice], labels[twice]))


@pytest.mark.slow
def test_scaling_and_weighting_options_change_training(together):
    """Neighbours in one run, of which each keeps its own options."""
    balanced, gate = together["balanced"], together["gate"]
    # Negatives are the larger class here, so weights push logits up.
    assert balanced.logits.mean() > gate.logits.mean()
    raw, normalised, plain = (together[name] for name in ("raw", "normalised", "readout"))
    assert not raw.standardisation.mean.any()
    assert (raw.standardisation.scale == 1).all()
    assert plain.standardisation.mean.any()
    assert normalised.standardisation.is_normalised
    assert not plain.standardisation.is_normalised
    predictive = together["weighted"].standardisation
    assert torch.equal(plain.standardisation.mean, predictive.mean)
    weights = plain.standardisation.scale / predictive.scale
    torch.testing.assert_close(weights, weights[:, :1].expand_as(weights))
    assert weights[:, 0].square().mean().item() == pytest.approx(1, rel=1e-4)
    assert weights.std() > 0.01
    runs = (balanced, gate, raw, normalised, plain)
    different = [contents(one) for one in runs]
    assert all(one != another for one, another in combinations(different, 2))


@pytest.mark.parametrize("kind", TASKS)
def test_validation_score_is_one_for_perfect_logits(corpora, kind):
    labels = labels_left_out(corpora[kind])
    perfect = np.eye(3)[labels] if kind == "multiclass" else labels.reshape(len(labels), -1)
    assert validation_score(TASKS[kind], perfect.astype(float), labels) == 1.0
    assert validation_score(TASKS[kind], 1.0 - perfect, labels) < 0.7
    if kind == "multilabel":
        # A label without positives is left out.
        labels, perfect = labels.copy(), perfect.astype(float)
        labels[:, 2], perfect[:, 2] = 0, 9
        assert validation_score(TASKS[kind], perfect, labels) == 1.0
    if kind != "multiclass":
        for alike in (0, 1):
            with pytest.raises(SidelightError, match=wordings.MIXED_CONTEXTS):
                validation_score(TASKS[kind], perfect.astype(float), np.full_like(labels, alike))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("setting", "value", "remedy"),
    [
        *((name, least - 1, "Input should be greater than") for name, least in LEAST.items()),
        ("learning_rate", 1.0, "Input should be less than 1"),
        ("weight_decay", math.nan, "Input should be a finite number"),
        ("class_weight", {0: 1.0, 1: 5.0}, "Input should be 'none' or 'balanced'"),
    ],
)
def test_invalid_training_settings_are_rejected(setting, value, remedy):
    for make in (TrainingSettings, suggested_settings("readout").changed):
        with pytest.raises(SidelightError, match=rf"{setting} = .*: {remedy}"):
            make(**{setting: value})
    if setting in LEAST:
        assert getattr(TrainingSettings(**{setting: value + 1}), setting) == LEAST[setting]


@pytest.mark.slow
@pytest.mark.parametrize("normalise", [False, True])
def test_duplicated_texts_do_not_change_layer_weights(tiny, tmp_path, normalise):
    brief = replace(BRIEF, epochs=1)
    plain = candidate(settings=brief, normalise=normalise)
    weighted = candidate(settings=replace(brief, layer_weights="predictive"), normalise=normalise)
    once = planted_rows("binary", 60)
    splits = [
        make_split(tiny, load_examples(texts), FitOptions(max_tokens=512, cache_root=tmp_path))
        for texts in (once, [*once, *once])
    ]

    def scales(split, *candidates):
        runs = train_mechanisms(candidates, split=split)
        return [one.standardisation.scale for one in runs]

    found = [scales(split, plain, weighted) for split in splits]
    first, second = (unweighted[:, 0] / weighted[:, 0] for unweighted, weighted in found)
    assert first.std() > 0.01
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("weights", ["equal", "predictive"])
@pytest.mark.parametrize("standardise", [False, True])
def test_unread_layers_have_zero_projections(corpora, weights, standardise):
    settings = replace(BRIEF, epochs=1, layer_weights=weights, standardise=standardise, layers=2)
    (run,) = train_mechanisms([candidate("readout", settings=settings)], **corpora["binary"])
    projection = run.standardisation.fold(run.mechanism.projections())
    assert projection.weight[:2].any()
    assert not projection.weight[2:].any()
    assert not projection.shift[2:].any()
    assert np.isfinite(run.logits).all()
    above = replace(settings, layers=99)
    with pytest.raises(SidelightError, match=wordings.TOO_MANY_LAYERS.format(layers=4)):
        train_mechanisms([candidate("readout", settings=above)], **corpora["binary"])


def test_settings_adapt_to_text_count_and_task():
    settings = TrainingSettings(epochs=4, batch_size=32, least_steps=96, patience=2)
    assert settings.resolved_for(5000, TASKS["binary"]) == replace(settings, normalise=True)
    few = settings.resolved_for(128, TASKS["binary"])
    assert (few.batch_size, few.epochs, few.patience) == (16, 12, 6)
    assert settings.resolved_for(3, TASKS["binary"]).batch_size == 1
    for kind, task in TASKS.items():
        # Several classes lose accuracy by normalised states.
        assert settings.resolved_for(50, task).normalise == (kind != "multiclass")
        for normalise in (False, True):
            assert (
                replace(settings, normalise=normalise).resolved_for(50, task).normalise == normalise
            )
    for name in mechanism_names():
        assert 0 < suggested_settings(name).patience <= suggested_settings(name).epochs


@pytest.mark.slow
def test_diverging_run_does_not_affect_others(corpora):
    diverging = candidate("pooling", settings=replace(BRIEF, weight_decay=1e38))
    candidates = [
        candidate("pooling", settings=BRIEF),
        diverging,
        candidate("pooling", settings=BRIEF),
    ]
    found = train_mechanisms(candidates, **corpora["binary"])
    assert [one is None for one in found] == [False, True, False]
    (separate,) = train_mechanisms(candidates[:1], **corpora["binary"])
    np.testing.assert_allclose(found[0].logits, separate.logits, rtol=1e-3, atol=1e-4)
    assert train_mechanisms(candidates[1:2], split=corpora["binary"]["split"]) == [None]


@pytest.mark.parametrize(("side", "differs"), [("response", True), ("prompt", False)])
def test_only_response_probes_learn_from_prefixes(tiny, tmp_path, side, differs):
    training = split_of(tiny, tmp_path, "binary", 40, seed=0)
    training.states.reads = Reads(side)
    without_prefixes = replace(BRIEF, prefixes=False)
    candidates = [candidate(settings=BRIEF), candidate(settings=without_prefixes)]
    both, one = train_mechanisms(candidates, **held_out(training, training))
    assert np.allclose(both.logits, one.logits, rtol=1e-3, atol=1e-4) != differs


def test_random_prefixes_cover_leading_tokens_of_each_text():
    tokens = Ragged(torch.arange(43.0), torch.tensor([1, 2, 40]))
    torch.manual_seed(0)
    seen = []
    for _ in range(200):
        begun = random_prefixes(tokens)
        for prefix, text in zip(begun.split(), tokens.split(), strict=True):
            assert torch.equal(prefix.values, text.values[: len(prefix.values)])
        seen.append(begun.lengths)
    least, most = torch.stack(seen).aminmax(dim=0)
    assert (least.tolist(), most.tolist()) == ([1, 1, 1], [1, 2, 40])


@pytest.mark.slow
def test_small_shards_are_combined_into_full_batches(tiny, tmp_path, monkeypatch):
    texts, size = 60, 20
    token_bytes = tiny.fingerprint.layers * tiny.fingerprint.width * 2
    training = split_of(tiny, tmp_path, "binary", texts, seed=0, shard_bytes=60 * token_bytes)
    assert max(map(len, training.states.shards)) < size
    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *arguments: (steps.append(1), step(self, *arguments)),
    )
    settings = replace(QUICK, batch_size=size)
    train_mechanisms([candidate("gate", settings=settings)], split=training)
    assert len(steps) in range(2 * settings.epochs, 3 * settings.epochs + 1)


@pytest.mark.parametrize("share", [1.0, 0.8, 0.4])
def test_memory_limit_is_shared_by_training_and_validation(tiny, tmp_path, monkeypatch, share):
    examples = load_examples(planted_rows("binary", 60))
    training, validation = (examples.select(range(*ends)) for ends in ((0, 40), (40, 60)))
    options = FitOptions(cache_root=tmp_path)
    dataset = prepare(tiny, training, validation, options=options)
    splits = {"training": dataset.training, "validation": dataset.scored}
    sizes = {
        split.states.path(row): split.states.stored_bytes(row)
        for split in splits.values()
        for row in range(len(split))
    }
    options = replace(options, memory_bytes=round(share * sum(sizes.values())))
    dataset = prepare(tiny, training, validation, options=options)
    reads, read = Counter(), cache.read_tensors
    monkeypatch.setattr(cache, "read_tensors", lambda path: (reads.update([path]), read(path))[1])
    train_mechanisms([candidate("gate")], split=dataset.split, left_out=dataset.left_out)
    assert {*reads} == {*sizes}
    in_memory = [path for path, times in reads.items() if times == 1]
    least, most = options.memory_bytes - max(sizes.values()), options.memory_bytes
    assert least <= sum(map(sizes.get, in_memory)) <= most
    # What trains comes first.
    assert (dataset.scored.states.path(0) in in_memory) == (share == 1)


@pytest.mark.parametrize("is_normalised", [None, torch.tensor([True, False, True])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_products_match_float32_projections_and_gradients(is_normalised, dtype):
    random = torch.Generator().manual_seed(0)
    # States of another dtype are converted layer by layer.
    stored = torch.bfloat16 if dtype == torch.float32 else torch.float32
    hidden = torch.randn(4, 7, 5, generator=random).to(torch.bfloat16).to(stored)
    products: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    shard = cache.Shard.joined({0: hidden})
    for project, weight_dtype in (
        (loop.layer_products, dtype),
        (lambda shard, projection: projection.layers(shard.hidden.float()), torch.float32),
    ):
        weight = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1))
        weight = weight.to(torch.bfloat16).to(weight_dtype).requires_grad_()
        shift = torch.ones(4, 3, dtype=weight_dtype, requires_grad=True)
        product = project(shard, Projection(weight, shift, is_normalised))
        (product * torch.arange(3)).sum().backward()
        assert weight.grad is not None
        products.append(product.detach().float())
        gradients.append(weight.grad.float())
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.1}
    torch.testing.assert_close(*products, **tolerance)
    torch.testing.assert_close(*gradients, **tolerance)


def test_few_row_counts_occur_in_bfloat16_products_on_a_cpu(monkeypatch):
    """OneDNN keeps memory for each number of rows."""
    rows: list[int] = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: (rows.append(len(a)), mm(a, b))[1])
    for tokens in range(1, 1500, 100):
        shard = cache.Shard.joined({0: torch.ones(2, tokens, 5)})
        weight = torch.ones(2, 5, 3, dtype=torch.bfloat16, requires_grad=True)
        shift = torch.zeros(2, 3, dtype=torch.bfloat16)
        product = loop.layer_products(shard, Projection(weight, shift, None))
        assert product.shape == (2, tokens, 3)
    assert {*rows} == {512, 1024, 1536}
