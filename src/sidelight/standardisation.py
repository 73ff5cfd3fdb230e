"""Per-layer standardisation of hidden states, and how it folds into a probe's projection."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sidelight.mechanisms.base import Geometry


@dataclass(frozen=True)
class Projection:
    """An affine map of each layer's hidden states to a few columns: ``h @ weight + shift``."""

    weight: Float[Tensor, "layer width column"]
    shift: Float[Tensor, "layer column"]


@dataclass(frozen=True)
class Standardisation:
    """x = (h - mean) / scale, for each layer and hidden dimension.

    The norm of the residual stream grows with depth, and a few dimensions dominate it. With
    standardised states, one learning rate suits all layers. The map is affine, so serving it costs
    nothing.
    """

    mean: Float[Tensor, "layer width"]
    scale: Float[Tensor, "layer width"]

    @staticmethod
    def identity(geometry: Geometry) -> "Standardisation":
        """Leaves hidden states as they are."""
        shape = (geometry.layers, geometry.width)
        return Standardisation(torch.zeros(shape), torch.ones(shape))

    @staticmethod
    def measured(hidden: Float[Tensor, "layer token width"]) -> "Standardisation":
        """From the mean and standard deviation over tokens; constant dimensions keep scale 1."""
        scale, mean = torch.std_mean(hidden.float(), dim=1)
        return Standardisation(mean, torch.where(scale > 1e-6, scale, 1.0))

    def weighted(self, weights: Float[Tensor, " layer"]) -> "Standardisation":
        """Each layer's standardised states multiplied by a weight, 0 or more."""
        return Standardisation(self.mean, self.scale / weights.to(self.scale.device)[:, None])

    def fold(
        self, columns: Float[Tensor, "layer width column"], *, dtype: torch.dtype = torch.float32
    ) -> Projection:
        """The projection of raw states that equals ``columns`` on standardised ones.

        Args:
            columns: A projection of standardised states.
            dtype: Dtype of the states that will be projected. The weight is rounded to it before
                the shift is computed, so that rounding cannot move the mean.
        """
        weight = (columns / self.scale[..., None]).to(dtype)
        return Projection(weight, -torch.einsum("ld,ldm->lm", self.mean, weight.float()))

    def to(self, device: torch.device) -> "Standardisation":
        return Standardisation(self.mean.to(device), self.scale.to(device))
