"""What training minimises on a batch, and what it maximises on validation texts."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Int
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.nn import functional

from sidelight.errors import SidelightError
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


def score_name(task: Task) -> str:
    """What ``validation_score`` is for a task."""
    return {"binary": "AUPRC", "multilabel": "mean AUPRC"}.get(task.kind, "accuracy")


def validation_score(task: Task, logits: np.ndarray, labels: np.ndarray) -> float:
    """Average precision, or accuracy for a multi-class task.

    A multi-label task is scored by the mean over the labels that only some of the texts have.

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
    told = target.any(0) & ~target.all(0)
    if not told.any():
        raise SidelightError(
            "These validation texts cannot score a probe: there is no label that some of them have "
            "and others have not. Add texts of both."
        )
    return float(average_precision_score(target[:, told], logits[:, told], average="macro"))
