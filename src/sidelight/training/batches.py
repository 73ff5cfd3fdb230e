"""A shard of the cache in batches, without a copy.

The texts of a shard lie in random order, so neighbours are a random batch.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from sidelight.cache import Shard


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
