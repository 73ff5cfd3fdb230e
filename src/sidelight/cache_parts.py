"""Some texts of an activation cache, as training reads them: in memory if they are few."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sidelight.cache import ActivationCache, Shard, ShardPlan, States

_MEMORY_BYTES = 2**30


def states_of(
    cache: ActivationCache, rows: Sequence[int], *, memory_bytes: int = _MEMORY_BYTES
) -> States:
    """The states of some texts.

    Args:
        cache: Where the texts are.
        rows: Which of its texts; text i of the result is the cache's ``rows[i]``.
        memory_bytes: Larger parts are read from disk again in each epoch.
    """
    size_bytes = cache.token_bytes * sum(cache.lengths[row] for row in rows)
    return (MemoryStates if size_bytes <= memory_bytes else PartStates)(cache, rows)


class MemoryStates:
    """Some texts of a cache, gathered into memory as one shard.

    Args:
        cache: Where the texts are.
        rows: Which of its texts; text i of this is the cache's ``rows[i]``.
    """

    def __init__(self, cache: ActivationCache, rows: Sequence[int]):
        self.fingerprint, self.reads = cache.fingerprint, cache.reads
        self._shard = _gathered(cache, rows)
        self.plan = ShardPlan((tuple(self._shard.rows.tolist()),), (self._shard.hidden.shape[1],))

    def __len__(self) -> int:
        """One shard."""
        return 1

    def read(self, index: int) -> Shard:
        """The only shard."""
        return self._shard


class PartStates:
    """Some texts of a cache, picked from each of its shards whenever that is read.

    Args:
        cache: Where the texts are.
        rows: As in ``states_of``.
    """

    def __init__(self, cache: ActivationCache, rows: Sequence[int]):
        self.fingerprint, self.reads = cache.fingerprint, cache.reads
        self._cache = cache
        self._text_of = {row: text for text, row in enumerate(rows)}
        wanted = [[row for row in held if row in self._text_of] for held in cache.plan.rows]
        self._shards = [index for index, held in enumerate(wanted) if held]
        chosen = [wanted[index] for index in self._shards]
        self.plan = ShardPlan(
            tuple(tuple(self._text_of[row] for row in held) for held in chosen),
            tuple(sum(cache.lengths[row] for row in held) for held in chosen),
        )

    def __len__(self) -> int:
        """The shards that hold some of the texts."""
        return len(self._shards)

    def read(self, index: int) -> Shard:
        """The texts of one shard, in its order."""
        shard = self._cache.read(self._shards[index])
        held, parts = shard.rows.tolist(), shard.hidden.split(shard.lengths.tolist(), 1)
        kept = [place for place, row in enumerate(held) if row in self._text_of]
        return Shard(
            torch.cat([parts[place] for place in kept], 1),
            shard.lengths[kept],
            torch.tensor([self._text_of[held[place]] for place in kept]),
        )


def _gathered(cache: ActivationCache, rows: Sequence[int]) -> Shard:
    """The texts in random order, as in a shard on disk."""
    place = {row: text for text, row in enumerate(rows)}
    found: dict[int, Float[Tensor, "layer token width"]] = {}
    for index, held in enumerate(cache.plan.rows):
        if place.keys().isdisjoint(held):
            continue
        shard = cache.read(index)
        parts = shard.hidden.split(shard.lengths.tolist(), 1)
        for row, part in zip(held, parts, strict=True):
            if row in place:
                found[place[row]] = part.clone()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    hidden = [found[text] for text in order]
    lengths = torch.tensor([part.shape[1] for part in hidden])
    return Shard(torch.cat(hidden, 1), lengths, torch.tensor(order))
