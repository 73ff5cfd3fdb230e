"""Layer fusion: a few non-linear features of all layers of a token, read by attention heads."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from sidelight.probes.mechanisms.base import Geometry, Mechanism, hide
from sidelight.probes.mechanisms.shares import Shares, integrated
from sidelight.probes.mechanisms.stages import (
    finish_softmax,
    last_token,
    masked_softmax,
    merge_with_last,
    summarise_with_last,
)
from sidelight.probes.ragged import Ragged

# Dropout rate of the features in training, chosen on validation data.
DROPOUT = 0.3


class Fusion(Mechanism):
    """Attention heads over token features that combine all layers.

    z_t = gelu(norm((1 / sqrt(L + 1)) sum_l A_l x_lt)), norm: layer normalisation over the r numbers
    logits = b + u . z_last + sum_k sum_t softmax_t(g_k . z_t) (v_k . z_t)

    A linear readout weighs each layer separately. Here, a feature combines a token's layers before
    the softmax over tokens. A token costs r numbers per layer, which are summed over the layers.

    Args:
        geometry: Layers, width and outputs.
        rank: Features per token (r).
        heads: Attention heads over the tokens.
    """

    def __init__(self, geometry: Geometry, *, rank: int = 64, heads: int = 4):
        super().__init__()
        layers, width, outputs = geometry.layers, geometry.width, geometry.outputs
        self.features = nn.Parameter(torch.randn(layers, width, rank) / math.sqrt(width))
        self.norm = nn.LayerNorm(rank)
        self.gate = nn.Parameter(torch.zeros(rank, heads))
        self.value = nn.Parameter(torch.randn(rank, heads, outputs) / math.sqrt(rank))
        self.last = nn.Parameter(torch.randn(rank, outputs) / math.sqrt(rank))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(
        self, hidden: Float[Tensor, "batch layer token width"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch output"]:
        """Compute the equations above in dense form."""
        inner = torch.einsum("bltd,ldr->btr", hide(hidden, mask), self.projections())
        features = functional.gelu(self.norm(inner))
        weights = masked_softmax(features @ self.gate, mask[..., None])  # (B, T, H)
        values = torch.einsum("btr,rhc->bthc", features, self.value)
        ends = last_token(features[:, None], mask)[:, 0] @ self.last
        return (weights[..., None] * values).sum((1, 2)) + ends + self.bias

    def projections(self) -> Float[Tensor, "layer width projection"]:
        """Return each layer's contribution to the features."""
        return self.features / math.sqrt(len(self.features))

    def summarise(self, tokens: Ragged) -> Ragged:
        """Return ``[segment, 1, head, (maximum, normaliser, *sums)]``.

        The last token is an additional head.
        """
        features = functional.gelu(self.norm(tokens.values.float().sum(1)))
        features = functional.dropout(features, DROPOUT, self.training)
        values = torch.einsum("tr,rhc->thc", features, self.value)
        scores, ends = features @ self.gate, features @ self.last
        return summarise_with_last(scores[:, None], values[:, None], tokens, ends[:, None])

    def merge(self, left: Ragged, right: Ragged) -> Ragged:
        return merge_with_last(left, right)

    def finish(self, state: Ragged) -> Float[Tensor, "segment output"]:
        """Add the logits of the heads."""
        return finish_softmax(state).sum((1, 2)) + self.bias

    def shares(self, tokens: Ragged, targets: Float[Tensor, "segment output"]) -> Shares:
        """Compute shares by integrated gradients, because the features are not linear."""
        return integrated(self.logits, tokens, targets, sums_layers=True)
