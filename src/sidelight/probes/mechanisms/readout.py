"""The layerwise readout: gated means and the last token of every layer, added."""

import math
from collections.abc import Hashable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sidelight.probes.mechanisms.base import Geometry, Mechanism, hide, register
from sidelight.probes.mechanisms.shares import Shares, freeze_weights, read_off
from sidelight.probes.mechanisms.stages import (
    finish_softmax,
    last_token,
    masked_softmax,
    merge_with_last,
    summarise_with_last,
)
from sidelight.probes.ragged import Ragged


@register("readout")
class Readout(Mechanism):
    """Adds the logits of gated means and of the last token, over all layers.

    logits = b + (1 / sqrt(L + 1)) sum_l (u_l . x_l,last + sum_k r_lk)
    r_lk = sum_t softmax_t(g_lk . x_lt) (v_lk . x_lt)

    The paper's gate shares one head among all layers; here, every layer and gate has a value vector
    per class. Values are linear, so a token costs (1 + C) H + C numbers per layer.

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
        weights = masked_softmax(scores, mask[:, None, :, None])
        values = torch.einsum("bltd,ldhc->blthc", hidden, self.value)
        gated = (weights[..., None] * values).sum((2, 3))  # (B, L, C)
        ends = torch.einsum("bld,ldc->blc", last_token(hidden, mask), self.last)
        return self._add_layers(gated + ends)

    def projections(self) -> Float[Tensor, "layer width projection"]:
        """H gates, H x C values, then C for the last token."""
        return torch.cat([self.gate, self.value.flatten(2), self.last], 2)

    def summarise(self, tokens: Ragged) -> Ragged:
        """``[segment, layer, head, (maximum, normaliser, *sums)]``.

        The last token is one more head, with weight 1 on that token and 0 elsewhere.
        """
        heads, outputs = self.gate.shape[2], len(self.bias)
        scores, values, last = tokens.values.float().split([heads, heads * outputs, outputs], -1)
        return summarise_with_last(scores, values.unflatten(-1, (heads, -1)), tokens, last)

    def layer_parameters(self) -> tuple[Tensor, ...]:
        return self.gate, self.value, self.last

    def summary_kind(self) -> Hashable:
        """Readouts of the same sizes."""
        return (Readout, self.gate.shape[2], len(self.bias))

    def merge(self, left: Ragged, right: Ragged) -> Ragged:
        return merge_with_last(left, right)

    def finish(self, state: Ragged) -> Float[Tensor, "segment output"]:
        """The layers' and heads' logits, added."""
        return self._add_layers(finish_softmax(state).sum(2))

    def shares(self, tokens: Ragged, targets: Float[Tensor, "segment output"]) -> Shares:
        """Exact: each token's own terms, with the gates' weights held fixed."""
        return read_off(self._weighed, tokens, targets)

    def _weighed(self, tokens: Ragged) -> Float[Tensor, "segment output"]:
        projections = freeze_weights(tokens.values, self.gate.shape[2])
        return self.logits(Ragged(projections, tokens.lengths))

    def _add_layers(
        self, readouts: Float[Tensor, "batch layer output"]
    ) -> Float[Tensor, "batch output"]:
        return readouts.sum(1) / math.sqrt(readouts.shape[1]) + self.bias
