"""The training loss of each kind of task."""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional

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
