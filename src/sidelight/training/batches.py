"""The batches of a shard, and the beginnings and long inputs that are made of a batch.

The texts of a shard lie in random order, so neighbours are a random batch, without a copy.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from sidelight.ragged import Ragged
from sidelight.states.cache import Shard

# About two thousand tokens of short prompts.
_MOST_OTHERS = 40


def batches(shard: Shard, *, size: int, shuffle: torch.Generator) -> Iterator[Shard]:
    """Neighbouring texts, in random order and with a random first cut.

    A shard with fewer texts than ``size`` is one batch; the first and the last batch of a larger
    one may have fewer texts.
    """
    texts = len(shard.rows)
    first = int(torch.randint(1, size + 1, (), generator=shuffle)) if texts >= size else texts
    parts = list(neighbours(shard, [0, *range(first, texts, size), texts]))
    for index in torch.randperm(len(parts), generator=shuffle).tolist():
        yield parts[index]


def neighbours(shard: Shard, cuts: Sequence[int]) -> Iterator[Shard]:
    """The texts between each two cuts, as views."""
    ends = torch.cat([torch.zeros(1, dtype=torch.long), shard.lengths.cumsum(0)]).tolist()
    for start, stop in pairwise(cuts):
        hidden = shard.hidden[:, ends[start] : ends[stop]]
        yield Shard(hidden, shard.lengths[start:stop], shard.rows[start:stop])


def random_beginnings(tokens: Ragged) -> Ragged:
    """A beginning of each text, of log-uniform length: running scores matter from the start."""
    share = torch.rand(len(tokens.lengths), device=tokens.lengths.device)
    lengths = ((tokens.lengths + 1) ** share).long()
    return tokens.beginnings(lengths.minimum(tokens.lengths))


def among_others(tokens: Ragged, labels: Int[Tensor, "text ..."]) -> Ragged:
    """Each text inside a long input that is otherwise made of negative texts of its batch.

    A probe that has only seen short texts misses one of them in a long input. If a label says that
    some part of a text has a property, several texts in one input have the labels of all. The
    hidden states are those of each text by itself, so this costs no forward pass; docs/results.md
    has what it brings.

    The text's position is random, and the number of others is log-uniform, from 1 to 40. If every
    text has a label, nothing changes.

    Args:
        tokens: The tokens of each text, in any form.
        labels: 0 or 1, with a column per label for a multi-label task.

    Returns:
        One long input for each text, in their order, with the labels of that text.
    """
    others = (~labels.reshape(len(labels), -1).any(1)).nonzero()[:, 0]
    if not len(others):
        return tokens
    texts = torch.arange(len(labels), device=labels.device)
    drawn = torch.rand(2, len(labels), device=labels.device)
    sizes = 1 + (drawn[0] * math.log(_MOST_OTHERS + 1)).exp().long().clamp(max=_MOST_OTHERS)
    members = others[torch.randint(len(others), (int(sizes.sum()),), device=labels.device)]
    members[sizes.cumsum(0) - sizes + (drawn[1] * sizes).long()] = texts
    parts = tokens.chosen(members)
    ends = parts.lengths.cumsum(0)[sizes.cumsum(0) - 1]
    return Ragged(parts.values, ends.diff(prepend=ends.new_zeros(1)))
