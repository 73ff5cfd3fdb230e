"""Hidden states in a quarter of their bytes: each layer's principal directions, in eight bits.

Probes whose parameters belong to one layer each can train on them. What they learn lies in the
directions that are kept, so a trained probe reads whole hidden states, as any other.
"""

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import torch
from jaxtyping import Float, Float16, Int8
from torch import Tensor

from sidelight.models.fingerprint import Fingerprint
from sidelight.probes.standardisation import Projection, Standardisation
from sidelight.states.files import read_tensors, write_tensors

# Of the bytes that the whole states take, in bfloat16.
SHARE = 4
_FACTOR_BYTES = 2
_LARGEST = 127


def kept_directions(width: int) -> int:
    """The directions of a layer whose coordinates and factor take a share of its states' bytes."""
    return max(1, 2 * width // SHARE - _FACTOR_BYTES)


def compressed_token_bytes(who: Fingerprint) -> int:
    """The stored size of a token's compressed states of all layers."""
    return who.layers * (kept_directions(who.width) + _FACTOR_BYTES)


@dataclass(frozen=True)
class CompressedStates:
    """The stored form of some tokens' states: ``values * factors[..., None]`` is ``z``.

    Attributes:
        values: Coordinates, rounded.
        factors: What the coordinates of a token in a layer are multiplied by.
    """

    values: Int8[Tensor, "layer token direction"]
    factors: Float16[Tensor, "layer token"]


@dataclass(frozen=True)
class Compression:
    """z = x R S^(-1/2) of standardised states x, and x ~ z S^(1/2) R^T.

    R holds a layer's principal directions and S their standard deviations. All coordinates of a
    token share one rounding step; S^(1/2) balances its effect on strong and weak directions.

    Attributes:
        moments: How states are standardised before.
        encoder: R S^(-1/2).
        decoder: R S^(1/2).
    """

    moments: Standardisation
    encoder: Float[Tensor, "layer width direction"]
    decoder: Float[Tensor, "layer width direction"]

    @staticmethod
    def measured(
        hidden: Float[Tensor, "layer token width"], *, is_normalised: bool, directions: int
    ) -> "Compression":
        """The directions in which these states vary most, layer by layer.

        Args:
            hidden: Residual streams of a sample of tokens.
            is_normalised: Whether states are divided by their root mean square first.
            directions: How many are kept; at most the width.
        """
        moments = Standardisation.measured(hidden, is_normalised=is_normalised)
        encoders: list[Tensor] = []
        decoders: list[Tensor] = []
        for layer, states in enumerate(hidden):
            x = moments.standardised(states, layer)
            variances, vectors = torch.linalg.eigh(x.T @ x / len(x))
            kept = vectors.flip(1)[:, :directions]
            # A direction that does not vary has no coordinate to round.
            scale = variances.flip(0)[:directions].clamp(min=1e-6).sqrt().sqrt()
            encoders.append(kept / scale)
            decoders.append(kept * scale)
        return Compression(moments, torch.stack(encoders), torch.stack(decoders))

    @cached_property
    def digest(self) -> str:
        """Identifies it, since what is stored depends on it."""
        return sha256(self.encoder.numpy().tobytes()).hexdigest()

    @property
    def token_bytes(self) -> int:
        """The stored size of a token's states of all layers."""
        layers, _, directions = self.encoder.shape
        return layers * (directions + _FACTOR_BYTES)

    def compress(self, hidden: Float[Tensor, "layer token width"]) -> CompressedStates:
        """The stored form of states."""
        values: list[Tensor] = []
        factors: list[Tensor] = []
        for layer, states in enumerate(hidden):
            z = self.moments.standardised(states, layer) @ self.encoder[layer]
            # Rounded as it is stored; a smaller one would be 0.
            factor = (z.abs().amax(1) / _LARGEST).clamp(min=1e-4).half()
            rounded = (z / factor[:, None].float()).round_().clamp_(-_LARGEST, _LARGEST)
            values.append(rounded.to(torch.int8))
            factors.append(factor)
        return CompressedStates(torch.stack(values), torch.stack(factors))

    def fold(
        self,
        standardisation: Standardisation,
        columns: Float[Tensor, "layer width column"],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Projection:
        """The projection of ``z`` that equals ``columns`` on standardised states.

        Args:
            standardisation: That of the probe: the same moments, with weights of layers.
            columns: A projection of standardised states.
            dtype: Dtype of the products.
        """
        weights = self.moments.scale / standardisation.scale
        weight = self.decoder.mT @ (columns * weights[..., None])
        shift = columns.new_zeros(columns.shape[0], columns.shape[2])
        return Projection(weight.to(dtype), shift)

    def kept(self, parameter: Float[Tensor, "layer width *rest"]) -> Tensor:
        """Project a parameter onto the kept directions, the only part that training sees."""
        flat = parameter.flatten(2)
        return (self.encoder @ (self.decoder.mT @ flat)).view_as(parameter)

    def lifted(
        self, z: Float[Tensor, "*view layer direction"]
    ) -> Float[Tensor, "*view layer width"]:
        """The standardised states whose coordinates these are."""
        return torch.einsum("...lr,lwr->...lw", z, self.decoder)

    def to(self, device: torch.device) -> "Compression":
        """The same on a device."""
        return Compression(
            self.moments.to(device), self.encoder.to(device), self.decoder.to(device)
        )

    def save(self, path: Path) -> None:
        """Write a file that ``load`` reads.

        Raises:
            SidelightError: The disk is full, or cannot be written.
        """
        moments = self.moments
        flag = torch.tensor(moments.is_normalised)
        tensors = {"mean": moments.mean, "scale": moments.scale, "is_normalised": flag}
        write_tensors({**tensors, "encoder": self.encoder, "decoder": self.decoder}, path)

    @staticmethod
    def load(path: Path) -> "Compression":
        """What ``save`` wrote.

        Raises:
            SidelightError: The file is absent or broken.
        """
        saved = read_tensors(path)
        moments = Standardisation(saved["mean"], saved["scale"], bool(saved["is_normalised"]))
        return Compression(moments, saved["encoder"], saved["decoder"])
