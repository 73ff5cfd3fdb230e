"""The layerwise readout, our default: an attention probe at every layer, their logits added."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sidelight.mechanisms import online_softmax
from sidelight.mechanisms.base import Geometry, Mechanism, hide
from sidelight.mechanisms.registry import register
from sidelight.ragged import Ragged


class Readout(Mechanism):
    """Adds the logits of several gated readouts at every layer.

    logits = b + (1 / sqrt(L + 1)) sum_l sum_k sum_t softmax_t(g_lk . x_lt) (v_lk . x_lt)

    Where the paper's gate shares one head over all layers, every layer and gate here has a value
    vector per class. The values are linear, so a token costs (1 + C) H numbers per layer.

    Args:
        geometry: Sizes.
        heads: Gates per layer (H).
    """

    def __init__(self, geometry: Geometry, *, heads: int = 4):
        super().__init__()
        layers, width, outputs = geometry.layers, geometry.width, geometry.outputs
        self.gate = nn.Parameter(torch.randn(layers, width, heads) * 0.01)
        self.value = nn.Parameter(torch.zeros(layers, width, heads, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(
        self, hidden: Float[Tensor, "batch layer token width"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch output"]:
        """The equation above, literally."""
        hidden = hide(hidden, mask)
        scores = torch.einsum("bltd,ldh->blth", hidden, self.gate)
        weights = online_softmax.masked_softmax(scores, mask[:, None, :, None])
        values = torch.einsum("bltd,ldhc->blthc", hidden, self.value)
        return self._add_layers((weights[..., None] * values).sum(2))

    def columns(self) -> Float[Tensor, "layer width column"]:
        """H gates, then H x C values."""
        return torch.cat([self.gate, self.value.flatten(2)], 2)

    def summarise(self, tokens: Ragged) -> Ragged:
        """``[segment, layer, head, (maximum, normaliser, *sums)]``."""
        heads = self.gate.shape[2]
        scores, values = tokens.values.float().tensor_split([heads], -1)
        return online_softmax.summarise(scores, values.unflatten(-1, (heads, -1)), tokens)

    def merge(self, left: Ragged, right: Ragged) -> Ragged:
        """Exact, in any order."""
        return online_softmax.merge(left, right)

    def finish(self, state: Ragged) -> Float[Tensor, "segment output"]:
        """The layers' and heads' logits, added."""
        return self._add_layers(online_softmax.finish(state))

    def _add_layers(
        self, readouts: Float[Tensor, "batch layer head output"]
    ) -> Float[Tensor, "batch output"]:
        return readouts.sum((1, 2)) / math.sqrt(readouts.shape[1]) + self.bias


@dataclass(frozen=True)
class ReadoutOptions:
    """Options of ``readout``.

    Attributes:
        heads: Gates per layer.
    """

    heads: int = 4


@register("readout", ReadoutOptions)
def _build(geometry: Geometry, options: ReadoutOptions) -> Readout:
    return Readout(geometry, heads=options.heads)
