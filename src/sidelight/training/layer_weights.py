"""How much each layer counts when training starts: by how well it alone predicts left-out texts.

Layers differ in what they know of a task. A layer's standardised states are multiplied by its
weight, which sets how fast its parameters learn: AdamW's steps do not depend on how large a
gradient is.

Each layer's mean, and each layer's last token, is a *view* of a text. A view is worth the R^2 of a
kernel ridge regression on it alone, on left-out texts; a layer is worth its better view, and weighs
its worth relative to the best layer's to the eighth power (docs/results.md has others). The
leave-one-out error of a ridge regression has a closed form (Allen 1974), so this costs a few
eigendecompositions, and no validation text is looked at.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sidelight.states.pooled import Pooled
from sidelight.types import Task

# Enough to rank views by; each needs an eigendecomposition.
TEXTS = 500
# Ridge strengths, relative to the kernel's mean eigenvalue.
_STRENGTHS = tuple(10.0**k for k in np.arange(-2, 1.51, 0.5))
# A class with fewer texts says more about these than about layers.
_LEAST_OF_A_CLASS = 3
_POWER = 8
# Of the best layer's weight, so that training may still use any layer.
_LEAST = 0.01


def layer_weights(pooled: Pooled, labels: np.ndarray, *, task: Task) -> Float[Tensor, " layer"]:
    """A weight for each layer; their mean square is 1.

    Args:
        pooled: Of some training texts, in random order; the first ``TEXTS`` of them are used.
        labels: Theirs, as in ``Examples.labels``.
        task: The classes.
    """
    target = _targets(labels[:TEXTS], task)
    worths = torch.zeros(pooled.means.shape[1], dtype=torch.float64)
    for vectors in (pooled.means, pooled.lasts):
        for layer in range(len(worths)):
            worth = _worth(vectors[:TEXTS, layer].double(), target)
            worths[layer] = max(float(worths[layer]), worth)
    if not worths.any():
        return torch.ones(len(worths))
    weights = ((worths / worths.max()) ** _POWER).clamp(min=_LEAST)
    return (weights / weights.square().mean().sqrt()).float()


def _worth(view: Float[Tensor, "text width"], target: Float[Tensor, "text output"]) -> float:
    """The R^2 of predictions of each text from the others; below 0 is no better than the mean."""
    spread, center = torch.std_mean(view, 0, correction=0)
    # A view that is the same for all texts, such as the template's last embedding; or one class.
    if spread.max() < 1e-3 * view.abs().mean().clamp(min=1e-9) or not target.any():
        return 0.0
    # Dimensions that hardly vary would be blown up.
    inputs = (view - center) / (spread + 1e-2 * spread.mean())
    return 1 - _left_out_error(inputs @ inputs.T, target) / float(target.square().sum())


def _targets(labels: np.ndarray, task: Task) -> Float[Tensor, "text output"]:
    """1 for what a text is, -1 for what it is not; centred. 0 where that is too rare to tell by."""
    if task.kind == "multiclass":
        signs = torch.nn.functional.one_hot(torch.from_numpy(labels), task.outputs).double() * 2 - 1
    else:
        signs = torch.from_numpy(labels).reshape(len(labels), -1).double() * 2 - 1
    rarer = torch.minimum((signs > 0).sum(0), (signs < 0).sum(0))
    return (signs - signs.mean(0)) * (rarer >= _LEAST_OF_A_CLASS)


def _left_out_error(
    kernel: Float[Tensor, "text text"], target: Float[Tensor, "text output"]
) -> float:
    """Squared error of each text's prediction from the others, of the strength that has least."""
    values, vectors = torch.linalg.eigh(kernel)
    turned = vectors.T @ target
    errors: list[float] = []
    for strength in _STRENGTHS:
        inverse = 1 / (values.clamp(min=0) + strength * values.mean().clamp(min=1e-12))
        dual = vectors @ (inverse[:, None] * turned)
        residual = dual / ((vectors**2) @ inverse)[:, None]
        errors.append(float(residual.square().sum()))
    return min(errors)
