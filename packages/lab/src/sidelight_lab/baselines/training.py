"""Training of small networks on the CPU: the loop, and the token data for token-level models."""

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional

from sidelight.errors import SidelightError
from sidelight.probes.standardisation import Standardisation
from sidelight.states.cache import Shard, random_batches
from sidelight.training.dataset import Split
from sidelight.training.optimisation import validation_score
from sidelight.training.preparing import ProbeDataset
from sidelight.training.settings import TrainingSettings
from sidelight.types import Task
from sidelight_lab.baselines.pooled import pooled_states

Batch = TypeVar("Batch")
# With few texts, an epoch repeats them, because a handful of steps is too few to show progress.
STEPS_AT_LEAST = 40
# Enough tokens to estimate a mean to within about a hundredth of a standard deviation.
_MOMENT_TOKENS = 8192
_SCORED_TEXTS = 128
# Penalties for features of variance 1, relative to the mean over texts, from weak to dominant.
_RIDGE_PENALTIES = (0.01, 0.1, 1.0, 10.0)


def train(
    model: nn.Module,
    data: Iterator[Batch],
    loss: Callable[[Batch], Float[Tensor, ""]],
    validation_logits: Callable[[], Float[np.ndarray, "text output"]],
    *,
    task: Task,
    labels: np.ndarray,
    steps: int,
    settings: TrainingSettings,
) -> None:
    """Train with AdamW, a cosine schedule and early stopping.

    Afterwards, the model is frozen at its best epoch, or the first of several equally good ones.

    Args:
        model: Trained in place.
        data: Endless batches.
        loss: Function that returns the mean loss of a batch.
        validation_logits: Function that returns the model's logits of the validation texts.
        task: The classes.
        labels: Labels of the validation texts.
        steps: Batches per epoch; the minimum is 40.
        settings: Optimisation settings; ``loss`` must apply ``class_weight`` itself.

    Raises:
        SidelightError: The logits are no longer finite.
    """
    steps = max(STEPS_AT_LEAST, steps)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.epochs * steps)
    best_score, best_epoch, best_state = -math.inf, 0, deepcopy(model.state_dict())
    for epoch in range(settings.epochs):
        for batch in islice(data, steps):
            loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        with torch.inference_mode():
            logits = finite(validation_logits(), learning_rate=settings.learning_rate)
        score = validation_score(task, logits, labels)
        if score > best_score:
            best_score, best_epoch, best_state = score, epoch, deepcopy(model.state_dict())
        if epoch - best_epoch >= settings.patience:
            break
    model.load_state_dict(best_state)
    model.requires_grad_(False)


def finite(
    logits: Float[np.ndarray, "text output"], *, learning_rate: float
) -> Float[np.ndarray, "text output"]:
    """Return the logits unchanged.

    Raises:
        SidelightError: A logit is NaN or infinite.
    """
    if not np.isfinite(logits).all():
        raise SidelightError(
            "Training a baseline diverged: its logits are not finite. Lower the learning rate "
            f"(it was {learning_rate})."
        )
    return logits


@dataclass(frozen=True)
class TokenSource:
    """Tokens and labels of some texts: one layer in memory, or all layers from disk.

    Attributes:
        shards: Texts that are stored together, as positions in ``labels``; each text occurs once.
        read: Function that returns some texts of a shard.
        labels: As in ``LabelledExamples.labels``.
    """

    shards: Sequence[Sequence[int]]
    read: Callable[[Sequence[int]], Shard]
    labels: Int[Tensor, "text ..."]

    @staticmethod
    def one_layer(split: Split, layer: int) -> "TokenSource":
        """A single shard of a single layer, in memory."""
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
        hidden = {row: split.states.text(row)[[layer]].clone() for row in order.tolist()}

        def read(texts: Sequence[int]) -> Shard:
            return Shard.joined({text: hidden[text] for text in texts})

        return TokenSource([[*hidden]], read, torch.from_numpy(split.labels))

    @staticmethod
    def all_layers(split: Split) -> "TokenSource":
        """All layers, in the shards on disk."""
        states = split.states
        return TokenSource(states.shards, states.read, torch.from_numpy(split.labels))

    def scaling(self) -> Standardisation:
        """Per-layer mean and scale of the first shard's first tokens."""
        return Standardisation.measured(self.read(self.shards[0]).hidden[:, :_MOMENT_TOKENS])

    def batches(self, *, size: int, seed: int) -> Iterator[Shard]:
        """Endless batches: shards in random order, each with a random offset."""
        shuffle = torch.Generator().manual_seed(seed)
        while True:
            for index in torch.randperm(len(self.shards), generator=shuffle).tolist():
                batches = random_batches(self.shards[index], size=size, shuffle=shuffle)
                yield from map(self.read, batches)


@torch.inference_mode()
def token_logits(
    model: Callable[[Shard], Tensor], source: TokenSource
) -> Float[np.ndarray, "text output"]:
    """Logits of all texts, in the order of the labels."""
    found: list[Tensor] = []
    rows: list[Tensor] = []
    for shard in source.shards:
        for start in range(0, len(shard), _SCORED_TEXTS):
            batch = source.read(shard[start : start + _SCORED_TEXTS])
            found.append(model(batch))
            rows.append(batch.rows)
    return torch.cat(found)[torch.cat(rows).argsort()].numpy()


def train_on_tokens(
    model: nn.Module,
    loss: Callable[[Shard, Tensor], Float[Tensor, ""]],
    *,
    task: Task,
    training: TokenSource,
    validation: TokenSource,
    settings: TrainingSettings,
    seed: int,
) -> None:
    """Train a model that reads shards; see ``train``. ``seed`` sets the order of the texts."""
    size = settings.batch_size
    train(
        model,
        training.batches(size=size, seed=seed),
        lambda batch: loss(batch, training.labels[batch.rows]),
        lambda: token_logits(model, validation),
        task=task,
        labels=validation.labels.numpy(),
        steps=sum(math.ceil(len(shard) / size) for shard in training.shards),
        settings=settings,
    )


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def ranked_layers(dataset: ProbeDataset) -> list[int]:
    """All layers, in descending order of validation score; ties keep the order of layers.

    The score is that of a ridge regression on the layer's mean tokens, with the layer's best
    penalty; the closed form takes seconds for all layers. Mean tokens are only a proxy: a probe
    that weighs tokens may do better on another layer near the top of the list, so train it on a few
    of them.
    """
    validation = dataset.validation
    targets = class_targets(torch.from_numpy(dataset.training.labels), dataset.task).numpy()

    def score(train: np.ndarray, unseen: np.ndarray) -> float:
        scaler: Any = StandardScaler().fit(train)
        inputs, unseen = scaler.transform(train), scaler.transform(unseen)
        fits = [Ridge(penalty * len(inputs)).fit(inputs, targets) for penalty in _RIDGE_PENALTIES]
        logits = [fit.predict(unseen).reshape(len(unseen), -1) for fit in fits]
        return max(validation_score(dataset.task, each, validation.labels) for each in logits)

    pairs = zip(
        *(pooled_states(split)[0].unbind(1) for split in (dataset.training, validation)),
        strict=True,
    )
    scores = [score(train.numpy(), unseen.numpy()) for train, unseen in pairs]
    return sorted(range(len(scores)), key=lambda layer: -scores[layer])


def class_targets(labels: Int[Tensor, "text ..."], task: Task) -> Float[Tensor, "text output"]:
    """Targets for each output: 1 if the text has its class, else 0."""
    if task.kind == "multiclass":
        return functional.one_hot(labels, task.outputs).float()
    return labels.to(torch.float32).reshape(len(labels), -1)
