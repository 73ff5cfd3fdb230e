"""Logistic regression with an L1 penalty, which keeps few features. Knows no hidden states."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sidelight.errors import SidelightError
from sidelight.training import make_loss
from sidelight.types import Task

# Standardised features times weights; a closure, since a wide matrix need not exist for it.
Design = Callable[[Float[Tensor, "feature output"]], Float[Tensor, "text output"]]
_Smooth = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sparse:
    """Weights of standardised features, most of them zero.

    Attributes:
        weight: Per feature.
        bias: Not penalised.
    """

    weight: Float[Tensor, "feature output"]
    bias: Float[Tensor, " output"]


def sparse_path(
    design: Design,
    labels: Int[Tensor, "text ..."],
    task: Task,
    *,
    features: int,
    shares: tuple[float, ...],
    iterations: int,
) -> Iterator[Sparse]:
    """One classifier per penalty, each started from the one before.

    Minimises mean loss + penalty * |weight|_1, classes weighted by inverse frequency, by
    accelerated proximal gradient steps (Beck & Teboulle 2009) that forget their momentum when it
    points uphill (O'Donoghue & Candes 2015).

    Args:
        design: Of the training texts.
        labels: Of the same texts, as in ``Examples.labels``.
        task: The classes; the penalty of a multi-label task is the same for all labels.
        features: Number of them.
        shares: Penalties as shares of the weakest one under which all weights are zero; largest
            first.
        iterations: Steps per penalty.

    Raises:
        SidelightError: Some feature is not finite.
    """
    loss = make_loss(task, labels, balanced=True)

    def smooth(point: Float[Tensor, "row output"]) -> Float[Tensor, ""]:
        return loss(design(point[:-1]) + point[-1], labels)

    start = torch.zeros(features + 1, task.outputs)  # the last row is the bias
    strongest = float(_slope(smooth, start).gradient[:-1].abs().max())
    if not math.isfinite(strongest):
        raise SidelightError(
            "A sparse regression cannot be fitted: some feature is not finite. Load the backbone "
            "with --dtype float32."
        )
    state = _State(start, start, 1.0, 1.0)
    for share in shares:
        state = _State(state.point, state.point, 1.0, state.step)
        shrink = partial(_shrink, penalty=share * strongest)
        for _ in range(iterations):
            state = _advance(state, smooth, shrink)
        yield Sparse(state.point[:-1], state.point[-1])


@dataclass(frozen=True)
class _State:
    """``ahead`` is the point plus its momentum; ``step`` is the size that was last accepted."""

    point: Float[Tensor, "row output"]
    ahead: Float[Tensor, "row output"]
    momentum: float
    step: float


def _advance(state: _State, smooth: _Smooth, shrink: Callable[..., Tensor]) -> _State:
    slope, step = _slope(smooth, state.ahead), state.step
    while True:
        point = shrink(state.ahead - step * slope.gradient, step=step)
        move = point - state.ahead
        bound = slope.value + (slope.gradient * move).sum() + move.square().sum() / (2 * step)
        # Float32 cannot tell apart losses closer than this.
        if smooth(point) <= bound + 1e-6 * slope.value.abs():
            break
        step /= 2
    if ((state.ahead - point) * (point - state.point)).sum() > 0:
        return _State(point, point, 1.0, step)
    momentum = (1 + (1 + 4 * state.momentum**2) ** 0.5) / 2
    push = (state.momentum - 1) / momentum
    return _State(point, point + push * (point - state.point), momentum, step)


@dataclass(frozen=True)
class _Slope:
    value: Float[Tensor, ""]
    gradient: Float[Tensor, "row output"]


def _slope(smooth: _Smooth, point: Float[Tensor, "row output"]) -> _Slope:
    leaf = point.detach().requires_grad_()
    value = smooth(leaf)
    return _Slope(value.detach(), torch.autograd.grad(value, leaf)[0])


def _shrink(point: Tensor, *, step: float, penalty: float) -> Tensor:
    """The proximal step: weights move towards zero, the bias does not."""
    weight = point[:-1]
    small = (weight.abs() - step * penalty).clamp(min=0)
    return torch.cat([weight.sign() * small, point[-1:]])
