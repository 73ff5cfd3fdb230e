"""Direct pooling: the mean or the maximum over items, without parameters."""

from collections.abc import Hashable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sidelight.probes.mechanisms.base import Aggregator, Geometry, hide, register
from sidelight.probes.mechanisms.stages import TwoStage
from sidelight.probes.ragged import LOWEST, Ragged


class MeanPooling(Aggregator):
    """The mean over items (Meyoyan & Del Corro 2026, section 3, direct pooling).

    The state is the number of items and the sum of their projections.
    """

    def forward(
        self, items: Float[Tensor, "batch group item width"], mask: Bool[Tensor, "batch item"]
    ) -> Float[Tensor, "batch group width"]:
        """The mean over the unmasked items."""
        return hide(items, mask).sum(2) / mask.sum(1)[:, None, None]

    def projections(
        self, carry: Float[Tensor, "group width carry"]
    ) -> Float[Tensor, "group width carry"]:
        """Only the carry."""
        return carry

    def summarise(self, items: Ragged) -> Ragged:
        """``[segment, group, (count, *sums)]``."""
        values = items.values.float()
        return Ragged.one_row_each(
            Ragged(torch.cat([torch.ones_like(values[..., :1]), values], -1), items.lengths).sums()
        )

    def summary_kind(self) -> Hashable:
        """All means."""
        return MeanPooling

    def merge(self, left: Ragged, right: Ragged) -> Ragged:
        """Counts and sums add."""
        return Ragged.one_row_each(left.values + right.values)

    def finish(
        self, state: Ragged, carry: Float[Tensor, "group width carry"]
    ) -> Float[Tensor, "segment group carry"]:
        """Sums over counts."""
        return state.values[..., 1:] / state.values[..., :1]


class MaxPooling(Aggregator):
    """The elementwise maximum over items (direct pooling).

    A maximum does not commute with projections, so this stage needs every dimension of every item,
    and its state is as wide as a hidden state.
    """

    def forward(
        self, items: Float[Tensor, "batch group item width"], mask: Bool[Tensor, "batch item"]
    ) -> Float[Tensor, "batch group width"]:
        """The maximum over the unmasked items; NaN if all are masked."""
        if items.shape[2] == 0:
            return items.sum(2) * torch.nan
        return _nan_if_empty(torch.where(mask[:, None, :, None], items, LOWEST).amax(2))

    def projections(
        self, carry: Float[Tensor, "group width carry"]
    ) -> Float[Tensor, "group width width"]:
        """The identity."""
        eye = torch.eye(carry.shape[1], dtype=carry.dtype, device=carry.device)
        return eye.expand(carry.shape[0], -1, -1)

    def with_frozen_weights(self, items: Ragged) -> Ragged:
        """The projections, with each maximum attained by a single item."""
        return items.without_ties()

    def summarise(self, items: Ragged) -> Ragged:
        """``[segment, group, width]``: running maxima."""
        return Ragged.one_row_each(Ragged(items.values.float(), items.lengths).maxima())

    def merge(self, left: Ragged, right: Ragged) -> Ragged:
        """The larger of each."""
        return Ragged.one_row_each(torch.maximum(left.values, right.values))

    def finish(
        self, state: Ragged, carry: Float[Tensor, "group width carry"]
    ) -> Float[Tensor, "segment group carry"]:
        """The maxima, projected."""
        return torch.einsum("sgd,gdk->sgk", _nan_if_empty(state.values), carry)


def pooling_aggregator(kind: Literal["mean", "max"]) -> Aggregator:
    """A pooling stage by name."""
    return {"mean": MeanPooling, "max": MaxPooling}[kind]()


def _nan_if_empty(top: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    return torch.where(top <= LOWEST, torch.nan, top)


@register("pooling")
def pooling(geometry: Geometry, *, kind: Literal["mean", "max"] = "mean") -> TwoStage:
    """The mean or the maximum in both stages."""
    return TwoStage(lambda _groups: pooling_aggregator(kind), geometry)
