"""Where a baseline's training finds tokens: one layer in memory, or all layers shard by shard."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from sidelight.cache import Shard
from sidelight.standardisation import Standardisation
from sidelight.study import Split

# Enough tokens to know a mean to about a hundredth of a standard deviation.
_MOMENT_TOKENS = 8192


@dataclass(frozen=True)
class TokenSource:
    """Tokens and labels of some texts.

    Attributes:
        sizes: Texts in each shard.
        read: Gives a shard; its ``rows`` are positions in ``labels``.
        labels: As in ``Examples.labels``.
    """

    sizes: tuple[int, ...]
    read: Callable[[int], Shard]
    labels: Int[Tensor, "text ..."]

    @staticmethod
    def one_layer(split: Split, layer: int) -> "TokenSource":
        """A single shard of a single layer, in memory."""
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
        tokens = split.select(order.tolist()).tokens(layer)
        shard = Shard(tokens.values[None], tokens.lengths, order)
        return TokenSource((len(split),), lambda _index: shard, torch.from_numpy(split.labels))

    @staticmethod
    def all_layers(split: Split) -> "TokenSource":
        """The shards on disk, or one in memory if the split is part of a data set."""
        states = split.training_set().states
        sizes = tuple(len(rows) for rows in states.plan.rows)
        return TokenSource(sizes, states.read, torch.from_numpy(split.labels))

    def scaling(self) -> Standardisation:
        """Per-layer mean and scale of the first shard's first tokens."""
        return Standardisation.measured(self.read(0).hidden[:, :_MOMENT_TOKENS])
