"""A shard of the cache in batches, without a copy.

The texts of a shard lie in random order, so neighbours are a random batch.

Long inputs out of a batch: each text among others that have no label.

A probe that has seen short texts only misses one of them in a long input. Where a label says that
some part of a text is so, several texts in one input have the labels of all. The hidden states are
those of each text by itself, so this costs no forward pass (docs/results.md has what it brings).
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from sidelight.ragged import Ragged
from sidelight.states.cache import Shard


def batches(shard: Shard, *, size: int, shuffle: torch.Generator) -> Iterator[Shard]:
    """Neighbours together, in random order and with a random first cut.

    A shard with fewer texts than a batch is not cut.

    Args:
        shard: Of a cache.
        size: Texts of a batch; the first one and the last one may have fewer.
        shuffle: Decides the first cut and the order.
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


def on_device(shard: Shard, device: torch.device, dtype: torch.dtype) -> Shard:
    """The shard where it is trained on."""
    return Shard(shard.hidden.to(device, dtype), shard.lengths.to(device), shard.rows)


# Two thousand tokens, of short prompts.
_MOST_OTHERS = 40


def among_others(tokens: Ragged, labels: Int[Tensor, "text ..."]) -> Ragged:
    """Each text at a random place among texts of the batch without a label.

    The number of others is log-uniform, from 1 to 40. Where all texts have a label, they stay as
    they are.

    Args:
        tokens: Of each text, in whatever form.
        labels: 0 or 1; of a multi-label task, a column for each label.

    Returns:
        As many segments as texts, in their order, whose labels hold.
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
