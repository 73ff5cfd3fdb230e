"""Baselines that read token states: what they compute, that they learn, and that seeds decide."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.nn import functional

import wordings
from sidelight.errors import SidelightError
from sidelight.probes.ragged import Ragged
from sidelight.probes.standardisation import Standardisation
from sidelight.states.cache import Shard, write_tensors
from sidelight.training.optimisation import validation_score
from sidelight.training.preparing import ProbeDataset
from sidelight.training.settings import TrainingSettings
from sidelight_lab.baselines.token_heads import (
    AttentionProbe,
    BestLayer,
    Concatenated,
    MlpHeads,
    RollingMax,
    SmoothedLinear,
    TokenHeads,
)
from sidelight_lab.baselines.training import (
    TokenSource,
    ranked_layers,
    train_on_tokens,
)
from worlds.data import TASKS, planted, split_of

pytestmark = pytest.mark.slow
SIZES = {"training": 200, "validation": 80, "held out": 100}
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
    return {
        kind: {
            name: split_of(tiny, root, kind, count, seed)
            for seed, (name, count) in enumerate(SIZES.items())
        }
        for kind in TASKS
    }


def dataset_of(tiny, splits, kind="binary"):
    return ProbeDataset.held_out(tiny, splits[kind]["training"], splits[kind]["validation"])


# Width 32, 4 layers of states: parameters by the number of outputs.
FEATURES = (32 * 100 + 100) + (100 * 100 + 100)
PARAMETERS = {
    AttentionProbe: lambda outputs: 8 * 32 * (1 + outputs) + outputs,
    MlpHeads: lambda outputs: FEATURES + 10 * 100 * (1 + outputs) + outputs,
    RollingMax: lambda outputs: FEATURES + 10 * 100 * (1 + outputs) + outputs,
    Concatenated: lambda outputs: (4 * 32 + 1) * outputs,
}


@EVERY
@pytest.mark.parametrize("kind", TASKS)
def test_baselines_learn_planted_signal_and_count_parameters(tiny, splits, baseline, kind):
    fitted, test = baseline.fit(dataset_of(tiny, splits, kind), seed=0), splits[kind]["held out"]
    # Chance is 0.4 for the binary and multi-label tasks, a third for the multi-class one.
    assert validation_score(test.task, fitted.logits(test), test.labels) > 0.8
    assert fitted.parameters == PARAMETERS[type(baseline)](TASKS[kind].outputs)


@EVERY
def test_seed_determines_logits_and_leaves_global_random_state_unchanged(tiny, splits, baseline):
    dataset, test = dataset_of(tiny, splits), splits["binary"]["held out"]
    quick = replace(baseline, settings=BRIEF)
    fitted = quick.fit(dataset, seed=0)
    first = fitted.logits(test)
    torch.manual_seed(2)
    expected = torch.rand(1)
    torch.manual_seed(2)
    again, another = (quick.fit(dataset, seed=seed).logits(test) for seed in (0, 1))
    assert torch.equal(torch.rand(1), expected), "the caller's random state is left alone"
    assert again.tobytes() == first.tobytes()
    assert another.tobytes() != first.tobytes()
    some = [70, 3, 11, 99]
    # Batches differ, and states are bf16 in one of the baselines.
    np.testing.assert_allclose(fitted.logits(test.select(some)), first[some], rtol=1e-3, atol=1e-3)


def random_tokens(width=6):
    return Ragged(torch.randn(int(LENGTHS.sum()), width), LENGTHS)


def shaken(module):
    """Larger parameters than the initial ones, so that weights are far from uniform."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module.requires_grad_(False)


def test_attention_matches_a_padded_dense_computation():
    torch.manual_seed(0)
    tokens, heads = random_tokens(), shaken(TokenHeads(6, 2, heads=3))
    padded = torch.nn.utils.rnn.pad_sequence([text.values for text in tokens.split()], True, 1e3)
    mask = torch.arange(padded.shape[1]) < LENGTHS[:, None]
    scores = (padded @ heads.query).masked_fill(~mask[..., None], -torch.inf)
    values = torch.einsum("btd,dko->btko", padded, heads.value)
    dense = torch.einsum("btk,btko->bo", scores.softmax(1), values) + heads.bias
    # float32 sums in another order.
    torch.testing.assert_close(heads(tokens), dense, rtol=1e-4, atol=1e-4)


def test_rolling_attention_and_gradients_match_a_literal_loop():
    torch.manual_seed(0)
    tokens, rolling = random_tokens(), TokenHeads(6, 2, heads=3, window=10)
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
    found, wanted = (
        [logits, *torch.autograd.grad(logits.square().sum(), [*rolling.parameters()])]
        for logits in (rolling(tokens), torch.stack(expected))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", TASKS)
def test_smoothed_probe_and_loss_match_a_literal_loop(kind):
    torch.manual_seed(0)
    # A dimension far from zero, as residual streams have: its part of a logit is in the hundreds.
    hidden = torch.randn(4, int(LENGTHS.sum()), 6) + torch.tensor([400.0, 0, 0, 0, 0, 0])
    hidden = hidden.bfloat16()
    scaling = Standardisation.measured(hidden)
    model = shaken(SmoothedLinear(scaling, TASKS[kind], window=16))
    batch = Shard(hidden, LENGTHS, torch.arange(6))
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    target = labels[:, None].double()
    if kind == "multiclass":
        target = functional.one_hot(labels, 3).double()
    if kind == "multilabel":
        labels = torch.eye(3, dtype=torch.long).repeat(2, 1)
        target = labels.double()
    inputs = (hidden.double() - scaling.mean[:, None]) / scaling.scale[:, None]
    logits = torch.einsum("ltd,ldo->to", inputs, model.weight.double()) + model.bias
    # For each text the mean of every run of 16 tokens, or of all if there are fewer.
    texts = [
        torch.stack([text[i : i + 16].mean(0) for i in range(max(1, len(text) - 15))])
        for text in logits.split(LENGTHS.tolist())
    ]
    # float32's rounding of hundreds; bf16's would be about one.
    close = {"rtol": 0, "atol": 1e-3}
    wanted = torch.stack([z.amax(0) for z in texts])
    torch.testing.assert_close(model(batch).double(), wanted, **close)
    losses = []
    for z, wanted in zip(texts, target, strict=True):
        each = -(wanted * functional.logsigmoid(z) + (1 - wanted) * functional.logsigmoid(-z))
        losses.append((z.softmax(0) * each).sum(0))
    # It is taken in the states' own dtype.
    loss = model.loss(Shard(hidden.float(), LENGTHS, torch.arange(6)), labels).double()
    torch.testing.assert_close(loss, torch.stack(losses).mean(), **close)


@pytest.mark.parametrize("kind", TASKS)
def test_layers_are_ranked_by_class_separation(tiny, tmp_path, kind):
    random, labels = np.random.default_rng(0), planted(kind, 400, seed=0)[1]
    targets = np.eye(3)[labels] if kind == "multiclass" else labels.reshape(400, -1)
    layers = [targets + noise * random.normal(size=targets.shape) for noise in (3.0, 0.3, 1.0)]
    means = torch.from_numpy(np.stack(layers, 1)).float()
    full = split_of(tiny, tmp_path, kind, 400, seed=0, is_extracted=False)
    training, validation = (full.select(rows) for rows in (range(200), range(200, 400)))
    for split, split_means in zip((training, validation), means.split(200), strict=True):
        path = split.states.directory / f"{split.states.key}-pooled.safetensors"
        write_tensors({"means": split_means.clone(), "lasts": split_means.bfloat16()}, path)
    assert ranked_layers(ProbeDataset.held_out(tiny, training, validation)) == [1, 2, 0]


class Blind(torch.nn.Module):
    """The same logit for every text."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens):
        return self.bias.expand(len(tokens.lengths), 1)


@dataclass(frozen=True)
class FixedLayer(BestLayer):
    """Trains these networks, one on each layer."""

    networks: Iterator[torch.nn.Module]
    layers: int = 3
    settings: TrainingSettings = BRIEF

    def network(self, width, outputs):
        return next(self.networks)


@pytest.mark.parametrize("seeing", [0, 2])
def test_best_of_the_tried_layers_is_selected(tiny, splits, seeing):
    dataset, test = dataset_of(tiny, splits), splits["binary"]["held out"]
    networks = [TokenHeads(32, 1, heads=2) if i == seeing else Blind() for i in range(3)]
    left = iter(networks)
    fitted = FixedLayer(left).fit(dataset, seed=0)
    assert next(left, None) is None, "as many layers are tried as were asked for"
    assert fitted.parameters == 2 * 32 * 2 + 1
    layer = ranked_layers(dataset)[seeing]
    scaling = TokenSource.one_layer(dataset.training, layer).scaling()
    source = TokenSource.one_layer(test, layer)
    shard = source.read(source.shards[0])
    values = (shard.hidden[0].float() - scaling.mean[0]) / scaling.scale[0]
    expected = networks[seeing](Ragged(values, shard.lengths))[shard.rows.argsort()]
    np.testing.assert_allclose(fitted.logits(test), expected, rtol=1e-4, atol=1e-4)


class Counting(torch.nn.Module):
    """A logit that grows with every step; counts the steps."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.ones(()))
        self.steps = 0

    def forward(self, batch):
        return batch.hidden[0, batch.lengths.cumsum(0) - 1] * self.slope

    def loss(self, batch, labels):
        self.steps += 1
        return functional.binary_cross_entropy_with_logits(self(batch)[:, 0], labels.float())


def source_of(values, labels):
    count = len(values)
    hidden = torch.tensor(values).reshape(1, -1, 1)

    def read(texts):
        return Shard.joined({text: hidden[:, [text]] for text in texts})

    return TokenSource([range(count)], read, torch.tensor(labels))


def trained(model, settings, *, validation=((1.0, 2.0), (0, 1))):
    train_on_tokens(
        model,
        model.loss,
        task=TASKS["binary"],
        training=source_of([-1.0, 1.0, 2.0], [0, 1, 0]),
        validation=source_of(*validation),
        settings=settings,
        seed=0,
    )


def test_early_stopping_keeps_the_first_of_equal_epochs():
    model, after_one = Counting(), Counting()
    trained(model, replace(QUICK, epochs=9, patience=2))
    assert model.steps == 3 * 40
    trained(after_one, replace(QUICK, epochs=9, patience=1))
    assert after_one.steps == 2 * 40
    assert model.slope == after_one.slope
    assert not model.slope.requires_grad
    # Logits that are not finite are an error that names the rate.
    with pytest.raises(SidelightError, match=wordings.BASELINE_DIVERGED.format(rate="0.01")):
        trained(Counting(), QUICK, validation=((1.0, torch.inf), (0, 1)))
