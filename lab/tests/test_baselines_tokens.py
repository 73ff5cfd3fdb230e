"""Baselines that read token states: what they compute, that they learn, and that seeds decide."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from corpora import TASKS, planted
from sidelight.data.examples import Example, LabelledExamples
from sidelight.errors import SidelightError
from sidelight.prompts import Message, Reads
from sidelight.ragged import Ragged
from sidelight.standardisation import Standardisation
from sidelight.states.cache import Shard
from sidelight.training.dataset import ProbeDataset, make_split
from sidelight.training.optimisation import validation_score
from sidelight.training.settings import FitOptions, TrainingSettings
from sidelight_lab.baselines.token_heads import (
    AttentionHeads,
    AttentionProbe,
    BestLayer,
    Concatenated,
    MlpHeads,
    RollingHeads,
    RollingMax,
    SmoothedLinear,
)
from sidelight_lab.baselines.training import (
    TokenSource,
    ranked_layers,
    token_logits,
    train_on_tokens,
)

SIZES = {"training": 200, "validation": 80, "held out": 120}
QUICK = TrainingSettings(learning_rate=1e-2, epochs=3, patience=3)
BRIEF = replace(QUICK, epochs=1)
BASELINES = [
    AttentionProbe(layers=1, settings=QUICK),
    MlpHeads(layers=1, settings=QUICK),
    RollingMax(layers=1, settings=QUICK),
    Concatenated(settings=replace(QUICK, learning_rate=3e-2)),
]
EVERY = pytest.mark.parametrize("baseline", BASELINES, ids=lambda each: type(each).__name__)
# Texts around and below the windows' sizes, one of a single token among them.
LENGTHS = torch.tensor([3, 1, 25, 10, 16, 17])


@pytest.fixture(scope="module")
def splits(tiny, tmp_path_factory):
    """For each kind of task its training, validation and held-out texts."""
    root = tmp_path_factory.mktemp("activations")

    def split(kind, count, seed):
        texts, labels = planted(kind, count, seed=seed)
        items = tuple(Example((Message("user", text),)) for text in texts)
        examples = LabelledExamples(items, ({},) * count, task=TASKS[kind], labels=labels)
        return make_split(tiny, examples, FitOptions(max_tokens=256, cache_root=root))

    return {
        kind: {name: split(kind, count, seed) for seed, (name, count) in enumerate(SIZES.items())}
        for kind in TASKS
    }


def dataset_of(tiny, splits, kind="binary"):
    return ProbeDataset(tiny, splits[kind]["training"], splits[kind]["validation"])


def held_out_score(fitted, split):
    return validation_score(split.task, fitted.logits(split), split.labels)


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("kind", TASKS)
def test_every_baseline_learns_a_planted_signal(tiny, splits, baseline, kind):
    fitted = baseline.fit(dataset_of(tiny, splits, kind), seed=0)
    # Chance is 0.4 for the binary and multi-label tasks, a third for the multi-class one.
    assert held_out_score(fitted, splits[kind]["held out"]) > 0.8


@pytest.mark.slow
@EVERY
def test_a_few_texts_of_a_data_set_are_enough_to_fit_to(tiny, splits, baseline):
    training = splits["binary"]["training"]
    few = np.concatenate([np.flatnonzero(training.labels == value)[:16] for value in (1, 0)])
    dataset = ProbeDataset(tiny, training.select(few), splits["binary"]["validation"])
    fitted = baseline.fit(dataset, seed=0)
    assert held_out_score(fitted, splits["binary"]["held out"]) > 0.55


@pytest.mark.slow
@EVERY
def test_the_seed_decides_every_byte(tiny, splits, baseline):
    dataset, test = dataset_of(tiny, splits), splits["binary"]["held out"]
    quick = replace(baseline, settings=BRIEF)
    torch.manual_seed(1)
    first = quick.fit(dataset, seed=0).logits(test)
    torch.manual_seed(2)
    expected = torch.rand(1)
    torch.manual_seed(2)
    again, other = (quick.fit(dataset, seed=seed).logits(test) for seed in (0, 1))
    assert torch.equal(torch.rand(1), expected), "the caller's random state is left alone"
    assert again.tobytes() == first.tobytes()
    assert other.tobytes() != first.tobytes()


@pytest.mark.slow
@EVERY
def test_logits_follow_the_texts(tiny, splits, baseline):
    fitted = replace(baseline, settings=BRIEF).fit(dataset_of(tiny, splits), seed=0)
    test = splits["binary"]["held out"]
    some = [70, 3, 11, 119]
    # Batches differ, and states are bf16 in one of the baselines.
    np.testing.assert_allclose(
        fitted.logits(test.select(some)), fitted.logits(test)[some], rtol=1e-3, atol=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_parameters_are_counted_exactly(tiny, splits, kind):
    # Width 32, 4 layers of states.
    features = (32 * 100 + 100) + (100 * 100 + 100)
    expected = {
        "binary": [8 * 32 * 2 + 1, *[features + 10 * 100 * 2 + 1] * 2, 4 * 32 + 1],
        "multiclass": [8 * 32 * 4 + 3, *[features + 10 * 100 * 4 + 3] * 2, 3 * (4 * 32 + 1)],
    }
    dataset = dataset_of(tiny, splits, kind)
    fitted = [replace(baseline, settings=BRIEF).fit(dataset, seed=0) for baseline in BASELINES]
    assert [fitted.parameters for fitted in fitted] == expected[kind]


def random_tokens(width=6):
    return Ragged(torch.randn(int(LENGTHS.sum()), width), LENGTHS)


def shaken(module):
    """Larger parameters than the initial ones, so that weights are far from uniform."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module.requires_grad_(False)


def test_attention_equals_a_padded_dense_computation():
    torch.manual_seed(0)
    tokens, heads = random_tokens(), shaken(AttentionHeads(6, 2, heads=3))
    padded = torch.nn.utils.rnn.pad_sequence([part.values for part in tokens.split()], True, 1e3)
    mask = torch.arange(padded.shape[1]) < LENGTHS[:, None]
    scores = (padded @ heads.query).masked_fill(~mask[..., None], -torch.inf)
    values = torch.einsum("btd,dko->btko", padded, heads.value)
    dense = torch.einsum("btk,btko->bo", scores.softmax(1), values) + heads.bias
    # float32 sums in another order.
    torch.testing.assert_close(heads(tokens), dense, rtol=1e-4, atol=1e-4)


def test_rolling_attention_and_its_gradients_equal_a_literal_loop():
    torch.manual_seed(0)
    tokens, rolling = random_tokens(), RollingHeads(6, 2, heads=3, window=10)
    shaken(rolling).requires_grad_(True)
    expected = []
    for text in tokens.split():
        means = []
        for start in range(max(1, len(text.values) - 9)):
            window = text.values[start : start + 10]
            weights = (window @ rolling.query).softmax(0)
            values = torch.einsum("td,dko->tko", window, rolling.value)
            means.append((weights[..., None] * values).sum(0))
        expected.append(torch.stack(means).amax(0).sum(0) + rolling.bias)
    parameters = [*rolling.parameters()]
    pairs = zip(
        *(
            [logits, *torch.autograd.grad(logits.square().sum(), parameters)]
            for logits in (rolling(tokens), torch.stack(expected))
        ),
        strict=True,
    )
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_text_within_one_window_is_read_by_plain_attention():
    torch.manual_seed(0)
    heads, rolling = AttentionHeads(6, 2, heads=3), RollingHeads(6, 2, heads=3, window=30)
    rolling.load_state_dict(shaken(heads).state_dict())
    tokens = random_tokens()
    torch.testing.assert_close(rolling(tokens), heads(tokens), rtol=1e-4, atol=1e-4)


def smoothed_literally(logits, size):
    """For each text the mean of every run of ``size`` tokens, or of all if there are fewer."""
    return [
        torch.stack([part[i : i + size].mean(0) for i in range(max(1, len(part) - size + 1))])
        for part in logits.split(LENGTHS.tolist())
    ]


@pytest.mark.parametrize("kind", TASKS)
def test_smoothed_probe_and_its_loss_equal_a_literal_loop(kind):
    torch.manual_seed(0)
    hidden = torch.randn(4, int(LENGTHS.sum()), 6)
    scaling = Standardisation(torch.randn(4, 6), torch.rand(4, 6) + 0.5)
    model = shaken(SmoothedLinear(scaling, TASKS[kind], window=16))
    batch = Shard(hidden, LENGTHS, torch.arange(6))
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    target = labels[:, None].float()
    if kind == "multiclass":
        target = functional.one_hot(labels, 3).float()
    if kind == "multilabel":
        labels = torch.eye(3, dtype=torch.long).repeat(2, 1)
        target = labels.float()
    inputs = (hidden - scaling.mean[:, None]) / scaling.scale[:, None]
    texts = smoothed_literally(torch.einsum("ltd,ldo->to", inputs, model.weight) + model.bias, 16)
    tight = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(model(batch), torch.stack([z.amax(0) for z in texts]), **tight)
    losses = []
    for z, wanted in zip(texts, target, strict=True):
        each = -(wanted * functional.logsigmoid(z) + (1 - wanted) * functional.logsigmoid(-z))
        losses.append((z.softmax(0) * each).sum(0))
    torch.testing.assert_close(model.loss(batch, labels), torch.stack(losses).mean(), **tight)


def test_large_means_leave_no_rounding_in_smoothed_logits():
    torch.manual_seed(0)
    # A dimension far from zero, as residual streams have: its part of a logit is in the hundreds.
    hidden = torch.randn(2, int(LENGTHS.sum()), 6) + torch.tensor([400.0, 0, 0, 0, 0, 0])
    hidden = hidden.bfloat16()
    scaling = Standardisation.measured(hidden)
    model = shaken(SmoothedLinear(scaling, TASKS["binary"], window=16))
    inputs = (hidden.double() - scaling.mean[:, None]) / scaling.scale[:, None]
    logits = torch.einsum("ltd,ldo->to", inputs, model.weight.double()) + model.bias
    wanted = torch.stack([z.amax(0) for z in smoothed_literally(logits, 16)])
    # float32's rounding of hundreds; bf16's would be about one.
    found = model(Shard(hidden, LENGTHS, torch.arange(6)))
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", TASKS)
def test_layers_are_ranked_as_ridge_regressions_rank_them(tiny, splits, kind):
    """Against the closed form."""
    dataset = dataset_of(tiny, splits, kind)
    task, train, held_out = dataset.task, dataset.training, dataset.validation
    target = np.eye(3)[train.labels] if kind == "multiclass" else train.labels.reshape(200, -1)
    scores = []
    for layer in range(4):
        fitted_to = train.pooled.means[:, layer].double().numpy()
        mean, scale = fitted_to.mean(0), fitted_to.std(0)
        inputs = (fitted_to - mean) / scale
        unseen = (held_out.pooled.means[:, layer].numpy() - mean) / scale
        moments = inputs.T @ (target - target.mean(0)) / len(inputs)
        logits = [
            unseen
            @ np.linalg.solve(inputs.T @ inputs / len(inputs) + penalty * np.eye(32), moments)
            + target.mean(0)
            for penalty in (0.01, 0.1, 1.0, 10.0)
        ]
        scores.append(max(validation_score(task, each, held_out.labels) for each in logits))
    ranks = ranked_layers(dataset)
    assert sorted(ranks) == list(range(4))
    # Equal to rounding, whichever of two equal layers comes first.
    np.testing.assert_allclose(np.array(scores)[ranks], sorted(scores, reverse=True), atol=0.01)


def test_all_texts_in_another_order_keep_their_labels(splits):
    whole = splits["binary"]["validation"]
    turned = whole.select(range(len(whole) - 1, -1, -1))
    for split in (whole, turned):
        states = split.own_states()
        assert split.labels.tolist() == whole.labels[split.rows].tolist()
        for shard in map(states.read, range(len(states))):
            prompts = [split.prompts[text] for text in shard.rows.tolist()]
            assert shard.lengths.tolist() == [int(one.mask(Reads()).sum()) for one in prompts]


class Blind(torch.nn.Module):
    """The same logit for every text."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens):
        return self.bias.expand(len(tokens.lengths), 1)


@dataclass(frozen=True)
class Given(BestLayer):
    """Trains these networks, one on each layer."""

    networks: Iterator[torch.nn.Module]
    layers: int = 3
    settings: TrainingSettings = BRIEF

    def network(self, width, outputs):
        return next(self.networks)


@pytest.mark.parametrize("seeing", [0, 1, 2])
def test_the_best_of_the_tried_layers_is_kept_and_read(tiny, splits, seeing):
    dataset, test = dataset_of(tiny, splits), splits["binary"]["held out"]
    networks = [AttentionHeads(32, 1, heads=2) if i == seeing else Blind() for i in range(3)]
    left = iter(networks)
    fitted = Given(left).fit(dataset, seed=0)
    assert next(left, None) is None, "as many layers are tried as were asked for"
    assert fitted.parameters == 2 * 32 * 2 + 1
    layer = ranked_layers(dataset)[seeing]
    scaling = TokenSource.one_layer(dataset.training, layer).scaling()
    tokens = test.tokens(layer)
    values = (tokens.values.float() - scaling.mean[0]) / scaling.scale[0]
    expected = networks[seeing](Ragged(values, tokens.lengths))
    np.testing.assert_allclose(fitted.logits(test), expected, rtol=1e-4, atol=1e-4)


class Counting(torch.nn.Module):
    """A logit that grows with every step; counts the steps and the texts that it has seen."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.ones(()))
        self.steps = 0
        self.seen = []

    def forward(self, batch):
        return batch.hidden[0, batch.lengths.cumsum(0) - 1] * self.slope

    def loss(self, batch, labels):
        self.steps += 1
        self.seen += batch.rows.tolist()
        return functional.binary_cross_entropy_with_logits(self(batch)[:, 0], labels.float())


def source_of(values, labels):
    shard = Shard(
        torch.tensor(values).reshape(1, -1, 1),
        torch.ones(len(values), dtype=torch.long),
        torch.arange(len(values)),
    )
    return TokenSource((len(values),), lambda _: shard, torch.tensor(labels))


def score_of(model, settings, *, validation=((1.0, 2.0), (0, 1))):
    return train_on_tokens(
        model,
        model.loss,
        task=TASKS["binary"],
        training=source_of([-1.0, 1.0, 2.0], [0, 1, 0]),
        validation=source_of(*validation),
        settings=settings,
        seed=0,
    )


def test_an_epoch_of_few_texts_repeats_them_until_forty_steps():
    model = Counting()
    score_of(model, replace(BRIEF, batch_size=1))
    assert model.steps == 40
    assert {text: model.seen.count(text) for text in range(3)} in (
        {0: 14, 1: 13, 2: 13},
        {0: 13, 1: 14, 2: 13},
        {0: 13, 1: 13, 2: 14},
    )


def test_training_stops_when_its_patience_is_over_and_keeps_the_first_of_equals():
    model, after_one = Counting(), Counting()
    assert score_of(model, replace(QUICK, epochs=9, patience=2)) == 1.0
    assert model.steps == 3 * 40
    score_of(after_one, replace(QUICK, epochs=9, patience=1))
    assert after_one.steps == 2 * 40
    assert model.slope == after_one.slope
    assert not model.slope.requires_grad


def test_logits_that_are_not_finite_are_an_error_that_names_the_rate():
    with pytest.raises(SidelightError, match=r"Lower its learning rate \(it was 0.01\)"):
        score_of(Counting(), QUICK, validation=((1.0, torch.inf), (0, 1)))


def test_texts_are_scored_in_the_order_of_their_labels(splits):
    split = splits["binary"]["validation"]
    source = TokenSource.one_layer(split, 2)

    class LastToken(Counting):
        def forward(self, batch):
            return batch.hidden[0, batch.lengths.cumsum(0) - 1].float()

    np.testing.assert_array_equal(token_logits(LastToken(), source), split.pooled.lasts[:, 2])
