"""The linear mechanism: a weight per class for the mean and the last token of every layer."""

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sidelight.mechanisms.base import Geometry, Mechanism, hide, register
from sidelight.mechanisms.shares import Shares, read_off
from sidelight.mechanisms.stages import (
    finish_softmax,
    last_token,
    merge_with_last,
    summarise_softmax,
    with_last,
)
from sidelight.ragged import Ragged


class Linear(Mechanism):
    """logits = b + sum_l (v_l . mean_t(x_lt) + u_l . x_l,last).

    A readout whose gates are all zero. What it learns has one optimum, which training solves for
    (``training/linear.py``). A token costs 2 C numbers per layer.

    Args:
        geometry: Sizes.
    """

    def __init__(self, geometry: Geometry):
        super().__init__()
        layers, width, outputs = geometry.layers, geometry.width, geometry.outputs
        self.value = nn.Parameter(torch.zeros(layers, width, outputs))
        self.last = nn.Parameter(torch.zeros(layers, width, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(
        self, hidden: Float[Tensor, "batch layer token width"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch output"]:
        """The equation above, literally."""
        hidden = hide(hidden, mask)
        means = hidden.sum(2) / mask.sum(1)[:, None, None]
        ends = last_token(hidden, mask)
        products = (
            torch.einsum("bld,ldc->bc", vectors, weight)
            for vectors, weight in ((means, self.value), (ends, self.last))
        )
        return sum(products, self.bias)

    def columns(self) -> Float[Tensor, "layer width column"]:
        """C numbers whose mean is taken, then C of the last token."""
        return torch.cat([self.value, self.last], 2)

    def summarise(self, tokens: Ragged) -> Ragged:
        """``[segment, layer, head, (maximum, normaliser, *sums)]``, as a readout's.

        The mean is a softmax of equal scores: its maximum is 0 and its normaliser the count.
        """
        values, last = tokens.values.float().chunk(2, -1)
        equal = torch.zeros_like(values[..., :1])
        return with_last(summarise_softmax(equal, values[..., None, :], tokens), last, tokens)

    def summary_kind(self) -> Hashable:
        """Linear mechanisms of as many classes."""
        return (Linear, len(self.bias))

    def merge(self, left: Ragged, right: Ragged) -> Ragged:
        return merge_with_last(left, right)

    def finish(self, state: Ragged) -> Float[Tensor, "segment output"]:
        """The logits of the mean and of the last token, added over the layers."""
        return finish_softmax(state).sum((1, 2)) + self.bias

    def shares(self, tokens: Ragged, targets: Float[Tensor, "segment output"]) -> Shares:
        """Exact: every term belongs to a token."""
        return read_off(self.logits, tokens, targets)


@dataclass(frozen=True)
class LinearOptions:
    """``linear`` has no options."""


@register("linear", LinearOptions)
def _build(geometry: Geometry, _: LinearOptions) -> Linear:
    return Linear(geometry)
