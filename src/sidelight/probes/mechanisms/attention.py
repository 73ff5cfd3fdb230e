"""Downcast multi-head self-attention, the paper's strongest and most expensive mechanism."""

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from sidelight.errors import SidelightError
from sidelight.probes.mechanisms.base import Aggregator, Geometry, hide, register
from sidelight.probes.mechanisms.pooling import pooling_aggregator
from sidelight.probes.mechanisms.shares import freeze_weights
from sidelight.probes.mechanisms.stages import TwoStage, masked_softmax
from sidelight.probes.ragged import Ragged

# Number of tokens per text whose queries are used in training; see ``DowncastAttention._queries``.
TRAINING_QUERIES = 32
# Float32 head widths that CUDA's memory-efficient kernel supports are multiples of this.
_WIDTH_MULTIPLE = 4


class DowncastAttention(Aggregator):
    """Self-attention among the items in a narrow space, then pooling.

    Q, K, V: width -> inner; scaled dot-product attention per head; inner -> width; mean or max
    over items (Meyoyan & Del Corro 2026, section 3). No positions, residual, norm or biases.
    The state is the projected items themselves, so it grows like a small KV cache.

    Args:
        groups: Number of groups, each with its own projections.
        width: Size of an item.
        inner: Width of the narrow space, divisible by ``heads``.
        heads: Attention heads.
        over_items: How the attended items become one vector.
        training_queries: Queries per segment that training samples; None uses all.
    """

    def __init__(
        self,
        *,
        groups: int,
        width: int,
        inner: int,
        heads: int,
        over_items: Literal["mean", "max"],
        training_queries: int | None = None,
    ):
        super().__init__()
        self.query_key_value = nn.Parameter(torch.empty(groups, width, 3 * inner))
        self.out = nn.Parameter(torch.empty(groups, inner, width))
        nn.init.normal_(self.query_key_value, std=width**-0.5)
        nn.init.normal_(self.out, std=inner**-0.5)
        self._heads = heads
        self._over_items = over_items
        self._pool = pooling_aggregator(over_items)
        self._training_queries = training_queries

    def forward(
        self, items: Float[Tensor, "batch group item width"], mask: Bool[Tensor, "batch item"]
    ) -> Float[Tensor, "batch group width"]:
        """Attend, project back to full width, and pool."""
        projected = torch.einsum("bgnd,gdk->bgnk", hide(items, mask), self.query_key_value)
        query, key, value = (
            chunk.unflatten(-1, (self._heads, -1)) for chunk in projected.chunk(3, -1)
        )  # (B, G, N, H, inner / H)
        scores = torch.einsum("bgihe,bgjhe->bgijh", query, key) / query.shape[-1] ** 0.5
        weights = masked_softmax(scores, mask[:, None, None, :, None])
        attended = torch.einsum("bgijh,bgjhe->bgihe", weights, value).flatten(-2)
        return self._pool(torch.einsum("bgne,ged->bgnd", attended, self.out), mask)

    def projections(
        self, carry: Float[Tensor, "group width carry"]
    ) -> Float[Tensor, "group width projection"]:
        """Query, key and value; the carry is composed in ``finish``."""
        return self.query_key_value

    def with_frozen_weights(self, items: Ragged) -> Ragged:
        """The projections with queries and keys detached, as they only determine weights."""
        return Ragged(freeze_weights(items.values, items.values.shape[2] // 3 * 2), items.lengths)

    def summarise(self, items: Ragged) -> Ragged:
        """The projected items."""
        return items

    def merge(self, left: Ragged, right: Ragged) -> Ragged:
        """All items of both states."""
        return left.joined(right)

    def finish(
        self, state: Ragged, carry: Float[Tensor, "group width carry"]
    ) -> Float[Tensor, "segment group carry"]:
        """Attend within each segment, then pool what the carry needs.

        Under mean pooling, the projection back to full width is composed with the carry, so that no
        item is expanded to the width of a hidden state.
        """
        order: list[Tensor] = []
        pooled: list[Tensor] = []
        for chosen, items, is_present in _padded(state):
            queries = self._queries(is_present)
            attended = self._attend(items, is_present, queries)
            if self._over_items == "max":
                attended = torch.einsum("bgne,ged->bgnd", attended, self.out)
            order.append(chosen)
            pooled.append(self._pool(attended, is_present.gather(1, queries)))
        vectors = torch.cat(pooled)[torch.cat(order).argsort()]
        through = (
            carry if self._over_items == "max" else torch.einsum("ged,gdk->gek", self.out, carry)
        )
        return torch.einsum("bge,gek->bgk", vectors, through)

    def _queries(self, is_present: Bool[Tensor, "batch item"]) -> Int[Tensor, "batch query"]:
        """The items whose queries are used: all, or a sample of long segments in training.

        The mean over evenly spread queries estimates the mean over all, at a cost that grows with
        the length instead of its square.
        """
        lengths = is_present.sum(1, keepdim=True)
        sample = self._training_queries
        if not self.training or sample is None or int(lengths.min()) <= sample:
            return torch.arange(is_present.shape[1], device=is_present.device).expand_as(is_present)
        spread = (torch.arange(sample, device=is_present.device) + 0.5) / sample
        return (spread * lengths).long()

    def _attend(
        self,
        items: Float[Tensor, "batch item group column"],
        is_present: Bool[Tensor, "batch item"],
        queries: Int[Tensor, "batch query"],
    ) -> Float[Tensor, "batch group query inner"]:
        query, key, value = items.chunk(3, -1)
        if queries.shape[1] < items.shape[1]:
            query = query[torch.arange(len(items), device=items.device)[:, None], queries]
        query, key, value = (
            tensor.float().unflatten(-1, (self._heads, -1)).permute(0, 2, 3, 1, 4).flatten(1, 2)
            for tensor in (query, key, value)
        )  # (B, G * H, N, inner / H)
        mask = None if bool(is_present.all()) else is_present[:, None, None, :]
        width = query.shape[-1]
        # For other widths, CUDA materialises the scores of every pair of items.
        query, key, value = (
            functional.pad(tensor, (0, -width % _WIDTH_MULTIPLE)) for tensor in (query, key, value)
        )
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=width**-0.5
        )[..., :width]
        return attended.unflatten(1, (-1, self._heads)).transpose(2, 3).flatten(3)


def _padded(
    state: Ragged,
) -> Iterator[
    tuple[
        Int[Tensor, " chosen"],
        Float[Tensor, "chosen item group column"],
        Bool[Tensor, "chosen item"],
    ]
]:
    """Segments stacked into a batch and padded with zeros that the mask hides.

    They are batched so that none is a third longer than another, which keeps padding cheap.
    """
    segments = state.values.split(state.lengths.tolist())
    order = state.lengths.argsort(stable=True)
    bucket = (state.lengths[order].clamp(min=1).float().log2() * 2.5).floor()
    sizes = torch.unique_consecutive(bucket, return_counts=True)[1]
    for chosen in order.split(sizes.tolist()):
        items = torch.nn.utils.rnn.pad_sequence(
            [segments[i] for i in chosen.tolist()], batch_first=True
        )
        position = torch.arange(items.shape[1], device=items.device)
        yield chosen, items, position[None] < state.lengths[chosen][:, None]


@register("attention")
def attention(
    geometry: Geometry,
    *,
    factor: int = 8,
    heads: int = 4,
    pooling: Literal["mean", "max"] = "mean",
) -> TwoStage:
    """Downcast attention in both stages.

    Args:
        geometry: Sizes.
        factor: Hidden-state width divided by inner width (the paper searches 4 to 64).
        heads: Attention heads.
        pooling: Pooling over the attended items.
    """
    inner = geometry.width // factor
    if inner == 0 or inner % heads:
        raise SidelightError(
            f"Attention with factor {factor} has an inner width of {inner}, which {heads} heads "
            f"cannot share evenly. Choose a number of heads that divides {inner}."
        )

    def aggregator(groups: int) -> DowncastAttention:
        # Tokens can be sampled. Layers are few and differ, and max pooling needs all items.
        samples = groups == geometry.layers and pooling == "mean"
        return DowncastAttention(
            groups=groups,
            width=geometry.width,
            inner=inner,
            heads=heads,
            over_items=pooling,
            training_queries=TRAINING_QUERIES if samples else None,
        )

    return TwoStage(aggregator, geometry)
