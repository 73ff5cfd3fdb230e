"""Hidden states of texts on disk, a file a text, that many probes train from.

A file's name says what decides its content, and it appears under that name only when it is whole.
So an extraction that was killed goes on where it stopped, and several may share a folder.
"""

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sidelight.errors import SidelightError
from sidelight.models.conversation import EncodedPrompt, Reads
from sidelight.models.fingerprint import Fingerprint
from sidelight.probes.standardisation import inverse_rms
from sidelight.storage import replacing

FORMAT_VERSION = 3
SHARD_BYTES = 512 * 2**20
_BYTES_PER_VALUE = 2
# Left free on the disk.
_RESERVE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Shard:
    """The states of some texts, laid end to end.

    Attributes:
        hidden: Residual stream of each layer and read token; bf16 on disk.
        lengths: Tokens of each text.
        rows: Which text of its cache each is.
    """

    hidden: Float[Tensor, "layer token width"]
    lengths: Int[Tensor, " text"]
    rows: Int[Tensor, " text"]

    @staticmethod
    def joined(texts: Mapping[int, Float[Tensor, "layer _ width"]]) -> "Shard":
        """The states of each row, in this order."""
        lengths = torch.tensor([hidden.shape[1] for hidden in texts.values()])
        return Shard(torch.cat([*texts.values()], 1), lengths, torch.tensor([*texts]))

    def pooled(self, *, is_normalised: bool = False) -> Float[Tensor, "view text layer width"]:
        """Two views of each text: the mean of its tokens, and the last of them; float32.

        Args:
            is_normalised: Whether the states are divided by their root mean square first.
        """
        ends = self.lengths.cumsum(0) - 1
        layers: list[Tensor] = []
        # Layer by layer: a long text in float32 would be large.
        for layer in self.hidden:
            factor = inverse_rms(layer) if is_normalised else torch.ones(len(layer), 1)
            sizes = self.lengths.tolist()
            texts = zip(layer.split(sizes), factor.split(sizes), strict=True)
            sums = [(text.float().mT @ weight)[:, 0] for text, weight in texts]
            means = torch.stack(sums) / self.lengths[:, None]
            # Rounded like the states: what is kept of them is, too.
            lasts = (layer[ends] * factor[ends]).to(layer.dtype).float()
            layers.append(torch.stack([means, lasts]))
        return torch.stack(layers, 2)


@dataclass
class Memory:
    """States that are held in memory: those that are read first.

    Attributes:
        free: Bytes that more of them may take.
        texts: The states of each file.
    """

    free: int = 2 * SHARD_BYTES
    texts: dict[Path, Float[Tensor, "layer _ width"]] = field(default_factory=dict)


def token_bytes(fingerprint: Fingerprint) -> int:
    """The size of a token's hidden states of all layers."""
    return fingerprint.layers * fingerprint.width * _BYTES_PER_VALUE


class ActivationCache:
    """The hidden states of some texts under one backbone, computed by one engine.

    Attributes:
        prompts: The token ids of each text.
        directory: The folder of the texts' files, named by the backbone, its dtype and the engine.
        lengths: The stored tokens of each text.
        shards: The texts that are read together; each text once.
        token_bytes: Size of a token.

    Args:
        root: Folder of such folders. Caches in the same one share the states of a text.
        prompts: The token ids of each text.
        reads: Which tokens are stored.
        fingerprint: The backbone.
        engine: What computes the states; engines round differently, so they share no cache.
        shard_bytes: The most that is read together, or else one text.
        memory: Holds states, maybe those of other caches too; None is one of its own.
    """

    def __init__(
        self,
        root: Path,
        prompts: Sequence[EncodedPrompt],
        *,
        reads: Reads,
        fingerprint: Fingerprint,
        engine: str = "transformers",
        shard_bytes: int = SHARD_BYTES,
        memory: Memory | None = None,
    ):
        self.reads = reads
        self.fingerprint = fingerprint
        self.engine = engine
        self.token_bytes = token_bytes(fingerprint)
        self._shard_tokens = max(1, shard_bytes // self.token_bytes)
        self._who = (FORMAT_VERSION, fingerprint.digest, fingerprint.dtype, engine)
        self.directory = root / _hash(self._who)
        self._memory = memory or Memory()
        lengths = [int(prompt.mask(reads).sum()) for prompt in prompts]
        self._set_texts(prompts, lengths, [text_name(prompt, reads) for prompt in prompts])

    def _set_texts(
        self, prompts: Sequence[EncodedPrompt], lengths: Sequence[int], names: Sequence[str]
    ) -> None:
        self.prompts, self.lengths, self._names = prompts, lengths, names
        self.shards = random_shards(lengths, tokens=self._shard_tokens)

    @property
    def key(self) -> str:
        """Covers the backbone and its dtype, the engine, what is read, and every token id."""
        return _hash((self._who, self._names))

    def select(self, rows: Sequence[int]) -> "ActivationCache":
        """A cache of these texts alone, which shares files and memory with this one."""
        part = copy(self)
        part._set_texts(
            [self.prompts[row] for row in rows],
            [self.lengths[row] for row in rows],
            [self._names[row] for row in rows],
        )
        return part

    def missing(self) -> list[int]:
        """The texts that have not been written yet, in random order; equal texts are one."""
        rows = {self._names[row]: row for row in _random_order(len(self.lengths))}
        return [row for row in rows.values() if not self.path(row).exists()]

    def open(self) -> list[int]:
        """Makes the folder, and checks that there is room.

        Returns:
            The texts to write, as ``missing`` gives them.

        Raises:
            SidelightError: They would not fit the disk.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        missing = self.missing()
        needed = sum(map(self.stored_bytes, missing))
        free = shutil.disk_usage(self.directory).free - _RESERVE_BYTES
        if needed > free:
            raise SidelightError(
                f"The hidden states need {needed / 2**30:.1f} GiB, but only "
                f"{max(free, 0) / 2**30:.1f} GiB may be used at {self.directory.parent}. "
                "Name another disk (SIDELIGHT_CACHE), or use fewer rows."
            )
        return missing

    def stored_bytes(self, row: int) -> int:
        """Bytes that ``write`` puts on disk for a text."""
        return self.token_bytes * self.lengths[row]

    def write(self, texts: Mapping[int, Float[Tensor, "layer _ width"]]) -> None:
        """Stores the states of each row."""
        for row, hidden in texts.items():
            write_tensors({"hidden": hidden.contiguous()}, self.path(row))

    def text(self, row: int) -> Float[Tensor, "layer token width"]:
        """A text's states: held in memory while there is room, else mapped from disk each time.

        Raises:
            SidelightError: The file is absent or broken.
        """
        path, memory = self.path(row), self._memory
        if path in memory.texts:
            return memory.texts[path]
        try:
            hidden = load_file(path)["hidden"]
        except (OSError, SafetensorError) as error:
            raise SidelightError(
                f"Cannot read the hidden states in {path}: {error}. Delete {path.parent}, and run "
                "the same command again."
            ) from error
        if hidden.nbytes <= memory.free:
            memory.free -= hidden.nbytes
            memory.texts[path] = hidden = hidden.clone()
        return hidden

    def read(
        self, texts: Sequence[int], units: Mapping[int, Int[np.ndarray, " _"]] | None = None
    ) -> Shard:
        """The states of these texts, laid end to end.

        Args:
            texts: Their rows, in this order.
            units: Of some of them, the stored tokens to read in place of all.
        """
        units = units or {}
        read = {row: self.text(row) for row in texts}
        read |= {row: read[row][:, unit] for row, unit in units.items()}
        return Shard.joined(read)

    def path(self, row: int) -> Path:
        """The file of a text."""
        return self.directory / f"{self._names[row]}.safetensors"


def random_shards(lengths: Sequence[int], *, tokens: int) -> list[list[int]]:
    """Texts in a random but fixed order, cut before a shard would have more than ``tokens``."""
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
    """Batches of neighbouring texts of a shard, in random order and with a random first cut.

    A shard's texts are in random order, so neighbours are a random batch. Fewer texts than ``size``
    are one batch; else the first and the last batch may have fewer texts.
    """
    count = len(texts)
    first = int(torch.randint(1, size + 1, (), generator=shuffle)) if count >= size else count
    cuts = [*pairwise([0, *range(first, count, size), count])]
    for cut in torch.randperm(len(cuts), generator=shuffle).tolist():
        start, stop = cuts[cut]
        yield texts[start:stop]


def text_name(prompt: EncodedPrompt, reads: Reads) -> str:
    """Stands for the tokens of a prompt and which of them are read."""
    # ``each_turn`` and ``conversation`` store the same tokens, so they share a name.
    is_last = reads.scope == "last_turn"
    who = (prompt.token_ids, prompt.parts, reads.side, reads.template, is_last)
    return _hash(who)


def _hash(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:24]


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file that exists afterwards whole or, if killed, not at all.

    Raises:
        SidelightError: The disk is full, or cannot be written.
    """
    try:
        with replacing(path, is_one_of_many=True) as partial:
            save_file(dict(tensors), partial)
    except (OSError, SafetensorError) as error:
        raise SidelightError(
            f"Cannot write {path}: {error}. Free some space, or name another disk "
            "(SIDELIGHT_CACHE)."
        ) from error
