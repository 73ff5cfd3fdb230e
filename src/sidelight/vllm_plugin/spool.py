"""A file into which workers copy hidden states, and from which the caller reads them.

The caller makes it as large as a shard; every worker maps it and copies each token's states to the
place that the request names. So a copy that is made twice, after a preemption, or by several
pipeline stages, needs no protocol. Counters in it say how far each text has come at each layer.
"""

import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sidelight.errors import SidelightError

_COUNTER_BYTES = 4
# The states begin at a multiple of it, so that they can be of any dtype.
_ALIGNMENT = 64


@dataclass(frozen=True)
class SpoolShape:
    """What fits into a spool.

    Attributes:
        layers: Hidden states of a token, the embedding's included.
        tokens: That are kept.
        width: Size of a hidden state.
        texts: That the tokens belong to.
        dtype: Of the kept states.
    """

    layers: int
    tokens: int
    width: int
    texts: int
    dtype: str = "bfloat16"

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch names it."""
        return getattr(torch, self.dtype)

    @property
    def counters_bytes(self) -> int:
        """Of the counters and the gap behind them."""
        size = self.layers * self.texts * _COUNTER_BYTES
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    @property
    def size_bytes(self) -> int:
        """Of the file."""
        states = self.layers * self.tokens * self.width * self.torch_dtype.itemsize
        return self.counters_bytes + states


class Spool:
    """A mapped file; ``create`` makes one, and ``find`` maps it elsewhere.

    Attributes:
        path: Of the file.
        shape: Of what it holds.
        passed: Tokens of each text, read or not, that have been through each layer.
        hidden: The states of the tokens that are kept.
    """

    def __init__(self, path: Path, shape: SpoolShape):
        self.path = path
        self.shape = shape
        data = torch.from_file(str(path), shared=True, size=shape.size_bytes, dtype=torch.uint8)
        counted = shape.layers * shape.texts
        counters = data[: counted * _COUNTER_BYTES].view(torch.int32)
        self.passed: Int[Tensor, "layer text"] = counters.view(shape.layers, shape.texts)
        states = data[shape.counters_bytes :].view(shape.torch_dtype)
        self.hidden: Float[Tensor, "layer token width"] = states.view(
            shape.layers, shape.tokens, shape.width
        )

    @staticmethod
    def create(folder: Path, shape: SpoolShape) -> "Spool":
        """An empty spool.

        Args:
            folder: Where it is; ``ActivationCache.prepare`` clears away what a kill leaves there.
            shape: What is to fit.

        Raises:
            SidelightError: The disk is full.
        """
        # A name of its own: a worker may still map an earlier spool.
        path = folder / f"spool-{secrets.token_hex(8)}.partial"
        with path.open("wb") as file:
            try:
                # A mapped write to a full disk would kill the worker; this fails here instead.
                os.posix_fallocate(file.fileno(), 0, shape.size_bytes)
            except OSError as error:
                path.unlink()
                raise SidelightError(
                    f"Cannot make room for {shape.size_bytes / 2**20:.0f} MiB of hidden states at "
                    f"{path.parent}: {error.strerror}. Name another disk with --cache."
                ) from error
        return Spool(path, shape)

    @staticmethod
    def find(path: Path, shape: SpoolShape) -> "Spool | None":
        """The spool that another process has made; None where there is none of this shape."""
        try:
            size_bytes = path.stat().st_size
        except FileNotFoundError:
            return None
        return Spool(path, shape) if size_bytes == shape.size_bytes else None

    def is_whole(self, lengths: Int[Tensor, " text"]) -> bool:
        """Whether each text, of so many tokens, has been through every layer."""
        return bool((self.passed == lengths).all())

    def remove(self) -> None:
        """Deletes the file; what is mapped stays readable until it is let go."""
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class SpoolPlace:
    """Where the states of a request go.

    Attributes:
        path: Of the spool.
        shape: Of the spool.
        text: Whose counter the request moves on.
        row: Where the first token that is kept goes.
    """

    path: str
    shape: SpoolShape
    text: int
    row: int

    def to_json(self) -> dict[str, Any]:
        """For a request's parameters."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "SpoolPlace":
        """The inverse of ``to_json``."""
        return SpoolPlace(data["path"], SpoolShape(**data["shape"]), data["text"], data["row"])
