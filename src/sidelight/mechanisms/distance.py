"""How far a text is from those that a probe was trained on: what it has never seen stands out."""

from collections.abc import Hashable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sidelight.mechanisms.base import Geometry, Mechanism, hide
from sidelight.mechanisms.pooling import MeanPooling
from sidelight.ragged import Ragged

# Random directions of each layer: more of them find little more.
_DIRECTIONS = 2


class Distance(Mechanism):
    """The squared Mahalanobis distance of a text's mean states, over the limit of familiar ones.

    m_l = mean_t R_l x_lt
    distance = (m - c)' P (m - c) / (a + b / tokens)

    x are states with a root mean square of 1, R_l random directions, m those of all layers, c and P
    the mean and the precision of familiar texts (Lee et al. 2018, here in a random subspace). The
    mean of few tokens varies more, which b allows for. Above 1, a text is unfamiliar, as 1.5 % of
    left-out familiar texts are.

    It is no mechanism to choose: a probe has one beside its own, and ``training/distance.py`` fits
    it. Its one output decides nothing.

    Args:
        geometry: Sizes; there is one output, whatever the task.

    Attributes:
        geometry: The same.
    """

    def __init__(self, geometry: Geometry):
        super().__init__()
        self.geometry = geometry
        self._mean = MeanPooling()
        layers, width = geometry.layers, geometry.width
        directions = torch.randn(
            layers, width, _DIRECTIONS, generator=torch.Generator().manual_seed(0)
        )
        self.register_buffer("directions", directions / width**0.5)
        self.register_buffer("centre", torch.zeros(layers, _DIRECTIONS))
        # F, where P = F F'.
        self.register_buffer("factor", torch.eye(layers * _DIRECTIONS))
        # a and b.
        self.register_buffer("limit", torch.tensor([1.0, 0.0]))

    directions: Tensor
    centre: Tensor
    factor: Tensor
    limit: Tensor

    def forward(
        self, hidden: Float[Tensor, "batch layer token width"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch output"]:
        """The equations above, literally."""
        tokens = mask.sum(1)
        means = hide(hidden, mask).sum(2) / tokens[:, None, None]
        return self._distance(torch.einsum("bld,ldk->blk", means, self.directions), tokens)

    def columns(self) -> Float[Tensor, "layer width column"]:
        """R."""
        return self.directions

    def summarise(self, tokens: Ragged) -> Ragged:
        """``[segment, layer, (count, *sums)]``."""
        return self._mean.summarise(tokens)

    def summary_kind(self) -> Hashable:
        """All distances."""
        return Distance

    def merge(self, left: Ragged, right: Ragged) -> Ragged:
        return self._mean.merge(left, right)

    def means(self, state: Ragged) -> Float[Tensor, "segment layer column"]:
        """m of each segment; NaN for a segment without tokens."""
        return self._mean.finish(state, self.directions)

    def finish(self, state: Ragged) -> Float[Tensor, "segment output"]:
        return self._distance(self.means(state), state.values[:, 0, 0])

    def _distance(
        self, means: Float[Tensor, "segment layer column"], tokens: Tensor
    ) -> Float[Tensor, "segment output"]:
        offsets = (means - self.centre).flatten(1) @ self.factor
        limit = self.limit[0] + self.limit[1] / tokens
        return (offsets.square().sum(1) / limit)[:, None]
