"""The linear readout: means and last tokens of all layers, weighed linearly. For few labels."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sidelight.mechanisms import online_softmax
from sidelight.mechanisms.base import Geometry, Mechanism, hide
from sidelight.mechanisms.last_token import last_token, merge_last, with_last
from sidelight.mechanisms.registry import register
from sidelight.ragged import Ragged


class Linear(Mechanism):
    """logits = b + sum_l (v_l . mean_t x_lt + u_l . x_l,last).

    A readout without gates, so that its parameters have a closed form (``training/ridge.py``),
    which a few dozen labels are enough for.

    Args:
        geometry: Sizes.
    """

    def __init__(self, geometry: Geometry):
        super().__init__()
        layers, width, outputs = geometry.layers, geometry.width, geometry.outputs
        self.mean = nn.Parameter(torch.randn(layers, width, outputs) / math.sqrt(layers * width))
        self.last = nn.Parameter(torch.randn(layers, width, outputs) / math.sqrt(layers * width))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(
        self, hidden: Float[Tensor, "batch layer token width"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch output"]:
        """The equation above, literally."""
        hidden = hide(hidden, mask)
        means = hidden.sum(2) / mask.sum(1)[:, None, None]
        parts = ((means, self.mean), (last_token(hidden, mask), self.last))
        return self.bias + sum(torch.einsum("bld,ldc->bc", own, weight) for own, weight in parts)

    def columns(self) -> Float[Tensor, "layer width column"]:
        """C of the mean, then C of the last token."""
        return torch.cat([self.mean, self.last], 2)

    def summarise(self, tokens: Ragged) -> Ragged:
        """``[segment, layer, 2, (maximum, normaliser, *sums)]``: an equal weight on each token."""
        values, last = tokens.values.float().chunk(2, -1)
        equal = torch.zeros_like(values[..., :1])
        return with_last(online_softmax.summarise(equal, values[:, :, None], tokens), last, tokens)

    def merge(self, left: Ragged, right: Ragged) -> Ragged:
        """Exact."""
        return merge_last(online_softmax.merge(left, right), left, right)

    def finish(self, state: Ragged) -> Float[Tensor, "segment output"]:
        """Mean and last token of every layer, added."""
        return online_softmax.finish(state).sum((1, 2)) + self.bias


@dataclass(frozen=True)
class LinearOptions:
    """``linear`` has no options."""


@register("linear", LinearOptions)
def _build(geometry: Geometry, _options: LinearOptions) -> Linear:
    return Linear(geometry)
