"""A probe's columns of cached texts, piece by piece: what every part of an anatomy reads.

The backbone does not run, and each hidden state is projected once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sidelight.anatomy.tokens import mark_tokens
from sidelight.cache import Shard
from sidelight.probe import Probe
from sidelight.ragged import Ragged
from sidelight.study import Split

# Values of hidden states in one piece: 128 MiB in float32.
_PIECE_VALUES = 2**25


@dataclass(frozen=True)
class Piece:
    """Some texts as a probe sees them.

    Attributes:
        tokens: Columns, ``[token, layer, column]`` in float32. Columns have no constant term, so
            zeros stand for a layer at its standardisation mean.
        marks: What each token is; see ``mark_tokens``.
        texts: Where in the split each text is.
    """

    tokens: Ragged
    marks: Bool[Tensor, "token mark"]
    texts: Int[Tensor, " text"]


def read_pieces(probe: Probe, split: Split, *, device: torch.device | str) -> Iterator[Piece]:
    """All texts of a split, in the order they are cached in."""
    projection = probe.projection()
    weight = projection.weight.detach().float().to(device)
    shift = projection.shift.detach().float().to(device)[:, None]
    states = split.training_set().states
    for index in range(len(states)):
        for part in _cut(states.read(index)):
            hidden = part.hidden.to(device).float()
            columns = torch.baddbmm(shift, hidden, weight).transpose(0, 1)  # (T, L, M)
            marks = [mark_tokens(split.prompts[int(i)], probe.reads) for i in part.rows]
            tokens = Ragged(columns.contiguous(), part.lengths.to(device))
            yield Piece(tokens, torch.cat(marks).to(device), part.rows)


def _cut(shard: Shard) -> Iterator[Shard]:
    """The shard in runs of whole texts of about ``_PIECE_VALUES``."""
    layers, _, width = shard.hidden.shape
    ends = shard.lengths.cumsum(0)
    numbers = (ends - 1) // max(1, _PIECE_VALUES // (layers * width))
    cuts = torch.unique_consecutive(numbers, return_counts=True)[1].cumsum(0).tolist()
    for first, last in pairwise([0, *cuts]):
        begin = int(ends[first - 1]) if first else 0
        hidden = shard.hidden[:, begin : int(ends[last - 1])]
        yield Shard(hidden, shard.lengths[first:last], shard.rows[first:last])
