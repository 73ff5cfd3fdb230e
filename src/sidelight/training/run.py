"""The training loss of each kind of task.

What is known of the hidden states before training, from the first shards of the cache.

Shards are random samples of the texts.

One mechanism on its way through training: parameters, optimiser, and its best epoch.
"""

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.nn import functional

from sidelight.errors import SidelightError
from sidelight.mechanisms.base import Geometry, Mechanism
from sidelight.ragged import Ragged
from sidelight.standardisation import Standardisation
from sidelight.states.cache import States
from sidelight.states.pooled import Pooled, pool_shard
from sidelight.training.batches import among_others
from sidelight.training.layer_weights import TEXTS
from sidelight.training.settings import Job
from sidelight.types import Task

Loss = Callable[[Tensor, Tensor], Tensor]


def make_loss(task: Task, labels: Int[Tensor, "text ..."], *, balanced: bool) -> Loss:
    """Cross-entropy for the task, weighted by inverse class frequency if ``balanced``."""
    if task.kind == "multiclass":
        counts = torch.bincount(labels, minlength=task.outputs).clamp(min=1)
        weight = len(labels) / (task.outputs * counts) if balanced else None
        return nn.CrossEntropyLoss(weight=weight)
    positives = labels.float().reshape(len(labels), -1).mean(0)
    ratio = (1 - positives) / positives.clamp(min=1 / len(labels)) if balanced else None

    def binary(logits: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(
            logits, target.float().reshape(logits.shape), pos_weight=ratio
        )

    return binary


# Enough tokens to know a mean to about a hundredth of a standard deviation.
_MOMENT_TOKENS = 8192


def measured(states: States) -> Standardisation:
    """Mean and scale of each layer's values."""
    hidden: list[Float[Tensor, "layer token width"]] = []
    tokens = 0
    for index in range(len(states)):
        hidden.append(states.read(index).hidden)
        tokens += hidden[-1].shape[1]
        if tokens >= _MOMENT_TOKENS:
            break
    return Standardisation.measured(torch.cat(hidden, 1)[:, :_MOMENT_TOKENS])


def pooled_sample(states: States) -> tuple[Pooled, Int[Tensor, " text"]]:
    """Means and last tokens of as many texts as layer weights look at, and which texts they are."""
    parts: list[Pooled] = []
    rows: list[Tensor] = []
    for index in range(len(states)):
        shard = states.read(index)
        parts.append(pool_shard(shard))
        rows.append(shard.rows)
        if sum(map(len, rows)) >= TEXTS:
            break
    means, lasts = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("means", "lasts")
    )
    return Pooled(means, lasts), torch.cat(rows)


class TrainingRun:
    """A mechanism with its optimiser; remembers the parameters of its best epoch.

    Args:
        job: What to train.
        geometry: Sizes.
        steps: Optimiser steps per epoch.
        loss: Of logits and labels.
        reads_beginnings: Whether the loss also counts a random beginning of each text.
        device: Where to train.
    """

    def __init__(
        self,
        job: Job,
        geometry: Geometry,
        *,
        steps: int,
        loss: Loss,
        reads_beginnings: bool = False,
        device: torch.device,
    ):
        self.job = job
        with torch.random.fork_rng():
            torch.manual_seed(job.seed)
            self.mechanism: Mechanism = job.spec.build(geometry).to(device)
        for parameter in self.mechanism.parameters():
            # One of size 0, as of a readout without extremes, has no gradient worth a warning.
            parameter.requires_grad_(parameter.numel() > 0)
        settings = job.settings
        self._optimizer = torch.optim.AdamW(
            self.mechanism.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self._optimizer, T_max=settings.epochs * steps
        )
        self._loss = loss
        self._reads_beginnings = reads_beginnings
        self._draws = 0
        self._filled = 0.0
        self._best = deepcopy(self.mechanism.state_dict())
        self._epochs = 0
        self.history: list[float] = []
        self.has_diverged = False

    @property
    def best_epoch(self) -> int:
        """Counted from 1; the first of equals, or the last of all where none has a score."""
        return 1 + self.history.index(max(self.history)) if self.history else self._epochs

    @property
    def has_finished(self) -> bool:
        """All epochs done, or no better score for as many as its patience."""
        settings = self.job.settings
        idle = self._epochs - self.best_epoch
        return self._epochs >= settings.epochs or (self._epochs > 0 and idle >= settings.patience)

    def logits(self, tokens: Ragged) -> Float[Tensor, "text output"]:
        """The logits of projected tokens, ``[token, layer, column]``, as when serving."""
        self.mechanism.eval()
        return self.mechanism.finish(self.mechanism.summarise(tokens))

    def loss(self, tokens: Ragged, labels: Int[Tensor, "text ..."]) -> Float[Tensor, ""]:
        """The loss on a batch."""
        self.mechanism.train()
        self._draws += 1
        with torch.random.fork_rng():
            # Draws of its own: what a job draws does not depend on its neighbours.
            torch.manual_seed(self.job.seed * 1_000_003 + self._draws)
            seen = [tokens]
            if self._reads_beginnings:
                seen.append(_begun(tokens))
            if self.job.settings.long_inputs:
                seen.append(among_others(tokens, labels))
            return torch.stack([self._loss_of(one, labels) for one in seen]).mean()

    def _loss_of(self, tokens: Ragged, labels: Int[Tensor, "text ..."]) -> Float[Tensor, ""]:
        votes = self.mechanism.votes(self.mechanism.summarise(tokens))
        return torch.stack([self._loss(logits, labels) for logits in votes.unbind(1)]).sum()

    def take(self, share: float) -> None:
        """Counts the gradients that were just computed; a full batch updates the parameters.

        Args:
            share: Of a batch, in texts.
        """
        self._filled += share
        # Shares of a batch are fractions of its size: they add up to 1 within rounding.
        if self._filled > 1 - 1e-6:
            self._step()

    def finish_batch(self) -> None:
        """Updates the parameters by what a batch has so far."""
        if self._filled:
            self._step()

    def _step(self) -> None:
        self._filled = 0.0
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._schedule.step()

    def end_epoch(self, score: float | None) -> None:
        """Records the epoch's validation score and keeps its parameters if it is the best.

        Args:
            score: None without validation texts: the latest epoch is then the best.
        """
        self._epochs += 1
        if score is not None:
            self.history.append(score)
        if self.best_epoch == self._epochs:
            self._best = deepcopy(self.mechanism.state_dict())

    def restore_best(self) -> None:
        """Goes back to the best epoch's parameters; where they are not finite, it has diverged."""
        self.mechanism.load_state_dict(self._best)
        self.mechanism.eval().requires_grad_(False)
        self.has_diverged |= not all(bool(p.isfinite().all()) for p in self.mechanism.parameters())


def _begun(tokens: Ragged) -> Ragged:
    """A beginning of each text, its length log-uniform: running scores matter from the start."""
    share = torch.rand(len(tokens.lengths), device=tokens.lengths.device)
    lengths = ((tokens.lengths + 1) ** share).long()
    return tokens.beginnings(lengths.minimum(tokens.lengths))


def score_name(task: Task) -> str:
    """What ``validation_score`` is for a task."""
    return {"binary": "AUPRC", "multilabel": "mean AUPRC"}.get(task.kind, "accuracy")


def validation_score(task: Task, logits: np.ndarray, labels: np.ndarray) -> float:
    """What early stopping maximises: average precision, or accuracy for a multi-class task.

    Args:
        task: The classes.
        logits: ``[text, output]``.
        labels: As in ``Examples.labels``. Of a multi-label task those labels count that some texts
            have and others have not.

    Raises:
        SidelightError: There is nothing to tell apart: no text, or no label that some texts have
            and others have not.
    """
    if task.kind == "multiclass" and len(labels):
        return float((logits.argmax(1) == labels).mean())
    target = labels.reshape(len(labels), -1).astype(bool)
    told = target.any(0) & ~target.all(0)
    if not told.any():
        raise SidelightError(
            "These validation texts cannot score a probe: there is no label that some of them have "
            "and others have not. Add texts of both."
        )
    return float(average_precision_score(target[:, told], logits[:, told], average="macro"))
