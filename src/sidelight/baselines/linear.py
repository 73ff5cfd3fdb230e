"""Linear classifiers of vectors, as regressions give them. Knows matrices, not hidden states."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sidelight.training import validation_score
from sidelight.types import Task


@dataclass(frozen=True)
class Rows:
    """Labelled vectors.

    Attributes:
        inputs: One vector per text.
        labels: As in ``Examples.labels``.
    """

    inputs: Float[Tensor, "text feature"]
    labels: Int[Tensor, "text ..."]


@dataclass(frozen=True)
class Scaling:
    """x = (input - mean) / scale, per feature."""

    mean: Float[Tensor, " feature"]
    scale: Float[Tensor, " feature"]

    @staticmethod
    def measured(inputs: Float[Tensor, "text feature"]) -> "Scaling":
        """Mean and standard deviation over texts; a constant feature keeps scale 1."""
        scale, mean = torch.std_mean(inputs, 0, correction=0)
        return Scaling(mean, torch.where(scale > 1e-6, scale, 1.0))

    def __call__(self, inputs: Float[Tensor, "text feature"]) -> Float[Tensor, "text feature"]:
        """The standardised vectors."""
        # In place on the difference: all layers of 16,000 texts are a gigabyte.
        return (inputs - self.mean).div_(self.scale)


@dataclass(frozen=True)
class Linear:
    """logits = inputs @ weight + shift, of raw inputs: the standardisation is folded in."""

    weight: Float[Tensor, "feature output"]
    shift: Float[Tensor, " output"]

    @staticmethod
    def folded(
        weight: Float[Tensor, "feature output"], bias: Float[Tensor, " output"], scaling: Scaling
    ) -> "Linear":
        """From the weights of standardised inputs."""
        raw = weight / scaling.scale[:, None]
        return Linear(raw, bias - scaling.mean @ raw)

    @property
    def parameters(self) -> int:
        """Numbers that were fitted."""
        return self.weight.numel() + self.shift.numel()

    def __call__(self, inputs: Float[Tensor, "text feature"]) -> Float[Tensor, "text output"]:
        """The logits."""
        return inputs @ self.weight + self.shift


@dataclass(frozen=True)
class Chosen:
    """A classifier and its score on validation texts; see ``validation_score``."""

    linear: Linear
    score: float


def best_linear(candidates: Iterable[Linear], validation: Rows, task: Task) -> Chosen:
    """The one with the best validation score; of equals the first."""
    labels = validation.labels.numpy()
    scored = [Chosen(each, _score(each(validation.inputs), labels, task)) for each in candidates]
    return max(scored, key=lambda chosen: chosen.score)


def _score(logits: Float[Tensor, "text output"], labels: np.ndarray, task: Task) -> float:
    return validation_score(task, logits.numpy(), labels)
