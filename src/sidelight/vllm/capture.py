"""Captures whole hidden states from vLLM's forward passes, for training.

Beside the scheduler, ``Captures`` says which tokens of a step are kept and where they go. In a
worker, ``Recorder`` keeps the residual streams of the step and copies those tokens to a ``Spool``:
a file as large as a shard, which the caller makes and every worker maps. So several pipeline
stages, or a second run after a preemption, write to it without a protocol; counters in the file say
how far each text has come at each layer. Tokens that vLLM takes from its prefix cache have no
residual stream in any step, so that cache is off.
"""

import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sidelight.errors import SidelightError
from sidelight.prompts import EncodedPrompt, Reads
from sidelight.vllm.columns import Step, slots_of
from sidelight.vllm.patches import pass_slots, require_slots
from sidelight.vllm.settings import KEY
from sidelight.vllm.taps import Installed

_COUNTER_BYTES = 4
# The states begin at a multiple of this, so that they can be of any dtype.
_ALIGNMENT = 64


@dataclass(frozen=True)
class SpoolShape:
    """What fits into a spool.

    Attributes:
        layers: Hidden states of a token, including the embedding's.
        tokens: Tokens that are kept.
        width: Size of a hidden state.
        texts: Texts that the tokens belong to.
        dtype: That of the kept states.
    """

    layers: int
    tokens: int
    width: int
    texts: int
    dtype: str = "bfloat16"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def counters_bytes(self) -> int:
        """Size of the counters and the gap behind them."""
        size = self.layers * self.texts * _COUNTER_BYTES
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    @property
    def size_bytes(self) -> int:
        states = self.layers * self.tokens * self.width * self.torch_dtype.itemsize
        return self.counters_bytes + states


class Spool:
    """A mapped file. ``create`` makes one, and ``find`` maps it in another process.

    Attributes:
        passed: How many tokens of each text, kept or not, have been through each layer.
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
        """Makes an empty spool; ``ActivationCache.prepare`` clears away what a kill leaves behind.

        Raises:
            SidelightError: The disk is full.
        """
        # A new name, since a worker may still map an earlier spool.
        path = folder / f"spool-{secrets.token_hex(8)}.partial"
        with path.open("wb") as file:
            try:
                # A mapped write to a full disk would kill the worker; this fails first.
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
        """The spool that another process has made; None if there is none of this shape."""
        try:
            size_bytes = path.stat().st_size
        except FileNotFoundError:
            return None
        return Spool(path, shape) if size_bytes == shape.size_bytes else None

    def is_whole(self, lengths: Int[Tensor, " text"]) -> bool:
        """Whether all tokens of each text have been through every layer."""
        return bool((self.passed == lengths).all())

    def remove(self) -> None:
        """Deletes the file; whoever has mapped it can still read it."""
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class SpoolPlace:
    """Where in the spool at ``path`` the states of a request go.

    Attributes:
        text: The index of its counter.
        row: Where the first token that is kept goes.
    """

    path: str
    shape: SpoolShape
    text: int
    row: int


def capture_params(prompt: EncodedPrompt, reads: Reads, place: SpoolPlace) -> dict[str, Any]:
    """The ``kv_transfer_params`` of a request whose tokens that ``reads`` reads are kept."""
    edges = np.flatnonzero(np.diff(prompt.mask(reads).numpy().astype(np.int8), prepend=0, append=0))
    return {KEY: {"place": asdict(place), "kept": edges.reshape(-1, 2).tolist()}}


@dataclass(frozen=True)
class Piece:
    """The part of a request that one forward pass runs.

    Attributes:
        row: Where the piece's first token goes.
        slots: KV slots of its tokens that are kept.
        passed: How many tokens of the request, kept or not, have been run after this pass.
    """

    place: SpoolPlace
    row: int
    slots: tuple[int, ...]
    passed: int


@dataclass
class _Tracked:
    place: SpoolPlace
    kept: Int[np.ndarray, " kept"]
    tokens: int
    passed: int = 0


class Captures:
    """The scheduler's side: follows every request from its arrival to its end."""

    def __init__(self, *, block_size: int):
        self._block_size = block_size
        self._requests: dict[str, _Tracked] = {}

    def enter(self, request_id: str, params: Mapping[str, Any] | None, tokens: int) -> None:
        """Notes a new request. One that names no place is run, but not kept."""
        given = (params or {}).get(KEY)
        if given is None:
            return
        kept = np.fromiter(chain.from_iterable(range(*run) for run in given["kept"]), np.int64)
        where = given["place"]
        place = SpoolPlace(where["path"], SpoolShape(**where["shape"]), where["text"], where["row"])
        self._requests[request_id] = _Tracked(place, kept, tokens)

    def leave(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    def plan(self, steps: Iterable[Step]) -> list[Piece]:
        """What to keep from a pass with these steps."""
        pieces = (self._piece(step) for step in steps)
        return [piece for piece in pieces if piece is not None]

    def _piece(self, step: Step) -> Piece | None:
        tracked = self._requests.get(step.request_id)
        if tracked is None:
            return None
        # A preempted request is run again from its first token.
        start = 0 if step.is_resumed else tracked.passed
        stop = tracked.passed = min(step.computed, tracked.tokens)
        if start >= stop:
            return None
        first, last = np.searchsorted(tracked.kept, [start, stop])
        tokens = tracked.kept[first:last]
        slots = slots_of(step.blocks, tokens, self._block_size)
        row = tracked.place.row + int(first)
        return Piece(tracked.place, row, tuple(slots.tolist()), passed=stop)


class Recorder:
    """A worker's side: keeps the residual streams of a forward pass.

    Both buffers are allocated once and written in place, as in ``columns``.

    Args:
        layers: The hidden states that this worker computes, from 0 (embedding) to L.
        tokens: Length of the longest forward pass.
        width: Size of a hidden state.
        dtype: That of the states.
        device: Where they are.

    Attributes:
        attention: The attention layer that has a slot for every token; "" until vLLM has a cache.
    """

    def __init__(
        self, layers: range, *, tokens: int, width: int, dtype: torch.dtype, device: torch.device
    ):
        self._layers = slice(layers.start, layers.stop)
        self._rows = torch.empty(len(layers), tokens, width, dtype=dtype, device=device)
        self._has_run = torch.zeros(len(layers), dtype=torch.bool, device=device)
        self._slots = torch.full((tokens,), -1, dtype=torch.int64, device=device)
        self.attention = ""

    def receive(
        self,
        layer: int,
        hidden: Float[Tensor, "token width"],
        residual: Float[Tensor, "token width"] | None = None,
    ) -> None:
        """Keeps the stream of one layer until the pass ends."""
        rows = self._rows[layer, : len(hidden)]
        if residual is None:
            rows.copy_(hidden)
        else:
            torch.add(hidden, residual, out=rows)
        self._has_run[layer].fill_(True)

    def end_pass(self, tokens: int) -> None:
        slots = pass_slots(self.attention) if self.attention else None
        if slots is not None:
            require_slots(slots, tokens)
            self.keep(slots)

    def keep(self, slots: Int[Tensor, " token"]) -> None:
        """Notes the KV slots of the tokens of a forward pass; -1 is padding."""
        self._slots[: len(slots)].copy_(slots)
        self._slots[len(slots) :].fill_(-1)

    def save(self, pieces: Sequence[Piece]) -> None:
        """Copies these pieces of the last forward pass to their spools.

        Raises:
            SidelightError: The pass ran other tokens than were planned.
        """
        in_order, order = self._slots.cpu().sort()
        # The counters of a layer that is not tapped stay behind, so the text is never whole.
        ran = self._has_run.cpu().int()
        for piece in pieces:
            spool = _mapped(piece.place.path, piece.place.shape)
            if spool is None:
                # The caller has given it up; one that has not will miss the counters.
                continue
            wanted = torch.tensor(piece.slots, dtype=torch.long)
            places = torch.searchsorted(in_order, wanted).clamp_max(len(in_order) - 1)
            if not torch.equal(in_order[places], wanted):
                raise SidelightError(
                    "vLLM ran other tokens than it had planned, so hidden states would be lost. "
                    "Turn prefix caching off, or extract with --engine transformers."
                )
            rows = self._rows[:, _as_slice(order[places])]
            stop = piece.row + len(piece.slots)
            spool.hidden[self._layers, piece.row : stop].copy_(rows)
            spool.passed[self._layers, piece.place.text] = piece.passed * ran
        self._has_run.fill_(False)
        self._slots.fill_(-1)


def _as_slice(rows: Int[Tensor, " kept"]) -> slice | Int[Tensor, " kept"]:
    """Rows that are neighbours, as a slice, so that they are copied only once."""
    first = int(rows[0]) if len(rows) else 0
    is_run = torch.equal(rows, torch.arange(first, first + len(rows)))
    return slice(first, first + len(rows)) if is_run else rows


# A step has texts of few shards; a spool that was let go is mapped again.
@lru_cache(maxsize=4)
def _mapped(path: str, shape: SpoolShape) -> Spool | None:
    return Spool.find(Path(path), shape)


INSTALLED = Installed[Recorder](loss="no hidden state would be kept")
