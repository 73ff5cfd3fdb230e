"""Building blocks of mechanisms: the running softmax, the last token, and the paper's two stages.

Running softmax: per group and head, the state holds the largest score so far, the normaliser
relative to it, and the weighted sums; two states merge exactly and in any order (Milakov &
Gimelshein 2018). The last token is one more head, with weight 1 on that token and 0 elsewhere: its
maximum is 0, or ``LOWEST`` (with weight 0) in an empty segment.
"""

from collections.abc import Callable, Hashable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sidelight.probes.mechanisms.base import Aggregator, Geometry, Mechanism
from sidelight.probes.mechanisms.shares import Shares, read_off
from sidelight.probes.ragged import LOWEST, Ragged


def summarise_softmax(
    scores: Float[Tensor, "row group head"],
    values: Float[Tensor, "row group head value"],
    tokens: Ragged,
) -> Ragged:
    """The state of each segment: ``[segment, group, head, (maximum, normaliser, *sums)]``.

    Args:
        scores: Logits of the weights, float32.
        values: The values to weight, float32.
        tokens: Gives the segment of each row.
    """
    # The maximum only keeps exp() in range; its gradient cancels.
    top = Ragged(scores.detach(), tokens.lengths).maxima()
    weight = (scores - top[tokens.segments]).exp()[..., None]
    sums = (
        Ragged(values_or_weight, tokens.lengths).sums()
        for values_or_weight in (weight, weight * values)
    )
    return Ragged.one_row_each(torch.cat([top[..., None], *sums], -1))


def merge_softmax(left: Ragged, right: Ragged) -> Ragged:
    """The merged state of two adjacent runs of tokens."""
    top = torch.maximum(left.values[..., :1], right.values[..., :1])
    sums = [(side.values[..., :1] - top).exp() * side.values[..., 1:] for side in (left, right)]
    return Ragged.one_row_each(torch.cat([top, sums[0] + sums[1]], -1))


def finish_softmax(state: Ragged) -> Float[Tensor, "segment group head value"]:
    """The weighted means; NaN for a segment without tokens."""
    return state.values[..., 2:] / state.values[..., 1:2]


def masked_softmax(
    scores: Float[Tensor, "*batch item head"], mask: Bool[Tensor, "*#batch item #head"]
) -> Float[Tensor, "*batch item head"]:
    """Softmax over items; masked items have weight 0."""
    return torch.where(mask, scores, LOWEST).softmax(-2)


def summarise_with_last(
    scores: Float[Tensor, "row group head"],
    values: Float[Tensor, "row group head value"],
    tokens: Ragged,
    ends: Float[Tensor, "row group value"],
) -> Ragged:
    """As ``summarise_softmax``, with the last token as one more head.

    ``ends`` has this head's value of every token; only the last token of a segment counts.
    """
    gated = summarise_softmax(scores, values, tokens).values
    has_token = tokens.lengths > 0
    last = gated.new_zeros(*gated.shape[:2], 2 + ends.shape[2])
    last[..., 0] = LOWEST
    ends = ends[(tokens.lengths.cumsum(0) - 1)[has_token]]
    weight = torch.ones_like(ends[..., :1])
    last = last.index_put((has_token,), torch.cat([0 * weight, weight, ends], -1))
    return Ragged.one_row_each(torch.cat([gated, last[:, :, None]], 2))


def merge_with_last(left: Ragged, right: Ragged) -> Ragged:
    """As ``merge_softmax``, but the last head is that of ``right`` if it has a token."""
    merged = merge_softmax(left, right)
    earlier, later = (side.values[:, :, -1:] for side in (left, right))
    last = torch.where(later[..., :1] > LOWEST, later, earlier)
    return Ragged.one_row_each(torch.cat([merged.values[:, :, :-1], last], 2))


def last_token(
    items: Float[Tensor, "batch group item width"], mask: Bool[Tensor, "batch item"]
) -> Float[Tensor, "batch group width"]:
    """The dense form: the last unmasked item of each text."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    ends = torch.where(mask, positions, -1).argmax(1)
    return items[torch.arange(len(items), device=mask.device), :, ends]


class TwoStage(Mechanism):
    """v_l = A_l(h_l), v = A({v_l}), logits = W v + b (Meyoyan & Del Corro 2026, section 3).

    The streaming form never holds a vector of hidden-state width: the token stage carries only the
    projections that the layer stage and the head need.

    Args:
        aggregator: Builds a stage for a number of groups: one per layer for the token stage, a
            single one for the layer stage.
        geometry: Sizes.
    """

    def __init__(self, aggregator: Callable[[int], Aggregator], geometry: Geometry):
        super().__init__()
        self.token_stage = aggregator(geometry.layers)
        self.layer_stage = aggregator(1)
        self.head = nn.Linear(geometry.width, geometry.outputs)
        self._layers = geometry.layers

    def forward(
        self, hidden: Float[Tensor, "batch layer token width"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch output"]:
        """The two stages, then the head."""
        vectors = self.token_stage(hidden, mask)  # (B, L, D)
        every_layer = torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
        return self.head(self.layer_stage(vectors[:, None], every_layer)[:, 0])

    def projections(self) -> Float[Tensor, "layer width projection"]:
        """The projections of the token stage that the layer stage needs."""
        return self.token_stage.projections(self._carried())

    def summarise(self, tokens: Ragged) -> Ragged:
        return self.token_stage.summarise(tokens)

    def summary_kind(self) -> Hashable | None:
        return self.token_stage.summary_kind()

    def merge(self, left: Ragged, right: Ragged) -> Ragged:
        return self.token_stage.merge(left, right)

    def finish(self, state: Ragged) -> Float[Tensor, "segment output"]:
        """Finish the token stage, then run the layer stage on its carried projections."""
        return self._classify(self._layers_of(state))

    def shares(self, tokens: Ragged, targets: Float[Tensor, "segment output"]) -> Shares:
        """Exact: each token's own terms, with the weights of both stages held fixed."""

        def weighed(tokens: Ragged) -> Float[Tensor, "segment output"]:
            layers = self._layers_of(
                self.token_stage.summarise(self.token_stage.with_frozen_weights(tokens))
            )
            return self._classify(self.layer_stage.with_frozen_weights(layers))

        return read_off(weighed, tokens, targets)

    def _layers_of(self, state: Ragged) -> Ragged:
        """The layers of each segment as the items of the layer stage's single group."""
        vectors = self.token_stage.finish(state, self._carried())  # (S, L, K)
        segments, layers, _ = vectors.shape
        lengths = torch.full((segments,), layers, device=vectors.device)
        return Ragged(vectors.flatten(0, 1)[:, None], lengths)  # (S * L, 1, K)

    def _classify(self, items: Ragged) -> Float[Tensor, "segment output"]:
        vector = self.layer_stage.finish(
            self.layer_stage.summarise(items), self.head.weight.T[None]
        )  # (S, 1, C)
        return vector[:, 0] + self.head.bias

    def _carried(self) -> Float[Tensor, "layer width carry"]:
        projections = self.layer_stage.projections(self.head.weight.T[None])
        return projections.expand(self._layers, -1, -1)
