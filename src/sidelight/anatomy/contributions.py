"""What each token of each layer adds to a logit: integrated gradients, for every mechanism.

c = x . integral_0^1 d target(a x) / dx da, from all layers at their mean (x = 0) to the text itself
(Sundararajan, Taly & Yan 2017), on a probe's columns. Contributions and the target at x = 0 sum to
the target whatever the mechanism. Where layers only add up, as in ``readout``, a layer's
contribution is exactly what its ablation takes away, and the target at x = 0 is the bias.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sidelight.mechanisms import Mechanism
from sidelight.ragged import Ragged
from sidelight.types import Task

# Of Gauss and Legendre in u, where a = u^4: a normalised feature turns within the first hundredths
# of the way.
_POINTS = 24
_POWER = 4


def true_targets(task: Task, labels: Int[np.ndarray, "text ..."]) -> Float[Tensor, "text output"]:
    """For each text the weights of its logits whose sum is the target.

    Binary: the logit. Multi-class: the true class's, less the mean of all, since a shift of all
    changes no verdict. Multi-label: the mean of the labels that hold, or of all where none does.
    """
    if task.kind == "binary":
        return torch.ones(len(labels), 1)
    if task.kind == "multiclass":
        return torch.eye(task.outputs)[torch.from_numpy(labels)] - 1 / task.outputs
    held = torch.from_numpy(labels).float()
    held = torch.where(held.any(1, keepdim=True), held, 1.0)
    return held / held.sum(1, keepdim=True)


def contributions(
    mechanism: Mechanism, tokens: Ragged, targets: Float[Tensor, "text output"]
) -> Float[Tensor, "token layer"]:
    """Each token's and layer's part of its text's target.

    Args:
        mechanism: In evaluation mode.
        tokens: Its columns, ``[token, layer, column]``.
        targets: Weights of the logits; see ``true_targets``.
    """
    points, sizes = np.polynomial.legendre.leggauss(_POINTS)
    places = (points + 1) / 2
    nodes, weights = places**_POWER, sizes / 2 * _POWER * places ** (_POWER - 1)
    total = torch.zeros_like(tokens.values)
    for node, weight in zip(nodes, weights, strict=True):
        with torch.enable_grad():
            columns = (tokens.values.detach() * float(node)).requires_grad_()
            logits = mechanism.finish(mechanism.summarise(Ragged(columns, tokens.lengths)))
            total += float(weight) * torch.autograd.grad((logits * targets).sum(), columns)[0]
    return (total * tokens.values).sum(-1)
