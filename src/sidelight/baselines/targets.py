"""Labels as what regressions and one-against-rest losses aim at."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from sidelight.types import Task


def class_targets(labels: Int[Tensor, "text ..."], task: Task) -> Float[Tensor, "text output"]:
    """1 where a text has an output's class, else 0.

    Args:
        labels: As in ``Examples.labels``.
        task: The classes.
    """
    if task.kind == "multiclass":
        return functional.one_hot(labels, task.outputs).float()
    return labels.to(torch.float32).reshape(len(labels), -1)
