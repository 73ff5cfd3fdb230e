"""Hidden states of texts on disk, one file per text, for training many probes.

States are uncompressed, compressed (``compression.py``), or recomputed whenever they are read.

A file is named by everything that determines its content, and is written atomically. An interrupted
extraction therefore resumes where it stopped, and several may share a folder.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from sidelight.errors import SidelightError
from sidelight.models.conversation import EncodedPrompt, Reads
from sidelight.models.fingerprint import Fingerprint
from sidelight.probes.card import StatesRecord
from sidelight.probes.standardisation import inverse_rms
from sidelight.states.compression import CompressedStates, Compression
from sidelight.states.files import read_tensors, write_tensors

FORMAT_VERSION = 3
SHARD_BYTES = 512 * 2**20
_BYTES_PER_VALUE = 2
# Disk space that is left free.
_RESERVE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Shard:
    """The states of some texts, concatenated.

    Attributes:
        hidden: Residual stream of each layer and read token, bf16 on disk; or the values of
            ``CompressedStates``.
        lengths: Number of tokens of each text.
        rows: Row of each text in the cache.
        factors: Factor of each token's states in each layer, if they are compressed.
    """

    hidden: Float[Tensor, "layer token width"] | Int8[Tensor, "layer token direction"]
    lengths: Int[Tensor, " text"]
    rows: Int[Tensor, " text"]
    factors: Float[Tensor, "layer token"] | None = None

    @staticmethod
    def joined(texts: Mapping[int, Float[Tensor, "layer _ width"]]) -> "Shard":
        """The states of each row, in this order."""
        lengths = torch.tensor([hidden.shape[1] for hidden in texts.values()])
        return Shard(torch.cat([*texts.values()], 1), lengths, torch.tensor([*texts]))

    @staticmethod
    def compressed(texts: Mapping[int, CompressedStates]) -> "Shard":
        """As ``joined``, for compressed states."""
        values = [text.values for text in texts.values()]
        factors = torch.cat([text.factors for text in texts.values()], 1).float()
        lengths = torch.tensor([text_values.shape[1] for text_values in values])
        return Shard(torch.cat(values, 1), lengths, torch.tensor([*texts]), factors)

    def to(self, device: torch.device) -> "Shard":
        """A copy with the states on a device."""
        factors = None if self.factors is None else self.factors.to(device)
        return replace(self, hidden=self.hidden.to(device), factors=factors)

    def limited(self, layers: int) -> "Shard":
        """Only the states of the first layers."""
        factors = None if self.factors is None else self.factors[:layers]
        return replace(self, hidden=self.hidden[:layers], factors=factors)

    def pooled(self, *, is_normalised: bool = False) -> Float[Tensor, "pooling text layer width"]:
        """Two poolings of each text: the mean of its tokens, and the last token; float32.

        Args:
            is_normalised: Whether uncompressed states are first divided by their root mean square.
                Compressed states already are, or never.
        """
        ends = self.lengths.cumsum(0) - 1
        layers: list[Tensor] = []
        # Layer by layer, because a long text in float32 would be large.
        for number, layer in enumerate(self.hidden):
            if self.factors is not None:
                factor = self.factors[number, :, None]
            else:
                factor = inverse_rms(layer) if is_normalised else torch.ones(len(layer), 1)
            sizes = self.lengths.tolist()
            texts = zip(layer.split(sizes), factor.split(sizes), strict=True)
            sums = [(text.float().mT @ weight)[:, 0] for text, weight in texts]
            means = torch.stack(sums) / self.lengths[:, None]
            lasts = layer[ends] * factor[ends]
            # Rounded like the states: what is kept of them is, too.
            lasts = lasts.to(layer.dtype).float() if self.factors is None else lasts
            layers.append(torch.stack([means, lasts]))
        return torch.stack(layers, 2)


@dataclass
class Memory:
    """A budget of memory for the states that are read first.

    Attributes:
        free: Remaining bytes.
        texts: Tensors by file.
    """

    free: int = 2 * SHARD_BYTES
    texts: dict[Path, dict[str, Tensor]] = field(default_factory=dict)


def token_bytes(fingerprint: Fingerprint) -> int:
    """Size in bytes of a token's hidden states of all layers."""
    return fingerprint.layers * fingerprint.width * _BYTES_PER_VALUE


class ActivationCache:
    """The hidden states of some texts under one backbone, computed by one engine.

    Attributes:
        prompts: The token ids of each text.
        directory: The folder of the texts' files, named by the backbone, its dtype and the engine.
        layers: Number of states stored per token, from the embedding up.
        lengths: Number of stored tokens of each text.
        shards: Rows of texts that are read together; each text is in one shard.
        token_bytes: Stored size of a token in bytes.
        compression: Compression of the states; None if uncompressed.
        is_streamed: Whether states are recomputed whenever they are read, and never written.

    Args:
        root: Parent folder. Caches in the same folder share the states of a text.
        prompts: The token ids of each text.
        reads: Which tokens are stored.
        fingerprint: The backbone.
        layers: Number of states to store per token, from the embedding up; None stores all.
        engine: Engine that computes the states. Engines round differently, so they share no cache.
        shard_bytes: Maximum size of a shard, unless a single text is larger.
        memory: Memory for states, possibly shared with other caches; None creates a new one.
    """

    def __init__(
        self,
        root: Path,
        prompts: Sequence[EncodedPrompt],
        *,
        reads: Reads,
        fingerprint: Fingerprint,
        layers: int | None = None,
        engine: str = "transformers",
        shard_bytes: int = SHARD_BYTES,
        memory: Memory | None = None,
    ):
        self.reads = reads
        self.fingerprint = fingerprint
        self.layers = fingerprint.layers if layers is None else layers
        self.engine = engine
        self._root = root
        self._stored_sizes = replace(fingerprint, layers=self.layers)
        self._shard_tokens = max(1, shard_bytes // token_bytes(self._stored_sizes))
        self._memory = memory or Memory()
        self._compute: Compute | None = None
        self._set_compression(None)
        lengths = [int(prompt.mask(reads).sum()) for prompt in prompts]
        self._set_texts(prompts, lengths, [text_name(prompt, reads) for prompt in prompts])

    def _set_compression(self, compression: Compression | None) -> None:
        who = self.fingerprint
        self.compression = compression
        self.token_bytes = (
            compression.token_bytes if compression else token_bytes(self._stored_sizes)
        )
        self._who = (FORMAT_VERSION, who.digest, who.dtype, self.engine)
        self._who += (self.layers,) if self.layers < who.layers else ()
        self._who += (compression.digest,) if compression else ()
        self.directory = self._root / _hash(self._who)

    def _set_texts(
        self, prompts: Sequence[EncodedPrompt], lengths: Sequence[int], names: Sequence[str]
    ) -> None:
        self.prompts, self.lengths, self._names = prompts, lengths, names
        self.shards = random_shards(lengths, tokens=self._shard_tokens)
        self._computed: dict[int, dict[str, Tensor]] = {}

    @property
    def key(self) -> str:
        """Identifies the backbone, its dtype, the engine, the tokens read, and their ids."""
        return _hash((self._who, self._names))

    def select(self, rows: Sequence[int]) -> "ActivationCache":
        """A cache of only these texts, which shares files and memory with this one."""
        subset = copy(self)
        subset._set_texts(
            [self.prompts[row] for row in rows],
            [self.lengths[row] for row in rows],
            [self._names[row] for row in rows],
        )
        return subset

    def joined(self, appended: "ActivationCache") -> "ActivationCache":
        """A cache of these texts, then those of another cache in the same folder."""
        assert self.directory == appended.directory, "the states differ"
        both = copy(self)
        both._set_texts(
            [*self.prompts, *appended.prompts],
            [*self.lengths, *appended.lengths],
            [*self._names, *appended._names],
        )
        return both

    def compressed(self, compression: Compression) -> "ActivationCache":
        """A cache of the same texts with this compression."""
        compressed_copy = copy(self)
        compressed_copy._set_compression(compression)
        return compressed_copy

    def in_memory(self, memory: Memory) -> "ActivationCache":
        """A cache of the same texts that keeps states in this memory."""
        in_memory = copy(self)
        in_memory._memory = memory
        return in_memory

    def streamed(self, compute: "Compute") -> "ActivationCache":
        """A cache of the same texts that writes no files and keeps one shard in memory.

        Args:
            compute: Function that computes the states of rows of a cache.
        """
        streaming = copy(self)
        streaming._compute, streaming._computed = compute, {}
        return streaming

    @property
    def record(self) -> StatesRecord:
        """How states are stored, for the training record."""
        form = "whole" if self.compression is None else "compressed"
        return StatesRecord(form=form, streamed=self.is_streamed, token_bytes=self.token_bytes)

    @property
    def is_streamed(self) -> bool:
        return self._compute is not None

    def missing(self) -> list[int]:
        """The texts that have not been written yet, in random order, without duplicates."""
        if self.is_streamed:
            return []
        rows = {self._names[row]: row for row in _random_order(len(self.lengths))}
        return [row for row in rows.values() if not self.path(row).exists()]

    def open(self) -> list[int]:
        """Create the folder, and check that there is enough space.

        Returns:
            The texts to write, as in ``missing``.

        Raises:
            SidelightError: The states would not fit on the disk.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        missing = self.missing()
        needed = sum(map(self.stored_bytes, missing))
        free = shutil.disk_usage(self.directory).free - _RESERVE_BYTES
        if needed > free:
            raise SidelightError(
                f"The hidden states need {needed / 2**30:.1f} GiB, but only "
                f"{max(free, 0) / 2**30:.1f} GiB may be used at {self.directory.parent}. Use "
                "another disk (SIDELIGHT_CACHE) or fewer rows, or recompute the states in each "
                "epoch (train --set states=stream)."
            )
        return missing

    def stored_bytes(self, row: int) -> int:
        """Bytes that ``write`` needs on disk for a text."""
        return self.token_bytes * self.lengths[row]

    def write(self, texts: Mapping[int, Float[Tensor, "layer _ width"]]) -> None:
        """Store the states of each row."""
        for row, tensors in self._stored(texts).items():
            write_tensors(tensors, self.path(row))

    def _stored(
        self, texts: Mapping[int, Float[Tensor, "layer _ width"]]
    ) -> dict[int, dict[str, Tensor]]:
        """The stored form of each row; an engine may compute more layers."""
        texts = {row: hidden[: self.layers] for row, hidden in texts.items()}
        if self.compression is None or not texts:
            return {row: {"hidden": hidden} for row, hidden in texts.items()}
        # Together, because the directions of a layer have a cost per call.
        joined = vars(self.compression.compress(torch.cat([*texts.values()], 1)))
        lengths = [hidden.shape[1] for hidden in texts.values()]
        split = {name: tensor.split(lengths, 1) for name, tensor in joined.items()}
        return {
            row: {name: tensors[number] for name, tensors in split.items()}
            for number, row in enumerate(texts)
        }

    def text(self, row: int) -> Float[Tensor, "layer token width"]:
        """The states of a text, stored uncompressed."""
        return self._tensors(row)["hidden"]

    def _tensors(self, row: int) -> dict[str, Tensor]:
        """The stored tensors of a text, kept in memory while there is room, else memory-mapped on
        each call.

        Raises:
            SidelightError: The file is missing or corrupt.
        """
        if self._compute is not None:
            return self._computed_tensors(row, self._compute)
        path, memory = self.path(row), self._memory
        if path in memory.texts:
            return memory.texts[path]
        tensors = read_tensors(path)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size <= memory.free:
            memory.free -= size
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            memory.texts[path] = tensors
        return tensors

    def _computed_tensors(self, row: int, compute: "Compute") -> dict[str, Tensor]:
        if row not in self._computed:
            shard = next(shard for shard in self.shards if row in shard)
            # Drop the previous shard first, so that only one is in memory.
            self._computed = {}
            for texts in compute(self, shard):
                self._computed |= self._stored(texts)
        return self._computed[row]

    def read(
        self, texts: Sequence[int], segments: Mapping[int, Int[np.ndarray, " _"]] | None = None
    ) -> Shard:
        """Read the states of these texts, concatenated.

        Args:
            texts: Rows of the texts, in order.
            segments: For some texts, the stored tokens to read instead of all.
        """
        segments = segments or {}
        read = {row: self._tensors(row) for row in texts}
        for row, segment in segments.items():
            read[row] = {name: tensor[:, segment] for name, tensor in read[row].items()}
        if self.compression is None:
            return Shard.joined({row: tensors["hidden"] for row, tensors in read.items()})
        return Shard.compressed({row: CompressedStates(**tensors) for row, tensors in read.items()})

    def path(self, row: int) -> Path:
        """The file of a text."""
        return self.directory / f"{self._names[row]}.safetensors"


Compute = Callable[
    [ActivationCache, Sequence[int]], Iterable[Mapping[int, Float[Tensor, "layer _ width"]]]
]
"""Yields the states of rows of a cache in batches."""


def random_shards(lengths: Sequence[int], *, tokens: int) -> list[list[int]]:
    """Texts in a random but fixed order, divided into shards of at most ``tokens``."""
    shards: list[list[int]] = []
    filled = 0
    for row in _random_order(len(lengths)):
        if not shards or filled + lengths[row] > tokens:
            shards.append([])
            filled = 0
        shards[-1].append(row)
        filled += lengths[row]
    return shards


def _random_order(texts: int) -> list[int]:
    return torch.randperm(texts, generator=torch.Generator().manual_seed(0)).tolist()


def random_batches(
    texts: Sequence[int], *, size: int, shuffle: torch.Generator
) -> Iterator[Sequence[int]]:
    """Batches of adjacent texts of a shard, in random order and with a random offset.

    A shard's texts are in random order, so adjacent texts form a random batch. Fewer texts than
    ``size`` form one batch; otherwise the first and last batches may be smaller.
    """
    count = len(texts)
    first = int(torch.randint(1, size + 1, (), generator=shuffle)) if count >= size else count
    cuts = [*pairwise([0, *range(first, count, size), count])]
    for cut in torch.randperm(len(cuts), generator=shuffle).tolist():
        start, stop = cuts[cut]
        yield texts[start:stop]


def text_name(prompt: EncodedPrompt, reads: Reads) -> str:
    """A name for the tokens of a prompt and which of them are read."""
    # ``each_turn`` and ``conversation`` store the same tokens, so they share a name.
    is_last = reads.scope == "last_turn"
    who = (prompt.token_ids, prompt.token_roles, reads.side, reads.template, is_last)
    return _hash(who)


def _hash(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:24]
