"""Optimisation of one mechanism: loss, optimiser, validation score and best epoch."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.nn import functional

from sidelight.errors import SidelightError
from sidelight.probes.mechanisms.base import Geometry, Mechanism, build_mechanism
from sidelight.probes.ragged import Ragged
from sidelight.probes.standardisation import Standardisation
from sidelight.states.compression import Compression
from sidelight.training.settings import TrainingSettings
from sidelight.training.targets import Targets
from sidelight.types import MechanismSpec, Task

# Mutable part of the learning-rate schedule.
_OF_SCHEDULE = ("last_epoch", "_step_count", "_last_lr")


@runtime_checkable
class Loss(Protocol):
    """The mean loss of texts, or of tokens."""

    def __call__(
        self,
        logits: Float[Tensor, "label output"],
        labels: Int[Tensor, "label ..."],
        weights: Float[Tensor, " label"] | None = None,
    ) -> Float[Tensor, ""]: ...


def make_loss(task: Task, labels: Int[Tensor, "text ..."], *, balanced: bool) -> Loss:
    """Cross-entropy for the task, weighted by inverse class frequency if ``balanced``."""
    if task.kind == "multiclass":
        counts = torch.bincount(labels, minlength=task.outputs).clamp(min=1)
        weight = len(labels) / (task.outputs * counts) if balanced else None

        def multiclass(
            logits: Tensor, labels: Tensor, weights: Tensor | None = None
        ) -> Float[Tensor, ""]:
            losses = functional.cross_entropy(logits, labels, weight=weight, reduction="none")
            texts = len(labels) if weight is None else weight[labels].sum()
            return (losses if weights is None else losses * weights).sum() / texts

        return multiclass
    positives = labels.float().reshape(len(labels), -1).mean(0)
    ratio = (1 - positives) / positives.clamp(min=1 / len(labels)) if balanced else None

    def binary(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Float[Tensor, ""]:
        losses = functional.binary_cross_entropy_with_logits(
            logits, labels.float().reshape(logits.shape), pos_weight=ratio, reduction="none"
        )
        return (losses if weights is None else losses * weights[:, None]).mean()

    return binary


def validation_score(task: Task, logits: np.ndarray, labels: np.ndarray) -> float:
    """Average precision, or accuracy for a multi-class task.

    For a multi-label task, it is the mean over the labels that only some of the texts have.

    Args:
        task: The classes.
        logits: ``[text, output]``.
        labels: As in ``LabelledExamples.labels``.

    Raises:
        SidelightError: There is no text, or no label that only some of the texts have.
    """
    if task.kind == "multiclass" and len(labels):
        return float((logits.argmax(1) == labels).mean())
    target = labels.reshape(len(labels), -1).astype(bool)
    is_mixed = target.any(0) & ~target.all(0)
    if not is_mixed.any():
        raise SidelightError(
            "These validation texts cannot rank probes, because every label is on all of them or "
            "on none. Add texts with and without a label."
        )
    return float(average_precision_score(target[:, is_mixed], logits[:, is_mixed], average="macro"))


class TrainingRun:
    """Training of a mechanism with AdamW on a cosine schedule; the best epoch is restored at the
    end.

    Attributes:
        spec: Specification of the mechanism.
        settings: Optimisation settings.
        mechanism: The mechanism, trained in place.
        standardisation: Standardisation of the states that it reads.
        texts: Rows of the training texts that it is trained on.
        validation_scores: Validation score of each epoch; empty without validation texts.
        has_diverged: Whether its parameters or its validation logits stopped being finite.
        logits: Logits of the texts that are scored after training, in order; empty until then.
        token_logits: Logits of the tokens of each of these texts, if tokens are labelled.

    Args:
        spec: Specification of the mechanism.
        settings: Optimisation settings.
        standardisation: Standardisation of the states that it reads.
        task: The classes.
        targets: Targets of the texts that it is trained on.
        texts: Rows of the training texts that it is trained on.
        steps: Optimiser steps per epoch.
        adds_prefixes: Whether the loss also includes a random prefix of each text.
    """

    def __init__(
        self,
        spec: MechanismSpec,
        settings: TrainingSettings,
        standardisation: Standardisation,
        task: Task,
        targets: Targets,
        texts: Bool[Tensor, " text"],
        *,
        steps: int,
        adds_prefixes: bool = False,
    ):
        self.spec = spec
        self.settings = settings
        self.standardisation = standardisation
        self.texts = texts
        self.validation_scores: list[float] = []
        self.has_diverged = False
        self.logits: Float[np.ndarray, "text output"] = np.empty((0, task.outputs))
        self.token_logits: Sequence[Float[np.ndarray, "_ output"]] = ()
        layers, width = standardisation.mean.shape
        with _random_numbers(settings.seed, standardisation.mean.device):
            mechanism = build_mechanism(spec, Geometry(layers, width, task.outputs))
        self.mechanism: Mechanism = mechanism.to(standardisation.mean.device)
        self._optimizer = torch.optim.AdamW(
            self.mechanism.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self._optimizer, T_max=settings.epochs * steps
        )
        labels = targets.labels.values
        targets.initialise(self.mechanism)
        self._best = deepcopy(self.mechanism.state_dict())
        self._epochs = 0
        is_balanced = settings.class_weight == "balanced"
        self._loss = make_loss(task, labels, balanced=is_balanced)
        self._adds_prefixes = adds_prefixes
        self._draws = 0
        self._filled = 0.0

    @property
    def depth(self) -> int:
        """Number of hidden states read per token, from the embedding up."""
        return self.settings.layers or len(self.standardisation.scale)

    @property
    def best_epoch(self) -> int:
        """The first epoch with the best score, counted from 1, or the latest if there are no
        scores.
        """
        return (
            1 + self.validation_scores.index(max(self.validation_scores))
            if self.validation_scores
            else self._epochs
        )

    @property
    def has_finished(self) -> bool:
        """Whether all epochs are done, or ``patience`` epochs brought no improvement."""
        idle = self._epochs - self.best_epoch
        is_idle = self._epochs > 0 and idle >= self.settings.patience
        return self.has_diverged or is_idle or self._epochs >= self.settings.epochs

    def score(self, tokens: Ragged) -> Float[Tensor, "text output"]:
        """The logits of texts of projected tokens, ``[token, layer, column]``, as in serving."""
        self.mechanism.eval()
        return self.mechanism.logits(tokens)

    def loss(self, tokens: Ragged, targets: Targets) -> Float[Tensor, ""]:
        """The loss of a batch, summed over the mechanism's voters.

        Args:
            tokens: Tokens of the texts, as for ``score``.
            targets: Targets of the same texts.
        """
        labels = targets.labels
        weights = targets.weights.repeat_interleave(labels.lengths)
        self.mechanism.train()
        self._draws += 1
        # A separate random state, so that a run does not depend on other runs.
        seed = self.settings.seed * 1_000_003 + self._draws
        with _random_numbers(seed, tokens.values.device):
            inputs = [tokens, random_prefixes(tokens)] if self._adds_prefixes else [tokens]
            votes = targets.votes(self.mechanism, inputs)
            losses = [self._loss(vote, labels.values, weights) for vote in votes]
            return torch.stack(losses).sum() / len(inputs)

    def take(self, share: float) -> None:
        """Accumulate the computed gradients as this share of a batch; a full batch triggers a step.

        With a wide backbone, a shard can have fewer texts than a batch.
        """
        self._filled += share
        # Shares of a batch add up to 1 within rounding.
        if self._filled > 1 - 1e-6:
            self.step()

    def step(self) -> None:
        """Update the parameters by the gradients of the batch, if it has any."""
        if self._filled:
            self._filled = 0.0
            self._optimizer.step()
            self._optimizer.zero_grad()
            self._schedule.step()

    def end_epoch(self, score: float | None) -> None:
        """Record the validation score, and keep the parameters if it is the best so far.

        Args:
            score: Validation score; None without validation texts, in which case the latest epoch
                is the best.
        """
        self._epochs += 1
        if score is not None:
            self.validation_scores.append(score)
        if self.best_epoch == self._epochs:
            self._best = deepcopy(self.mechanism.state_dict())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state for resuming after an epoch: tensors by name, and JSON values."""
        tensors = {f"now.{name}": value for name, value in self.mechanism.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self._best.items()}
        moments: dict[int, dict[str, Tensor]] = self._optimizer.state_dict()["state"]
        for parameter, values in moments.items():
            tensors |= {f"moment.{parameter}.{name}": value for name, value in values.items()}
        schedule = self._schedule.state_dict()
        numbers = {
            "validation_scores": self.validation_scores,
            "epochs": self._epochs,
            "draws": self._draws,
            "has_diverged": self.has_diverged,
            "schedule": {name: schedule[name] for name in _OF_SCHEDULE},
        }
        return {name: value.cpu().clone() for name, value in tensors.items()}, numbers

    def set_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Restore the result of ``state``.

        Raises:
            KeyError, RuntimeError: The state belongs to another run.
        """

        def named(start: str) -> dict[str, Tensor]:
            selected = {
                name: value for name, value in tensors.items() if name.startswith(f"{start}.")
            }
            return {name.partition(".")[2]: value for name, value in selected.items()}

        self.mechanism.load_state_dict(named("now"))
        device = self.standardisation.mean.device
        self._best = {name: value.to(device) for name, value in named("best").items()}
        state = self._optimizer.state_dict()
        for place, value in named("moment").items():
            parameter, _, name = place.partition(".")
            state["state"].setdefault(int(parameter), {})[name] = value
        schedule = numbers["schedule"]
        for group, rate in zip(state["param_groups"], schedule["_last_lr"], strict=True):
            group["lr"] = rate
        self._optimizer.load_state_dict(state)
        self._schedule.load_state_dict(schedule)
        self.validation_scores = list(numbers["validation_scores"])
        self._epochs, self._draws = int(numbers["epochs"]), int(numbers["draws"])
        self.has_diverged = bool(numbers["has_diverged"])

    def restore_best(self, compression: Compression | None = None) -> None:
        """Restore the parameters of the best epoch and freeze them.

        Args:
            compression: Compression of the states it was trained on. Parameter components outside
                its directions are removed, so that uncompressed states give the same logits.
        """
        self.mechanism.load_state_dict(self._best)
        if compression is not None:
            for parameter in self.mechanism.layer_parameters():
                parameter.data.copy_(compression.restricted(parameter.data))
        self.mechanism.eval().requires_grad_(False)
        # The run is kept for its results, but the optimiser's moments take twice its memory.
        self._optimizer.state.clear()
        self.has_diverged |= not all(bool(p.isfinite().all()) for p in self.mechanism.parameters())


@contextmanager
def _random_numbers(seed: int, device: torch.device) -> Generator[None]:
    """Seed the random numbers in the block; the caller's random state is restored afterwards.

    Only for the CPU and this device, because querying all GPUs of a machine would initialise them.
    """
    is_cpu = device.type == "cpu"
    # `torch.manual_seed` would store a stack trace for each uninitialised kind of device.
    manual_seed = torch.default_generator.manual_seed if is_cpu else torch.manual_seed
    with torch.random.fork_rng([] if is_cpu else [device], device_type=device.type):
        manual_seed(seed)
        yield


def random_prefixes(tokens: Ragged) -> Ragged:
    """A prefix of each text with log-uniform length, because scores matter from the start."""
    share = torch.rand(len(tokens.lengths), device=tokens.lengths.device)
    lengths = ((tokens.lengths + 1) ** share).long()
    return tokens.prefixes(lengths.minimum(tokens.lengths))
