"""Compression of hidden states to a quarter: each layer's principal directions, in eight bits.

Probes with separate parameters per layer can be trained on compressed states. Their parameters lie
in the stored directions, so trained probes read uncompressed hidden states like any other.
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

# Compressed states take this fraction (1 / SHARE) of the bytes of uncompressed bfloat16 states.
SHARE = 4
_FACTOR_BYTES = 2
_LARGEST = 127


def directions_of_width(width: int) -> int:
    """Number of directions per layer whose coordinates and factor fit within this share of the
    bytes.
    """
    return max(1, 2 * width // SHARE - _FACTOR_BYTES)


def compressed_token_bytes(who: Fingerprint) -> int:
    """Stored size in bytes of a token's compressed states of all layers."""
    return who.layers * (directions_of_width(who.width) + _FACTOR_BYTES)


def directions_bytes(who: Fingerprint) -> int:
    """Size in bytes of the directions of all layers of a model."""
    return who.layers * who.width * directions_of_width(who.width) * 2


@dataclass(frozen=True)
class CompressedStates:
    """The stored form of some tokens' states: ``values * factors[..., None]`` is ``z``.

    Attributes:
        values: Coordinates, rounded to integers; float16 where a benchmark leaves them unrounded.
        factors: Factor of a token's coordinates in each layer.
    """

    values: Int8[Tensor, "layer token direction"] | Float16[Tensor, "layer token direction"]
    factors: Float16[Tensor, "layer token"]


@dataclass(frozen=True)
class Compression:
    """z = (x R) / s of standardised states x, and x ~ (z s) R^T.

    R contains a layer's principal directions, and s the square roots of their standard deviations.
    All coordinates of a token share one rounding step; s balances its effect on strong and weak
    directions.

    Attributes:
        moments: Standardisation that is applied first.
        directions: R, orthonormal up to float16 rounding; float16 halves the memory.
        scales: s.
    """

    moments: Standardisation
    directions: Float16[Tensor, "layer width direction"]
    scales: Float[Tensor, "layer direction"]

    @staticmethod
    def measured(
        texts: Sequence[Float[Tensor, "layer _ width"]], *, is_normalised: bool, directions: int
    ) -> "Compression":
        """Find the directions in which these states vary most, layer by layer.

        Args:
            texts: Residual streams of a sample of texts.
            is_normalised: Whether states are divided by their root mean square first.
            directions: Number of directions to keep; at most the width.
        """
        # Layer by layer, because a single tensor would need a second copy.
        layers = [[text[layer] for text in texts] for layer in range(len(texts[0]))]
        moments = Standardisation.measured(map(torch.cat, layers), is_normalised=is_normalised)
        directions_by_layer: list[Tensor] = []
        scales: list[Tensor] = []
        for layer, shards in enumerate(layers):
            x = moments.standardised(torch.cat(shards), layer)
            variances, vectors = torch.linalg.eigh(x.T @ x / len(x))
            directions_by_layer.append(vectors.flip(1)[:, :directions].half())
            # A direction without variance has no coordinate to round.
            scales.append(variances.flip(0)[:directions].clamp(min=1e-6).sqrt().sqrt())
        return Compression(moments, torch.stack(directions_by_layer), torch.stack(scales))

    @cached_property
    def digest(self) -> str:
        """A hash of everything that determines the stored values."""
        digest = sha256(str(self.moments.is_normalised).encode())
        moments = self.moments
        for tensor in (moments.mean, moments.scale, self.scales, *self.directions):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    @property
    def token_bytes(self) -> int:
        """Stored size in bytes of a token's states of all layers."""
        layers, _, directions = self.directions.shape
        return layers * (directions + _FACTOR_BYTES)

    def compress(self, hidden: Float[Tensor, "layer token width"]) -> CompressedStates:
        """Compress states to their stored form."""
        values: list[Tensor] = []
        factors: list[Tensor] = []
        moments, flags = self.moments, None
        if moments.is_normalised:
            flags = torch.ones(self.scales.shape[1], dtype=torch.bool)
        for layer, states in enumerate(hidden):
            # Standardisation is folded into the product, which is faster than standardising first.
            inverse = 1 / moments.scale[layer]
            weight = inverse[:, None] * self.directions[layer].float() / self.scales[layer]
            z = project(weight, -moments.mean[layer] @ weight, flags, states.float())
            # Rounded as stored; a smaller one would become 0.
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

        For a probe that reads more layers than are stored, only the stored layers are included.

        Args:
            standardisation: The probe's standardisation: the same moments, with a weight for each
                layer.
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
        """Project a parameter onto the stored directions, the only part that training uses."""
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
        """The standardised states with these coordinates."""
        layers = zip((z * self.scales).unbind(2), self.directions, strict=True)
        return torch.stack(
            [coordinates @ directions.float().T for coordinates, directions in layers], 2
        )

    def _coordinates(
        self, projections: Float[Tensor, "layer width projection"]
    ) -> Float[Tensor, "layer direction column"]:
        # Layer by layer, because all directions in float32 would take twice the memory.
        layers = zip(self.directions, projections, strict=True)
        return torch.stack([directions.float().T @ weight for directions, weight in layers])

    def to(self, device: torch.device) -> "Compression":
        """A copy on a device."""
        return Compression(
            self.moments.to(device), self.directions.to(device), self.scales.to(device)
        )

    def save(self, path: Path) -> None:
        """Write a file that ``load`` reads.

        Raises:
            SidelightError: The disk is full or not writable.
        """
        moments = self.moments
        flag = torch.tensor(moments.is_normalised)
        tensors = {"mean": moments.mean, "scale": moments.scale, "is_normalised": flag}
        write_tensors({**tensors, "directions": self.directions, "scales": self.scales}, path)

    @staticmethod
    def load(path: Path) -> "Compression":
        """Read a file that ``save`` wrote.

        Raises:
            SidelightError: The file is missing or corrupt.
        """
        saved = read_tensors(path)
        moments = Standardisation(saved["mean"], saved["scale"], bool(saved["is_normalised"]))
        return Compression(moments, saved["directions"], saved["scales"])
