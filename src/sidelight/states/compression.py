"""Hidden states in a quarter of their bytes: each layer's principal directions, in eight bits.

Probes whose parameters belong to one layer each can train on them. What they learn lies in the
directions that are kept, so a trained probe reads whole hidden states, as any other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import torch
from jaxtyping import Float, Float16, Int8
from torch import Tensor

from sidelight.models.fingerprint import Fingerprint
from sidelight.probes.standardisation import Projection, Standardisation, project
from sidelight.states.files import read_tensors, write_tensors

# Of the bytes that the whole states take, in bfloat16.
SHARE = 4
_FACTOR_BYTES = 2
_LARGEST = 127


def directions_of_width(width: int) -> int:
    """The directions of a layer whose coordinates and factor take a share of its states' bytes."""
    return max(1, 2 * width // SHARE - _FACTOR_BYTES)


def compressed_token_bytes(who: Fingerprint) -> int:
    """The stored size of a token's compressed states of all layers."""
    return who.layers * (directions_of_width(who.width) + _FACTOR_BYTES)


def directions_bytes(who: Fingerprint) -> int:
    """The memory that the directions of a model's layers take."""
    return who.layers * who.width * directions_of_width(who.width) * 2


@dataclass(frozen=True)
class CompressedStates:
    """The stored form of some tokens' states: ``values * factors[..., None]`` is ``z``.

    Attributes:
        values: Coordinates, rounded to integers; float16 where a benchmark leaves them unrounded.
        factors: What the coordinates of a token in a layer are multiplied by.
    """

    values: Int8[Tensor, "layer token direction"] | Float16[Tensor, "layer token direction"]
    factors: Float16[Tensor, "layer token"]


@dataclass(frozen=True)
class Compression:
    """z = (x R) / s of standardised states x, and x ~ (z s) R^T.

    R holds a layer's principal directions, and s the square roots of their standard deviations. All
    coordinates of a token share one rounding step; s balances its effect on strong and weak
    directions.

    Attributes:
        moments: How states are standardised before.
        directions: R, orthonormal within the rounding of float16, which halves the memory.
        scales: s.
    """

    moments: Standardisation
    directions: Float16[Tensor, "layer width direction"]
    scales: Float[Tensor, "layer direction"]

    @staticmethod
    def measured(
        texts: Sequence[Float[Tensor, "layer _ width"]], *, is_normalised: bool, directions: int
    ) -> "Compression":
        """The directions in which these states vary most, layer by layer.

        Args:
            texts: Residual streams of a sample of texts.
            is_normalised: Whether states are divided by their root mean square first.
            directions: How many are kept; at most the width.
        """
        # Layer by layer: all of them in one tensor would be there twice.
        layers = [[text[layer] for text in texts] for layer in range(len(texts[0]))]
        moments = Standardisation.measured(map(torch.cat, layers), is_normalised=is_normalised)
        directions_by_layer: list[Tensor] = []
        scales: list[Tensor] = []
        for layer, shards in enumerate(layers):
            x = moments.standardised(torch.cat(shards), layer)
            variances, vectors = torch.linalg.eigh(x.T @ x / len(x))
            directions_by_layer.append(vectors.flip(1)[:, :directions].half())
            # A direction that does not vary has no coordinate to round.
            scales.append(variances.flip(0)[:directions].clamp(min=1e-6).sqrt().sqrt())
        return Compression(moments, torch.stack(directions_by_layer), torch.stack(scales))

    @cached_property
    def digest(self) -> str:
        """A hash of everything that the stored values depend on."""
        digest = sha256(str(self.moments.is_normalised).encode())
        moments = self.moments
        for tensor in (moments.mean, moments.scale, self.scales, *self.directions):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    @property
    def token_bytes(self) -> int:
        """The stored size of a token's states of all layers."""
        layers, _, directions = self.directions.shape
        return layers * (directions + _FACTOR_BYTES)

    def compress(self, hidden: Float[Tensor, "layer token width"]) -> CompressedStates:
        """The stored form of states."""
        values: list[Tensor] = []
        factors: list[Tensor] = []
        moments, flags = self.moments, None
        if moments.is_normalised:
            flags = torch.ones(self.scales.shape[1], dtype=torch.bool)
        for layer, states in enumerate(hidden):
            # Standardisation is part of the product, which is faster than to standardise first.
            inverse = 1 / moments.scale[layer]
            weight = inverse[:, None] * self.directions[layer].float() / self.scales[layer]
            z = project(weight, -moments.mean[layer] @ weight, flags, states.float())
            # Rounded as it is stored; a smaller one would be 0.
            factor = (z.abs().amax(1) / _LARGEST).clamp(min=1e-4).half()
            rounded = (z / factor[:, None].float()).round_().clamp_(-_LARGEST, _LARGEST)
            values.append(rounded.to(torch.int8))
            factors.append(factor)
        return CompressedStates(torch.stack(values), torch.stack(factors))

    def fold(
        self,
        standardisation: Standardisation,
        projections: Float[Tensor, "layer width projection"],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Projection:
        """The projection of ``z`` that equals ``projections`` on standardised states.

        Of a probe that reads more layers than are stored, it has the stored ones.

        Args:
            standardisation: The probe's: the same moments, with a weight for each layer.
            projections: A projection of standardised states.
            dtype: Dtype of the products.
        """
        layers = len(self.scales)
        weights = self.moments.scale / standardisation.scale[:layers]
        weight = (
            self._coordinates(projections[:layers] * weights[..., None]) * self.scales[..., None]
        )
        shift = projections.new_zeros(layers, projections.shape[2])
        return Projection(weight.to(dtype), shift)

    def restricted(self, parameter: Float[Tensor, "layer width *rest"]) -> Tensor:
        """Project a parameter onto the kept directions, the only part that training sees."""
        stored = parameter[: len(self.scales)]
        coordinates = self._coordinates(stored.reshape(*stored.shape[:2], -1))
        layers = zip(self.directions, coordinates, strict=True)
        retained = torch.stack(
            [weight.float() @ directions for weight, directions in layers]
        ).view_as(stored)
        return torch.cat([retained, parameter[len(self.scales) :]])

    def lifted(
        self, z: Float[Tensor, "view text layer direction"]
    ) -> Float[Tensor, "pooling text layer width"]:
        """The standardised states whose coordinates these are."""
        layers = zip((z * self.scales).unbind(2), self.directions, strict=True)
        return torch.stack(
            [coordinates @ directions.float().T for coordinates, directions in layers], 2
        )

    def _coordinates(
        self, projections: Float[Tensor, "layer width projection"]
    ) -> Float[Tensor, "layer direction column"]:
        # Layer by layer: all directions in float32 would be twice as large.
        layers = zip(self.directions, projections, strict=True)
        return torch.stack([directions.float().T @ weight for directions, weight in layers])

    def to(self, device: torch.device) -> "Compression":
        """The same on a device."""
        return Compression(
            self.moments.to(device), self.directions.to(device), self.scales.to(device)
        )

    def save(self, path: Path) -> None:
        """Write a file that ``load`` reads.

        Raises:
            SidelightError: The disk is full, or cannot be written.
        """
        moments = self.moments
        flag = torch.tensor(moments.is_normalised)
        tensors = {"mean": moments.mean, "scale": moments.scale, "is_normalised": flag}
        write_tensors({**tensors, "directions": self.directions, "scales": self.scales}, path)

    @staticmethod
    def load(path: Path) -> "Compression":
        """What ``save`` wrote.

        Raises:
            SidelightError: The file is absent or broken.
        """
        saved = read_tensors(path)
        moments = Standardisation(saved["mean"], saved["scale"], bool(saved["is_normalised"]))
        return Compression(moments, saved["directions"], saved["scales"])
