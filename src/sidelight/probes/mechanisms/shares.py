"""Attribution of a logit to the tokens and layers that it is computed from.

There are two methods. A logit that is a sum of weights times values is *read off*: a token's share
is its own term, with the weights held fixed (Ali et al. 2022, "XAI for Transformers: Better
Explanations through Conservative Propagation"). Any other logit is attributed by *integrated
gradients* (Sundararajan, Taly & Yan 2017). This module works on projections and logits, not on
probes or texts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sidelight.probes.ragged import Ragged

Logits = Callable[[Ragged], Tensor]
"""From tokens' columns, ``[row, layer, column]``, to logits, ``[segment, output]``."""

COMPLETENESS = 5e-5
"""Tolerance in logits: steps are doubled until the integrated gradients sum to the logit this
closely.
"""
_FEWEST_STEPS, _MOST_STEPS = 16, 128
# Gauss-Legendre points in u, where a = u^4: a normalised feature turns within the first hundredths
# of the way.
_POWER = 4
# Maximum number of values to differentiate in one call; short texts need only one call.
_NUMBERS_AT_ONCE = 2**20


@dataclass(frozen=True)
class Shares:
    """The terms of a logit by token and layer; ``baseline`` and ``values`` sum to the logit.

    Attributes:
        values: In logits.
        baseline: The logit with all projections zero: every layer of every token is at its training
            mean (or at zero for a probe that reads raw states).
        steps: Number of integrated gradients; 0 if the shares were read off, which is exact.
    """

    values: Float[Tensor, "row layer"]
    baseline: Float[Tensor, " segment"]
    steps: int


def read_off(logits: Logits, tokens: Ragged, targets: Float[Tensor, "segment output"]) -> Shares:
    """The shares of logits that are affine in the projections: gradient times projections.

    Args:
        logits: No gradient may pass through features that only weigh (``freeze_weights``). A
            maximum is linear in the token that attains it, if only one does
            (``Ragged.without_ties``).
        tokens: Columns.
        targets: For each segment, the weights of its logits in the sum to attribute.
    """
    values = _products(_gradient(logits, tokens, targets), tokens)
    return Shares(values, _at_zero(logits, tokens, targets), steps=0)


def integrated(
    logits: Logits,
    tokens: Ragged,
    targets: Float[Tensor, "segment output"],
    *,
    sums_layers: bool = False,
) -> Shares:
    """The shares of any logits, on the path from zero projections to the text.

    Args:
        logits: Differentiable.
        tokens: Columns.
        targets: As for ``read_off``.
        sums_layers: Whether a token's projections are summed over layers before anything else; the
            gradient of the sum, which is smaller, then applies to each layer.
    """
    path = Ragged(tokens.values.sum(1, keepdim=True), tokens.lengths) if sums_layers else tokens
    baseline = _at_zero(logits, path, targets)
    with torch.no_grad():
        change = (logits(path) * targets).sum(1).double() - baseline
    steps = _FEWEST_STEPS
    while True:
        values = _products(integrated_gradient(logits, path, targets, steps=steps), tokens)
        missed = change - Ragged(values.sum(1), tokens.lengths).sums()
        if steps == _MOST_STEPS or bool((missed.abs() <= COMPLETENESS).all()):
            return Shares(values, baseline, steps)
        steps *= 2


def integrated_gradient(
    logits: Logits, tokens: Ragged, targets: Float[Tensor, "segment output"], *, steps: int
) -> Float[Tensor, "row layer projection"]:
    """The integral over a in (0, 1) of the target's gradient at ``a`` times the projections."""
    points, sizes = np.polynomial.legendre.leggauss(steps)
    places = (points + 1) / 2
    nodes, weights = places**_POWER, sizes / 2 * _POWER * places ** (_POWER - 1)
    total = torch.zeros_like(tokens.values)
    at_once = max(1, _NUMBERS_AT_ONCE // max(1, total.numel()))
    for first in range(0, steps, at_once):
        node, weight = (
            torch.from_numpy(each[first : first + at_once]).to(total) for each in (nodes, weights)
        )
        scaled = (node[:, None, None, None] * tokens.values).flatten(0, 1)
        texts = Ragged(scaled, tokens.lengths.repeat(len(node)))
        gradient = _gradient(logits, texts, targets.repeat(len(node), 1))
        total = total + torch.einsum("n,ntlc->tlc", weight, gradient.unflatten(0, (len(node), -1)))
    return total


def freeze_weights(
    projections: Float[Tensor, "*row projection"], scores: int
) -> Float[Tensor, "*row projection"]:
    """The projections, with the gradient of the first ``scores`` of them blocked."""
    return torch.cat([projections[..., :scores].detach(), projections[..., scores:]], -1)


def _gradient(
    logits: Logits, tokens: Ragged, targets: Float[Tensor, "segment output"]
) -> Float[Tensor, "row layer projection"]:
    # Projections can come from inference mode, whose tensors cannot be differentiated.
    with torch.inference_mode(False), torch.enable_grad():
        projections = tokens.values.detach().clone().requires_grad_()
        target = (logits(Ragged(projections, tokens.lengths.clone())) * targets).sum()
        return torch.autograd.grad(target, projections)[0]


def _products(
    gradient: Float[Tensor, "row #layer column"], tokens: Ragged
) -> Float[Tensor, "row layer"]:
    return (gradient.double() * tokens.values).sum(-1)


@torch.no_grad()
def _at_zero(
    logits: Logits, tokens: Ragged, targets: Float[Tensor, "segment output"]
) -> Float[Tensor, " segment"]:
    zeros = Ragged(torch.zeros_like(tokens.values), tokens.lengths)
    return (logits(zeros) * targets).sum(1).double()
