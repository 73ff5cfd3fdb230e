"""Per-layer scaling of hidden states, and how it folds into a probe's projection."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from sidelight.probes.mechanisms.base import Geometry

# Of a mean square, as in the models' own normalisation.
EPSILON = 1e-6


def inverse_rms(hidden: Float[Tensor, "*token width"]) -> Float[Tensor, "*token 1"]:
    """The factor that gives a hidden state a root mean square of 1; float32."""
    norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
    inverse = (norm.square() / hidden.shape[-1] + EPSILON).rsqrt()
    # 0 where the square overflowed: no number is better than a wrong one.
    return torch.where(inverse > 0, inverse, torch.nan)


def normalised(hidden: Float[Tensor, "token width"]) -> Float[Tensor, "token width"]:
    """With a root mean square of 1, rounded again."""
    return (hidden * inverse_rms(hidden)).to(hidden.dtype)


def spread_and_mean(
    rows: Float[Tensor, "row *value"],
) -> tuple[Float[Tensor, "*value"], Float[Tensor, "*value"]]:
    """The standard deviation over rows (of all, not of a sample) and the mean, in float32."""
    # torch.std_mean takes eight times as long over the first axis.
    mean = rows.mean(0, dtype=torch.float32)
    return (rows - mean).square_().mean(0).sqrt(), mean


@dataclass(frozen=True)
class Projection:
    """A map of each layer's hidden states to a few columns.

    It is ``h @ weight + shift``, or ``h / rms(h) @ weight + shift`` in the columns of probes that
    read normalised states.

    Attributes:
        is_normalised: Which columns those are; None if there are none.
    """

    weight: Float[Tensor, "layer width projection"]
    shift: Float[Tensor, "layer column"]
    is_normalised: Bool[Tensor, " column"] | None = None

    @staticmethod
    def joined(projections: Sequence["Projection"]) -> "Projection":
        """The columns of all parts side by side."""
        flags = [
            torch.zeros_like(projection.shift[0], dtype=torch.bool)
            if projection.is_normalised is None
            else projection.is_normalised
            for projection in projections
        ]
        has_normalised = any(projection.is_normalised is not None for projection in projections)
        return Projection(
            torch.cat([projection.weight for projection in projections], 2),
            torch.cat([projection.shift for projection in projections], 1),
            torch.cat(flags) if has_normalised else None,
        )

    @cached_property
    def depth(self) -> int:
        """How many layers any column depends on, from the embedding up; 1 or more.

        The columns of the layers above are exactly 0.
        """
        if self.weight.is_meta:  # Without values, no layer is known to be unread.
            return len(self.weight)
        is_read = self.weight.flatten(1).any(1) | self.shift.any(1)
        return max(1, int(is_read.nonzero().amax()) + 1) if is_read.any() else 1

    def limited(self, layers: int) -> "Projection":
        """The projections of the first layers alone."""
        return replace(self, weight=self.weight[:layers], shift=self.shift[:layers])

    def padded(self, width: int, *, has_flags: bool) -> "Projection":
        """So many columns, the last of them 0 for any state.

        Args:
            width: At least as many as there are.
            has_flags: Whether it says of each column if it is normalised, even if none is.
        """
        missing = (0, width - self.shift.shape[1])
        flags = self.is_normalised
        if flags is None and has_flags:
            flags = torch.zeros_like(self.shift[0], dtype=torch.bool)
        return Projection(
            pad(self.weight, missing),
            pad(self.shift, missing),
            None if flags is None else pad(flags, missing),
        )

    def to(self, device: torch.device | str) -> "Projection":
        """Detached, in float32: in bf16, what standardisation subtracts would be lost."""
        flags = self.is_normalised
        return Projection(
            self.weight.detach().float().to(device),
            self.shift.detach().float().to(device),
            None if flags is None else flags.to(device),
        )

    def layer(
        self,
        layer: int,
        hidden: Float[Tensor, "token width"],
        *,
        out: Float[Tensor, "token column"] | None = None,
    ) -> Float[Tensor, "token column"]:
        """The columns of one layer's states, with one matmul."""
        return project(self.weight[layer], self.shift[layer], self.is_normalised, hidden, out=out)

    def layers(
        self, hidden: Float[Tensor, "layer token width"]
    ) -> Float[Tensor, "layer token column"]:
        """The columns of all layers' states."""
        if self.is_normalised is None:
            return torch.baddbmm(self.shift[:, None], hidden, self.weight)
        inverse = torch.stack([inverse_rms(layer) for layer in hidden])
        factor = torch.where(self.is_normalised, inverse, 1).to(hidden.dtype)
        return torch.bmm(hidden, self.weight) * factor + self.shift[:, None]


def project(
    weight: Float[Tensor, "width column"],
    shift: Float[Tensor, " column"],
    is_normalised: Bool[Tensor, " column"] | None,
    hidden: Float[Tensor, "token width"],
    *,
    out: Float[Tensor, "token column"] | None = None,
) -> Float[Tensor, "token column"]:
    """As ``Projection.layer``, of a layer's own tensors."""
    if is_normalised is None:
        return torch.addmm(shift, hidden, weight, out=out)
    projections = torch.mm(hidden, weight, out=out)
    return projections.mul_(torch.where(is_normalised, inverse_rms(hidden), 1)).add_(shift)


@dataclass(frozen=True)
class Standardisation:
    """x = (h - mean) / scale, for each layer and hidden dimension; or of h / rms(h).

    The norm of the residual stream grows with depth, and a few dimensions dominate it. With
    standardised states, one learning rate suits all layers. The map is affine, so serving it costs
    nothing.

    Attributes:
        mean: Of each dimension.
        scale: What it is divided by: its standard deviation over a layer's weight.
        is_normalised: Whether states are first divided by their root mean square, as the model's
            next block does. Then no token outweighs others by its norm: attention sinks have a
            hundred times that of other tokens. It multiplies a token's columns by one number.
    """

    mean: Float[Tensor, "layer width"]
    scale: Float[Tensor, "layer width"]
    is_normalised: bool = False

    @staticmethod
    def identity(geometry: Geometry, *, is_normalised: bool = False) -> "Standardisation":
        """Leave hidden states as they are, or only divide them by their root mean square."""
        shape = (geometry.layers, geometry.width)
        return Standardisation(torch.zeros(shape), torch.ones(shape), is_normalised)

    @staticmethod
    def measured(
        layers: Iterable[Float[Tensor, "token width"]], *, is_normalised: bool = False
    ) -> "Standardisation":
        """From the mean and standard deviation over tokens; constant dimensions keep scale 1.

        Args:
            layers: The states of each layer.
            is_normalised: Whether they are divided by their root mean square first.
        """
        layers = map(normalised, layers) if is_normalised else layers
        moments = [spread_and_mean(layer) for layer in layers]
        scale, mean = (torch.stack(layers) for layers in zip(*moments, strict=True))
        return Standardisation(mean, torch.where(scale > 1e-6, scale, 1.0), is_normalised)

    def standardised(
        self, hidden: Float[Tensor, "token width"], layer: int
    ) -> Float[Tensor, "token width"]:
        """The standardised states of one layer, in float32."""
        hidden = normalised(hidden) if self.is_normalised else hidden
        return (hidden.float() - self.mean[layer]) / self.scale[layer]

    def weighted(self, weights: Float[Tensor, " first"]) -> "Standardisation":
        """The first layers' standardised states multiplied by weights, 0 or more."""
        scale = self.scale.clone()
        scale[: len(weights)] /= weights.to(scale.device)[:, None]
        return replace(self, scale=scale)

    def limited(self, layers: int | None) -> "Standardisation":
        """With zeros in place of the states of all layers but the first; None: as it is."""
        if layers is None:
            return self
        scale = self.scale.clone()
        scale[layers:] = torch.inf
        return replace(self, scale=scale)

    def deepened(self, layers: int) -> "Standardisation":
        """Of so many layers; those above its own are read as zeros."""
        missing = (0, 0, 0, layers - len(self.scale))
        return replace(
            self, mean=pad(self.mean, missing), scale=pad(self.scale, missing, value=torch.inf)
        )

    def fold(
        self,
        projections: Float[Tensor, "layer width projection"],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Projection:
        """The projection of raw states that equals ``projections`` on standardised ones.

        Args:
            projections: A projection of standardised states.
            dtype: Dtype of the states that will be projected. The weight is rounded to it before
                the shift is computed, so that rounding cannot move the mean.
        """
        weight = (projections / self.scale[..., None]).to(dtype)
        shift = -torch.einsum("ld,ldm->lm", self.mean, weight.float())
        flags = torch.ones_like(shift[0], dtype=torch.bool) if self.is_normalised else None
        return Projection(weight, shift, flags)

    def to(self, device: torch.device) -> "Standardisation":
        return replace(self, mean=self.mean.to(device), scale=self.scale.to(device))
