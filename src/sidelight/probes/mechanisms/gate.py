"""The scoring attention gate: each item weighted by a softmax over learned scores."""

import math
from collections.abc import Hashable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sidelight.probes.mechanisms.base import Aggregator, Geometry, hide, register
from sidelight.probes.mechanisms.shares import freeze_weights
from sidelight.probes.mechanisms.stages import (
    TwoStage,
    finish_softmax,
    masked_softmax,
    merge_softmax,
    summarise_softmax,
)
from sidelight.probes.ragged import Ragged

Activation = Literal["tanh", "identity"]


class Gate(Aggregator):
    """Weights each item by a softmax over learned scores.

    s_i = tanh(w . x_i), a = softmax(s), v = sum_i a_i x_i, one w per group (Meyoyan & Del Corro
    2026, section 3, scoring attention gate). ``identity`` drops the tanh, under which two weights
    differ at most by a factor of e^2.

    Args:
        groups: Groups with their own scoring vector: layers in the token stage, else 1.
        width: Size of an item.
        activation: What bounds the scores.
    """

    def __init__(self, *, groups: int, width: int, activation: Activation = "tanh"):
        super().__init__()
        self.score = nn.Parameter(torch.randn(groups, width) / math.sqrt(width))
        self._bound = {"tanh": torch.tanh, "identity": torch.Tensor.float}[activation]

    def forward(
        self, items: Float[Tensor, "batch group item width"], mask: Bool[Tensor, "batch item"]
    ) -> Float[Tensor, "batch group width"]:
        """The gated sum over the unmasked items."""
        items = hide(items, mask)
        scores = self._bound(torch.einsum("bgnd,gd->bgn", items, self.score))
        weights = masked_softmax(scores[..., None], mask[:, None, :, None])
        return (weights * items).sum(2)

    def projections(
        self, carry: Float[Tensor, "group width carry"]
    ) -> Float[Tensor, "group width projection"]:
        """The score, then the carry."""
        return torch.cat([self.score[..., None], carry], -1)

    def with_frozen_weights(self, items: Ragged) -> Ragged:
        """The projections with the score detached, as it only determines weights."""
        return Ragged(freeze_weights(items.values, 1), items.lengths)

    def summarise(self, items: Ragged) -> Ragged:
        """``[segment, group, 1, (maximum, normaliser, *sums)]``."""
        values = items.values.float()[:, :, None]
        return summarise_softmax(self._bound(values[..., 0]), values[..., 1:], items)

    def summary_kind(self) -> Hashable:
        """Gates with the same activation."""
        return (Gate, self._bound)

    def merge(self, left: Ragged, right: Ragged) -> Ragged:
        """Exact, in any order."""
        return merge_softmax(left, right)

    def finish(
        self, state: Ragged, carry: Float[Tensor, "group width carry"]
    ) -> Float[Tensor, "segment group carry"]:
        """The gated sums, which are already projected."""
        return finish_softmax(state)[:, :, 0]


@register("gate")
def gate(geometry: Geometry, *, activation: Activation = "tanh") -> TwoStage:
    """Gates in both stages: ``tanh`` as in the paper, or ``identity`` for unbounded scores."""

    def aggregator(groups: int) -> Gate:
        return Gate(groups=groups, width=geometry.width, activation=activation)

    return TwoStage(aggregator, geometry)
