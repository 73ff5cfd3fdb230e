"""Where a baseline's training finds tokens: one layer in memory, or all layers shard by shard.

Sliding windows over the tokens of ragged texts; a text shorter than a window is one window.

Training of small models on the tokens of cached hidden states, on the CPU.

Knows shards and labels. What a model does with the tokens, and its loss, are its own affair.

A token model on one layer, which validation texts choose.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sidelight.ragged import Ragged
from sidelight.standardisation import Standardisation
from sidelight.states.cache import Shard
from sidelight.training.batches import batches, neighbours
from sidelight.training.dataset import ProbeDataset, Split
from sidelight.training.objective import Loss, make_loss
from sidelight.training.settings import TrainingSettings
from sidelight.types import Task
from sidelight_lab.baselines.base import FittedBaseline
from sidelight_lab.baselines.linear import STEPS_AT_LEAST, train_to_best
from sidelight_lab.baselines.pooled import ranked_layers

# Enough tokens to know a mean to about a hundredth of a standard deviation.
_MOMENT_TOKENS = 8192


@dataclass(frozen=True)
class TokenSource:
    """Tokens and labels of some texts.

    Attributes:
        sizes: Texts in each shard.
        read: Gives a shard; its ``rows`` are positions in ``labels``.
        labels: As in ``Examples.labels``.
    """

    sizes: tuple[int, ...]
    read: Callable[[int], Shard]
    labels: Int[Tensor, "text ..."]

    @staticmethod
    def one_layer(split: Split, layer: int) -> "TokenSource":
        """A single shard of a single layer, in memory."""
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
        tokens = split.select(order.tolist()).tokens(layer)
        shard = Shard(tokens.values[None], tokens.lengths, order)
        return TokenSource((len(split),), lambda _index: shard, torch.from_numpy(split.labels))

    @staticmethod
    def all_layers(split: Split) -> "TokenSource":
        """The shards on disk, or one in memory if the split is part of a data set."""
        states = split.training_set().states
        sizes = tuple(len(rows) for rows in states.plan.rows)
        return TokenSource(sizes, states.read, torch.from_numpy(split.labels))

    def scaling(self) -> Standardisation:
        """Per-layer mean and scale of the first shard's first tokens."""
        return Standardisation.measured(self.read(0).hidden[:, :_MOMENT_TOKENS])


@dataclass(frozen=True)
class Windows:
    """Every run of ``size`` neighbouring tokens within a text.

    Attributes:
        size: Tokens of a window.
        starts: The first token of each window, text after text.
        sizes: Tokens of each window: ``size``, or all of a shorter text.
        counts: Windows of each text.
    """

    size: int
    starts: Int[Tensor, " window"]
    sizes: Int[Tensor, " window"]
    counts: Int[Tensor, " text"]

    @staticmethod
    def of(lengths: Int[Tensor, " text"], *, size: int) -> "Windows":
        """The windows of texts of these lengths, laid end to end."""
        counts = (lengths - size + 1).clamp(min=1)
        text = torch.arange(len(lengths)).repeat_interleave(counts)
        skipped = (lengths - counts).cumsum(0) - (lengths - counts)
        return Windows(
            size=size,
            starts=torch.arange(len(text)) + skipped[text],
            sizes=lengths.clamp(max=size)[text],
            counts=counts,
        )

    def means(self, values: Float[Tensor, "token output"]) -> Ragged:
        """The mean over each window, ``[window, output]``, the windows of a text a segment."""
        # float64: differences of running sums would lose digits.
        zero = values.new_zeros(1, values.shape[1], dtype=torch.float64)
        running = torch.cat([zero, values.double().cumsum(0)])
        sums = running[self.starts + self.sizes] - running[self.starts]
        return Ragged((sums / self.sizes[:, None]).to(values.dtype), self.counts)

    def gather(self, values: Float[Tensor, "token ..."]) -> Float[Tensor, "window size ..."]:
        """The tokens of each window; where ``mask`` is false, some other token."""
        places = self.starts[:, None] + torch.arange(self.size)
        places = places.clamp(max=len(values) - 1)
        return values.index_select(0, places.flatten()).unflatten(0, places.shape)

    def split(self, count: int) -> list["Windows"]:
        """So many windows at a time; the counts stay those of the whole."""
        pairs = zip(self.starts.split(count), self.sizes.split(count), strict=True)
        return [replace(self, starts=starts, sizes=sizes) for starts, sizes in pairs]

    @property
    def mask(self) -> Bool[Tensor, "window size"]:
        """Which of the gathered tokens are the window's own."""
        return torch.arange(self.size) < self.sizes[:, None]


_SCORED_TEXTS = 128


class TokenModel(nn.Module, ABC):
    """A classifier that reads tokens."""

    @abstractmethod
    def forward(self, batch: Shard) -> Float[Tensor, "text output"]:
        """The logits of each text."""

    @abstractmethod
    def loss(self, batch: Shard, labels: Int[Tensor, "text ..."]) -> Float[Tensor, ""]:
        """What training minimises, the mean over the texts."""


Model = TypeVar("Model", bound=TokenModel)


@dataclass(frozen=True)
class TrainedModel(Generic[Model]):
    """A model with the parameters of its best epoch.

    Attributes:
        model: Frozen.
        score: Of that epoch on validation texts; see ``validation_score``.
    """

    model: Model
    score: float

    @property
    def parameters(self) -> int:
        """Numbers that training fitted."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def train_on_tokens(
    build: Callable[[], Model],
    *,
    task: Task,
    training: TokenSource,
    validation: TokenSource,
    settings: TrainingSettings,
    seed: int,
) -> TrainedModel[Model]:
    """Fits by AdamW with a cosine schedule and early stopping; the same bytes for the same seed.

    Args:
        build: Makes the model; may draw its initial parameters from torch's random numbers.
        task: The classes.
        training: What the parameters are fitted to.
        validation: What early stopping looks at.
        settings: ``class_weight`` is the model's affair. An epoch is at least 40 steps.
        seed: Of the initial parameters and the order of the texts.

    Raises:
        SidelightError: The logits are not finite any more.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    score = train_to_best(
        model,
        _epochs(model, training, settings, seed),
        lambda: token_logits(model, validation),
        task=task,
        labels=validation.labels.numpy(),
        settings=settings,
    )
    return TrainedModel(model, score)


@torch.inference_mode()
def token_logits(model: TokenModel, source: TokenSource) -> Float[np.ndarray, "text output"]:
    """The logits of every text, in the order of the labels."""
    found: list[Tensor] = []
    rows: list[Tensor] = []
    for index in range(len(source.sizes)):
        shard = source.read(index)
        texts = len(shard.rows)
        for batch in neighbours(shard, [*range(0, texts, _SCORED_TEXTS), texts]):
            found.append(model(batch))
            rows.append(batch.rows)
    return torch.cat(found)[torch.cat(rows).argsort()].numpy()


def _epochs(
    model: TokenModel, training: TokenSource, settings: TrainingSettings, seed: int
) -> Iterator[None]:
    """Trains on each request for another epoch."""
    size = settings.batch_size
    steps = max(STEPS_AT_LEAST, sum(math.ceil(texts / size) for texts in training.sizes))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.epochs * steps)
    stream = _batches(training, size=size, shuffle=torch.Generator().manual_seed(seed))
    while True:
        for batch in islice(stream, steps):
            model.loss(batch, training.labels[batch.rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        yield


def _batches(source: TokenSource, *, size: int, shuffle: torch.Generator) -> Iterator[Shard]:
    """Batches without end: shards in random order, each with a random first cut."""
    while True:
        for index in torch.randperm(len(source.sizes), generator=shuffle).tolist():
            yield from batches(source.read(index), size=size, shuffle=shuffle)


class OneLayer(TokenModel):
    """Standardises a layer's tokens and hands them to a network.

    Args:
        scaling: Of the layer.
        network: From the ragged tokens, float32, to the logits of each text.
        loss: Of logits and labels.
    """

    def __init__(self, scaling: Standardisation, network: nn.Module, loss: Loss):
        super().__init__()
        self._scaling = scaling
        self._network = network
        self._loss = loss

    def forward(self, batch: Shard) -> Float[Tensor, "text output"]:
        """The network's logits."""
        tokens = (batch.hidden[0].float() - self._scaling.mean[0]) / self._scaling.scale[0]
        return self._network(Ragged(tokens, batch.lengths))

    def loss(self, batch: Shard, labels: Int[Tensor, "text ..."]) -> Float[Tensor, ""]:
        """The task's cross-entropy."""
        return self._loss(self(batch), labels)


@dataclass(frozen=True)
class SingleLayerRival(FittedBaseline):
    """A trained model of one layer's tokens.

    Attributes:
        layer: The one it reads.
        model: Trained.
    """

    layer: int
    model: OneLayer

    def logits(self, split: Split) -> Float[np.ndarray, "text output"]:
        """Reads the layer's states."""
        return token_logits(self.model, TokenSource.one_layer(split, self.layer))


def fit_single_layer(
    dataset: ProbeDataset,
    network: Callable[[int, int], nn.Module],
    *,
    layers: int,
    settings: TrainingSettings,
    seed: int,
) -> SingleLayerRival:
    """Trains on each of the most promising layers and keeps the best by validation score.

    Args:
        study: The data.
        network: Makes an untrained network for a width and a number of outputs.
        layers: How many to train on; see ``ranked_layers``.
        settings: Of the optimisation.
        seed: Of everything random.
    """
    tried = {
        layer: _trained(dataset, layer, network, settings, seed)
        for layer in ranked_layers(dataset)[:layers]
    }
    layer = max(tried, key=lambda each: tried[each].score)
    return SingleLayerRival(tried[layer].parameters, layer, tried[layer].model)


def _trained(
    dataset: ProbeDataset,
    layer: int,
    network: Callable[[int, int], nn.Module],
    settings: TrainingSettings,
    seed: int,
) -> TrainedModel[OneLayer]:
    training = TokenSource.one_layer(dataset.training, layer)
    width = dataset.backbone.fingerprint.width
    loss = make_loss(dataset.task, training.labels, balanced=settings.class_weight == "balanced")
    return train_on_tokens(
        lambda: OneLayer(training.scaling(), network(width, dataset.task.outputs), loss),
        task=dataset.task,
        training=training,
        validation=TokenSource.one_layer(dataset.validation, layer),
        settings=settings,
        seed=seed,
    )
