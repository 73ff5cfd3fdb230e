"""The linear readout in closed form: kernel ridge regression on means and last tokens.

Each layer's mean, and each layer's last token, is a *view* of the text with a kernel of its own.
Views are weighed by how well each one predicts left-out texts, which costs no further solve: the
leave-one-out error of a ridge regression has a closed form (Allen 1974).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sidelight.errors import SidelightError
from sidelight.mechanisms import Mechanism
from sidelight.mechanisms.linear import Linear
from sidelight.pooled import Pooled
from sidelight.standardisation import Standardisation
from sidelight.training.losses import make_loss
from sidelight.types import Task

# A kernel matrix of more would take minutes; more texts are sampled.
MOST_TEXTS = 4000
# Enough to rank views by; each needs an eigendecomposition.
_RANKING_TEXTS = 500
# Ridge strengths, relative to the kernel's mean eigenvalue.
_STRENGTHS = tuple(10.0**k for k in np.arange(-2, 1.51, 0.5))
# A view counts by its leave-one-out R^2 to one of these powers; 0 is all alike.
_POWERS = (0, 1, 2, 4, 8)
_SCALES = tuple(2.0**k for k in range(8))


@dataclass(frozen=True)
class _Solution:
    """A kernel ridge regression and its predictions of each text from the others."""

    dual: Float[Tensor, "text output"]
    left_out: Float[Tensor, "text output"]
    error: float


def solve_linear(
    mechanism: Mechanism,
    pooled: Pooled,
    labels: np.ndarray,
    *,
    task: Task,
    standardisation: Standardisation,
) -> None:
    """Sets the parameters of a linear readout, in place.

    Strength, weights of the views and the logits' scale minimise leave-one-out errors, so nothing
    is chosen on validation texts.

    Args:
        mechanism: What is fitted.
        pooled: Of the training texts.
        labels: As in ``Examples.labels``.
        task: The classes.
        standardisation: Of the states that the mechanism will read.

    Raises:
        SidelightError: Another mechanism.
    """
    if not isinstance(mechanism, Linear):
        raise SidelightError("Only the mechanism 'linear' has a closed form. Train by 'adamw'.")
    # In random order: files are often sorted by label, and views are ranked on the first texts.
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:MOST_TEXTS]
    labels = labels[chosen.numpy()]
    pooled = Pooled(pooled.means[chosen], pooled.lasts[chosen])
    target = _targets(labels, task)
    offset = target.mean(0)
    views = list(_views(pooled))
    ranked = slice(0, _RANKING_TEXTS)
    gains = torch.tensor([_gain(view.inputs[ranked], target[ranked]) for view in views])
    best: tuple[_Solution, Tensor] | None = None
    for power in _POWERS:
        weights = (gains / gains.max().clamp(min=1e-9)).clamp(min=0) ** power
        solution = _solve(_kernel(views, weights), target - offset)
        if best is None or solution.error < best[0].error:
            best = (solution, weights)
    assert best is not None
    solution, weights = best
    scale = _scale(solution.left_out + offset, labels, task)
    _write(mechanism, views, weights, solution.dual * scale, offset * scale, standardisation)


@dataclass(frozen=True)
class _View:
    """One layer's mean or last token, standardised over the texts and scaled by the width."""

    is_last: bool
    layer: int
    center: Float[Tensor, " width"]
    spread: Float[Tensor, " width"]
    inputs: Float[Tensor, "text width"]


def _views(pooled: Pooled) -> Iterator[_View]:
    for is_last, vectors in ((False, pooled.means), (True, pooled.lasts)):
        for layer in range(vectors.shape[1]):
            own = vectors[:, layer].double()
            spread, center = torch.std_mean(own, 0, correction=0)
            # A view that is the same for all texts, such as the template's last embedding.
            if spread.max() < 1e-3 * own.abs().mean().clamp(min=1e-9):
                continue
            # Dimensions that hardly vary would be blown up.
            spread = (spread + 1e-2 * spread.mean()) * own.shape[1] ** 0.5
            yield _View(is_last, layer, center, spread, (own - center) / spread)


def _kernel(views: list[_View], weights: Float[Tensor, " view"]) -> Float[Tensor, "text text"]:
    texts = len(views[0].inputs)
    total = torch.zeros(texts, texts, dtype=torch.float64)
    for view, weight in zip(views, weights.tolist(), strict=True):
        if weight > 0:
            total.addmm_(view.inputs, view.inputs.T, alpha=weight)
    return total


def _solve(kernel: Float[Tensor, "text text"], target: Float[Tensor, "text output"]) -> _Solution:
    """The strength with the smallest leave-one-out error."""
    values, vectors = torch.linalg.eigh(kernel)
    turned = vectors.T @ target
    solutions: list[_Solution] = []
    for strength in _STRENGTHS:
        inverse = 1 / (values.clamp(min=0) + strength * values.mean().clamp(min=1e-12))
        dual = vectors @ (inverse[:, None] * turned)
        residual = dual / ((vectors**2) @ inverse)[:, None]
        solutions.append(_Solution(dual, target - residual, float((residual**2).sum())))
    return min(solutions, key=lambda solution: solution.error)


def _gain(inputs: Float[Tensor, "text width"], target: Float[Tensor, "text output"]) -> float:
    """Leave-one-out R^2 of a view by itself."""
    centred = target - target.mean(0)
    return 1 - _solve(inputs @ inputs.T, centred).error / float((centred**2).sum().clamp(min=1e-9))


def _targets(labels: np.ndarray, task: Task) -> Float[Tensor, "text output"]:
    """1 for what a text is, -1 for what it is not."""
    if task.kind == "multiclass":
        return torch.nn.functional.one_hot(torch.from_numpy(labels), task.outputs).double() * 2 - 1
    return torch.from_numpy(labels).reshape(len(labels), -1).double() * 2 - 1


def _scale(left_out: Float[Tensor, "text output"], labels: np.ndarray, task: Task) -> float:
    """What makes logits of the regression: the smallest cross-entropy on left-out texts."""
    target = torch.from_numpy(labels)
    loss = make_loss(task, target, balanced=False)
    return min(_SCALES, key=lambda scale: float(loss(left_out * scale, target)))


def _write(
    mechanism: Linear,
    views: list[_View],
    weights: Float[Tensor, " view"],
    dual: Float[Tensor, "text output"],
    offset: Float[Tensor, " output"],
    standardisation: Standardisation,
) -> None:
    """The regression as weights of standardised states."""
    bias = offset.clone()
    with torch.no_grad():
        mechanism.mean.zero_()
        mechanism.last.zero_()
        for view, weight in zip(views, weights.tolist(), strict=True):
            raw = weight * (view.inputs.T @ dual) / view.spread[:, None]
            mean, scale = (
                standardisation.mean[view.layer].cpu(),
                standardisation.scale[view.layer].cpu(),
            )
            bias += (mean.double() - view.center) @ raw
            target = mechanism.last if view.is_last else mechanism.mean
            target[view.layer] = (scale[:, None] * raw).to(target.dtype)
        mechanism.bias.copy_(bias)
