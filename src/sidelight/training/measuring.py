"""What is known of the hidden states before training, from the first shards of the cache.

Shards are random samples of the texts.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sidelight.cache import States
from sidelight.pooled import Pooled, pool_shard
from sidelight.standardisation import Standardisation
from sidelight.training.layer_weights import TEXTS

# Enough tokens to know a mean to about a hundredth of a standard deviation.
_MOMENT_TOKENS = 8192


def measured(states: States) -> Standardisation:
    """Mean and scale of each layer's values."""
    hidden: list[Float[Tensor, "layer token width"]] = []
    tokens = 0
    for index in range(len(states)):
        hidden.append(states.read(index).hidden)
        tokens += hidden[-1].shape[1]
        if tokens >= _MOMENT_TOKENS:
            break
    return Standardisation.measured(torch.cat(hidden, 1)[:, :_MOMENT_TOKENS])


def pooled_sample(states: States) -> tuple[Pooled, Int[Tensor, " text"]]:
    """Means and last tokens of as many texts as layer weights look at, and which texts they are."""
    parts: list[Pooled] = []
    rows: list[Tensor] = []
    for index in range(len(states)):
        shard = states.read(index)
        parts.append(pool_shard(shard))
        rows.append(shard.rows)
        if sum(map(len, rows)) >= TEXTS:
            break
    means, lasts = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("means", "lasts")
    )
    return Pooled(means, lasts), torch.cat(rows)
