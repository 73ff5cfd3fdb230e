"""The layerwise readout: gated means, the last token and extremes of every layer, added."""

import math
from collections.abc import Hashable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sidelight.mechanisms.base import Geometry, Mechanism, hide, register
from sidelight.mechanisms.shares import Shares, held, read_off
from sidelight.mechanisms.stages import (
    finish_softmax,
    last_token,
    masked_softmax,
    merge_with_last,
    summarise_with_last,
)
from sidelight.ragged import LOWEST, Ragged

# One maximum of a layer adds to a class's logit, the other is subtracted.
_SIGNS = (1.0, -1.0)


@register("readout")
class Readout(Mechanism):
    """Adds the logits of gated means, of the last token and of extremes, over all layers.

    logits = b + (1 / sqrt(L + 1)) sum_l (u_l . x_l,last + sum_k r_lk + e_l)
    r_lk = sum_t softmax_t(g_lk . x_lt) (v_lk . x_lt)
    e_l = max_t (p_l . x_lt) - max_t (q_l . x_lt), if there are extremes

    The paper's gate shares one head among all layers; here, every layer and gate has a value vector
    per class. Values are linear, so a token costs (1 + C) H + C numbers per layer, and 2 C more for
    extremes.

    Args:
        geometry: Sizes.
        heads: Gates per layer (H).
        extremes: ``pair`` adds e_l, the difference of two maxima: better with a thousand labels or
            more, worse with few.
    """

    def __init__(
        self, geometry: Geometry, *, heads: int = 2, extremes: Literal["none", "pair"] = "none"
    ):
        super().__init__()
        layers, width, outputs = geometry.layers, geometry.width, geometry.outputs
        signs = len(_SIGNS) if extremes == "pair" else 0
        self.gate = nn.Parameter(torch.randn(layers, width, heads) * 0.01)
        self.value = nn.Parameter(torch.zeros(layers, width, heads, outputs))
        self.last = nn.Parameter(torch.zeros(layers, width, outputs))
        # Not zero: a maximum over equal numbers could not tell tokens apart.
        self.extremes = nn.Parameter(torch.randn(layers, width, signs, outputs) * 0.001)
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
        candidates = torch.einsum("bltd,ldsc->bltsc", hidden, self.extremes)
        maxima = torch.where(mask[:, None, :, None, None], candidates, LOWEST).amax(2)
        return self._add_layers(gated + ends + self._signed(maxima))

    def columns(self) -> Float[Tensor, "layer width column"]:
        """H gates, H x C values, C for the last token, then 2 C whose maxima are taken."""
        return torch.cat([self.gate, self.value.flatten(2), self.last, self.extremes.flatten(2)], 2)

    def summarise(self, tokens: Ragged) -> Ragged:
        """``[segment, layer, head, (maximum, normaliser, *sums)]``.

        The last token is one more head, with weight 1 on that token and 0 elsewhere. Extremes are
        two more, with maxima in place of sums.
        """
        heads, outputs = self.gate.shape[2], len(self.bias)
        signs = self.extremes.shape[2]
        sizes = [heads, heads * outputs, outputs, signs * outputs]
        scores, values, last, candidates = tokens.values.float().split(sizes, -1)
        means = summarise_with_last(scores, values.unflatten(-1, (heads, -1)), tokens, last)
        if not signs:
            return means
        maxima = Ragged(candidates, tokens.lengths).maxima().unflatten(-1, (signs, outputs))
        unused = torch.zeros_like(maxima[..., :1]).expand(-1, -1, -1, 2)
        return Ragged.one_row_each(torch.cat([means.values, torch.cat([unused, maxima], -1)], 2))

    def summary_kind(self) -> Hashable:
        """Readouts of the same sizes."""
        return (Readout, self.gate.shape[2], len(self.bias), self.extremes.shape[2])

    def merge(self, left: Ragged, right: Ragged) -> Ragged:
        left_means, left_maxima = self._means_and_maxima(left)
        right_means, right_maxima = self._means_and_maxima(right)
        means = merge_with_last(left_means, right_means).values
        return Ragged.one_row_each(torch.cat([means, torch.maximum(left_maxima, right_maxima)], 2))

    def finish(self, state: Ragged) -> Float[Tensor, "segment output"]:
        """The layers' and heads' logits, added."""
        means, maxima = self._means_and_maxima(state)
        return self._add_layers(finish_softmax(means).sum(2) + self._signed(maxima[..., 2:]))

    def shares(self, tokens: Ragged, targets: Float[Tensor, "segment output"]) -> Shares:
        """Exact: each token's own terms, with the gates' weights as they are."""
        return read_off(self._weighed, tokens, targets)

    def _weighed(self, tokens: Ragged) -> Float[Tensor, "segment output"]:
        heads, extremes = self.gate.shape[2], self.extremes[0, 0].numel()
        sums, maxima = tokens.values.split([tokens.values.shape[2] - extremes, extremes], -1)
        if extremes:
            maxima = Ragged(maxima, tokens.lengths).untied().values
        columns = torch.cat([held(sums, heads), maxima], -1)
        return self.logits(Ragged(columns, tokens.lengths))

    @torch.no_grad()
    def mixed(self, other: "Readout", *, share: float) -> "Readout":
        """A readout between this one and another one of the same kind, with the gates of both.

        Args:
            other: Reads the same states.
            share: Of its logits in those of the mixture, between 0 and 1.
        """
        layers, width, heads, outputs = self.value.shape
        mixture = Readout(
            Geometry(layers, width, outputs),
            heads=heads + other.value.shape[2],
            extremes="pair" if self.extremes.shape[2] else "none",
        ).to(self.bias.device)
        mixture.gate.copy_(torch.cat([self.gate, other.gate], 2))
        mixture.value.copy_(torch.cat([(1 - share) * self.value, share * other.value], 2))
        mixture.last.copy_((1 - share) * self.last + share * other.last)
        mixture.extremes.copy_((1 - share) * self.extremes)
        mixture.bias.copy_((1 - share) * self.bias + share * other.bias)
        return mixture.eval().requires_grad_(False)

    def _means_and_maxima(
        self, state: Ragged
    ) -> tuple[Ragged, Float[Tensor, "segment layer sign number"]]:
        """The state of the gated means and the last token, and that of the extremes."""
        heads = self.gate.shape[2] + 1
        return Ragged.one_row_each(state.values[:, :, :heads]), state.values[:, :, heads:]

    def _signed(
        self, maxima: Float[Tensor, "batch layer sign output"]
    ) -> Float[Tensor, "batch layer output"]:
        signs = maxima.new_tensor(_SIGNS[: maxima.shape[2]])
        return (maxima * signs[:, None]).sum(2)

    def _add_layers(
        self, readouts: Float[Tensor, "batch layer output"]
    ) -> Float[Tensor, "batch output"]:
        return readouts.sum(1) / math.sqrt(readouts.shape[1]) + self.bias


@register("linear")
class Linear(Readout):
    """A readout whose one gate is zero, so that it takes the mean over tokens.

    What it learns has one optimum, which training solves for (``training/linear.py``).

    Args:
        geometry: Sizes.
    """

    def __init__(self, geometry: Geometry):
        super().__init__(geometry, heads=1)
        zeros = torch.zeros_like(self.gate)
        del self.gate
        self.register_buffer("gate", zeros, persistent=False)
