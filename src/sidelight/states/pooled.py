"""Two vectors that stand for each text at each layer: the mean of its tokens, and the last one."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sidelight.progress import progress
from sidelight.ragged import Ragged
from sidelight.states.cache import Shard, States


@dataclass(frozen=True)
class Pooled:
    """Means and last tokens, in the order of the texts.

    Attributes:
        means: Over the tokens that a probe reads.
        lasts: Of the last of them.
    """

    means: Float[Tensor, "text layer width"]
    lasts: Float[Tensor, "text layer width"]


def pool(states: States) -> Pooled:
    """Reads every shard once; float32."""
    sizes = states.fingerprint
    shape = (sum(map(len, states.plan.rows)), sizes.layers, sizes.width)
    means, lasts = torch.empty(shape), torch.empty(shape)
    with progress("Pooling", shape[0], unit="texts") as shown:
        for index in range(len(states)):
            shard = states.read(index)
            own = pool_shard(shard)
            means[shard.rows], lasts[shard.rows] = own.means, own.lasts
            shown.advance(len(shard.rows))
    return Pooled(means, lasts)


def pool_shard(shard: Shard) -> Pooled:
    """Of one shard, in the order of its texts."""
    # Layer by layer: a shard in float32 would not fit beside itself.
    sums = [Ragged(layer.float(), shard.lengths).sums() for layer in shard.hidden]
    ends = shard.lengths.cumsum(0) - 1
    return Pooled(
        torch.stack(sums, 1) / shard.lengths[:, None, None],
        shard.hidden[:, ends].transpose(0, 1).float(),
    )
