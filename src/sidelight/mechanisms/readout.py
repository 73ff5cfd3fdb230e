"""The layerwise readout, our default: gated and last-token logits of every layer, added."""

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


class Readout(Mechanism):
    """Adds the logits of several gated readouts and of the last token, over all layers.

    logits = b + (1 / sqrt(L + 1)) sum_l (u_l . x_l,last + sum_k r_lk)
    r_lk = sum_t softmax_t(g_lk . x_lt) (v_lk . x_lt)

    Where the paper's gate shares one head over all layers, every layer and gate here has a value
    vector per class. Values are linear, so a token costs (1 + C) H + C numbers per layer.

    Args:
        geometry: Sizes.
        heads: Gates per layer (H).
    """

    def __init__(self, geometry: Geometry, *, heads: int = 2):
        super().__init__()
        layers, width, outputs = geometry.layers, geometry.width, geometry.outputs
        self.gate = nn.Parameter(torch.randn(layers, width, heads) * 0.01)
        self.value = nn.Parameter(torch.zeros(layers, width, heads, outputs))
        self.last = nn.Parameter(torch.zeros(layers, width, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(
        self, hidden: Float[Tensor, "batch layer token width"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch output"]:
        """The equation above, literally."""
        hidden = hide(hidden, mask)
        scores = torch.einsum("bltd,ldh->blth", hidden, self.gate)
        weights = online_softmax.masked_softmax(scores, mask[:, None, :, None])
        values = torch.einsum("bltd,ldhc->blthc", hidden, self.value)
        gated = (weights[..., None] * values).sum((2, 3))  # (B, L, C)
        ends = torch.einsum("bld,ldc->blc", last_token(hidden, mask), self.last)
        return self._add_layers(gated + ends)

    def columns(self) -> Float[Tensor, "layer width column"]:
        """H gates, H x C values, then C values of the last token."""
        return torch.cat([self.gate, self.value.flatten(2), self.last], 2)

    def summarise(self, tokens: Ragged) -> Ragged:
        """``[segment, layer, head, (maximum, normaliser, *sums)]``.

        The last token is one more head, whose weight is 1 there and 0 elsewhere.
        """
        heads, outputs = self.gate.shape[2], self.bias.shape[0]
        scores, values, last = tokens.values.float().split([heads, heads * outputs, outputs], -1)
        gated = online_softmax.summarise(scores, values.unflatten(-1, (heads, -1)), tokens)
        return with_last(gated, last, tokens)

    def merge(self, left: Ragged, right: Ragged) -> Ragged:
        """Exact."""
        return merge_last(online_softmax.merge(left, right), left, right)

    def finish(self, state: Ragged) -> Float[Tensor, "segment output"]:
        """The layers' and heads' logits, added."""
        return self._add_layers(online_softmax.finish(state).sum(2))

    def _add_layers(
        self, readouts: Float[Tensor, "batch layer output"]
    ) -> Float[Tensor, "batch output"]:
        return readouts.sum(1) / math.sqrt(readouts.shape[1]) + self.bias


@dataclass(frozen=True)
class ReadoutOptions:
    """Options of ``readout``.

    Attributes:
        heads: Gates per layer.
    """

    heads: int = 2


@register("readout", ReadoutOptions)
def _build(geometry: Geometry, options: ReadoutOptions) -> Readout:
    return Readout(geometry, heads=options.heads)
