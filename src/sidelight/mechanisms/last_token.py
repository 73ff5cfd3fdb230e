"""The last token as a head of the running softmax state: weight 1 there, 0 elsewhere.

An empty segment has maximum ``LOWEST`` and weight 0; any other has maximum 0 and weight 1.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sidelight.ragged import LOWEST, Ragged


def with_last(gated: Ragged, values: Float[Tensor, "row group value"], tokens: Ragged) -> Ragged:
    """The state of an online softmax with one head more.

    Args:
        gated: ``[segment, group, head, (maximum, normaliser, *sums)]``.
        values: Of every token; only a segment's last one counts.
        tokens: Gives the rows' segments.
    """
    has_token = tokens.lengths > 0
    own = gated.values.new_zeros(*gated.values.shape[:2], 2 + values.shape[2])
    own[..., 0] = LOWEST
    ends = (tokens.lengths.cumsum(0) - 1)[has_token]
    weight = torch.ones_like(values[ends][..., :1])
    own = own.index_put((has_token,), torch.cat([0 * weight, weight, values[ends]], -1))
    return Ragged.one_row_each(torch.cat([gated.values, own[:, :, None]], 2))


def merge_last(merged: Ragged, left: Ragged, right: Ragged) -> Ragged:
    """Puts the last head right: it is that of ``right``, where ``right`` has a token.

    Args:
        merged: What ``online_softmax.merge`` made of both.
        left: The earlier run of tokens.
        right: The later one.
    """
    earlier, later = (side.values[:, :, -1:] for side in (left, right))
    last = torch.where(later[..., :1] > LOWEST, later, earlier)
    return Ragged.one_row_each(torch.cat([merged.values[:, :, :-1], last], 2))


def last_token(
    items: Float[Tensor, "batch group item width"], mask: Bool[Tensor, "batch item"]
) -> Float[Tensor, "batch group width"]:
    """The dense form: each text's last item that the mask shows."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    ends = torch.where(mask, positions, -1).argmax(1)
    return items[torch.arange(len(items), device=mask.device), :, ends]
