"""Training of small models on the tokens of cached hidden states, on the CPU.

Knows shards and labels. What a model does with the tokens, and its loss, are its own affair.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sidelight.baselines.early_stopping import STEPS_AT_LEAST, train_to_best
from sidelight.baselines.token_source import TokenSource
from sidelight.cache import Shard
from sidelight.training import TrainingSettings, batches, neighbours
from sidelight.types import Task

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
