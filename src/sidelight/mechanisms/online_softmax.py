"""Softmax-weighted sums in one pass: the state that gate and readout share.

Per group and head the state holds the largest score so far, the normaliser relative to it, and the
weighted sums; two states merge exactly and in any order (Milakov & Gimelshein 2018).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sidelight.ragged import LOWEST, Ragged


def summarise(
    scores: Float[Tensor, "row group head"],
    values: Float[Tensor, "row group head value"],
    tokens: Ragged,
) -> Ragged:
    """The state of each segment: ``[segment, group, head, (maximum, normaliser, *sums)]``.

    Args:
        scores: Logits of the weights, float32.
        values: What is weighted, float32.
        tokens: Gives the rows' segments.
    """
    # The maximum only keeps exp() in range: its gradient cancels.
    top = Ragged(scores.detach(), tokens.lengths).maxima()
    weight = (scores - top[tokens.segments]).exp()[..., None]
    parts = (Ragged(part, tokens.lengths).sums() for part in (weight, weight * values))
    return Ragged.one_row_each(torch.cat([top[..., None], *parts], -1))


def merge(left: Ragged, right: Ragged) -> Ragged:
    """The state of both runs of tokens."""
    top = torch.maximum(left.values[..., :1], right.values[..., :1])
    sums = [(side.values[..., :1] - top).exp() * side.values[..., 1:] for side in (left, right)]
    return Ragged.one_row_each(torch.cat([top, sums[0] + sums[1]], -1))


def finish(state: Ragged) -> Float[Tensor, "segment group head value"]:
    """The weighted means; NaN for a segment without tokens."""
    return state.values[..., 2:] / state.values[..., 1:2]


def masked_softmax(
    scores: Float[Tensor, "*batch item head"], mask: Bool[Tensor, "*#batch item #head"]
) -> Float[Tensor, "*batch item head"]:
    """Softmax over items, masked ones weighing nothing."""
    return torch.where(mask, scores, LOWEST).softmax(-2)
