"""Hidden states of texts on disk, a file a text, that many probes train from.

A text's file appears under its name only when it is whole, and a finished file is never written
again, so an extraction that was killed continues where it stopped.
"""

import fcntl
import hashlib
import os
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sidelight.errors import SidelightError
from sidelight.fingerprint import Fingerprint
from sidelight.prompts import EncodedPrompt, Reads
from sidelight.ragged import weighted_sums
from sidelight.standardisation import inverse_rms
from sidelight.storage import replacing

FORMAT_VERSION = 2
SHARD_BYTES = 512 * 2**20
_BYTES_PER_VALUE = 2
# Left free on the disk whatever the budget says.
_RESERVE_BYTES = 2 * 2**30
# A file of this name says that a run was told to keep the hidden states.
_KEPT = "kept"
# Locked by each process that reads the folder.
_READERS = "readers"
# What may be held in memory: two shards, some texts of a cache, or pooled states.
MEMORY_BYTES = 2 * SHARD_BYTES


@dataclass(frozen=True)
class Shard:
    """The states of some texts, laid end to end.

    Attributes:
        hidden: Residual stream of each layer and read token; bf16 on disk.
        lengths: Tokens of each text.
        rows: Which text of the data set each is.
    """

    hidden: Float[Tensor, "layer token width"]
    lengths: Int[Tensor, " text"]
    rows: Int[Tensor, " text"]

    @staticmethod
    def joined(texts: Mapping[int, Float[Tensor, "layer _ width"]]) -> "Shard":
        """The states of each row, in their order."""
        lengths = torch.tensor([hidden.shape[1] for hidden in texts.values()])
        return Shard(torch.cat([*texts.values()], 1), lengths, torch.tensor([*texts]))

    def texts(self) -> Iterable[tuple[int, Float[Tensor, "layer token width"]]]:
        """Each text's row and hidden states, as views."""
        return zip(self.rows.tolist(), self.hidden.split(self.lengths.tolist(), 1), strict=True)

    def parts(self, cuts: Sequence[int]) -> Iterator["Shard"]:
        """The texts between each two cuts, as views."""
        ends = torch.cat([torch.zeros(1, dtype=torch.long), self.lengths.cumsum(0)]).tolist()
        for start, stop in pairwise(cuts):
            hidden = self.hidden[:, ends[start] : ends[stop]]
            yield Shard(hidden, self.lengths[start:stop], self.rows[start:stop])

    def chosen(self, texts: Int[Tensor, " chosen"]) -> "Shard":
        """These texts, by their place in this shard."""
        parts = self.hidden.split(self.lengths.tolist(), 1)
        hidden = torch.cat([parts[text] for text in texts.tolist()], 1)
        return Shard(hidden, self.lengths[texts], self.rows[texts])

    def pooled(self, *, is_normalised: bool = False) -> "Pooled":
        """Two vectors for each text, in the order of the texts; float32.

        Args:
            is_normalised: Whether the states are divided by their root mean square first.
        """
        ends = self.lengths.cumsum(0) - 1
        means: list[Tensor] = []
        lasts: list[Tensor] = []
        # Layer by layer: a long text in float32 would be large.
        for layer in self.hidden:
            factor = inverse_rms(layer) if is_normalised else torch.ones(len(layer), 1)
            sums = weighted_sums(layer[None], factor[None], self.lengths)
            means.append(sums[:, 0, :, 0] / self.lengths[:, None])
            # Rounded like the states: what is kept of them is, too.
            lasts.append((layer[ends] * factor[ends]).to(layer.dtype).float())
        return Pooled(torch.stack(means, 1), torch.stack(lasts, 1))


@dataclass(frozen=True)
class Pooled:
    """Two vectors that stand for each text at each layer.

    Attributes:
        means: Over the tokens that a probe reads.
        lasts: Of the last of them.
    """

    means: Float[Tensor, "text layer width"]
    lasts: Float[Tensor, "text layer width"]

    def chosen(self, texts: Int[Tensor, " chosen"]) -> "Pooled":
        """Those of these texts."""
        return Pooled(self.means[texts], self.lasts[texts])


@dataclass(frozen=True)
class ShardPlan:
    """Which texts are computed and read together: fixed by the data.

    Attributes:
        rows: For each shard, the texts in it, in random order.
        tokens: For each shard, how many tokens are stored.
    """

    rows: tuple[tuple[int, ...], ...]
    tokens: tuple[int, ...]

    @staticmethod
    def of(lengths: Sequence[int], *, shard_tokens: int) -> "ShardPlan":
        """Texts in a random but fixed order, cut where a shard is full."""
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
        shards: list[list[int]] = [[]]
        tokens = [0]
        for row in order:
            if shards[-1] and tokens[-1] + lengths[row] > shard_tokens:
                shards.append([])
                tokens.append(0)
            shards[-1].append(row)
            tokens[-1] += lengths[row]
        return ShardPlan(tuple(map(tuple, shards)), tuple(tokens))


class StateFolder:
    """A folder with the states of each text in a file of its own."""

    def __init__(self, directory: Path):
        self.directory = directory

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def write(self, name: str, hidden: Float[Tensor, "layer token width"]) -> None:
        """Stores a text; it exists afterwards or, if killed, not at all."""
        write_tensors({"hidden": hidden.contiguous()}, self._path(name))

    def read(self, name: str) -> Float[Tensor, "layer token width"]:
        """A text's states, mapped from disk."""
        path = self._path(name)
        try:
            return load_file(path)["hidden"]
        except (OSError, SafetensorError) as error:
            raise SidelightError(
                f"Cannot read the hidden states in {path}: {error}. Delete {self.directory}, and "
                "run the same command again."
            ) from error

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"


class ActivationCache:
    """The hidden states of one data set under one backbone, computed by one engine.

    Attributes:
        directory: The folder of the texts' files.
        lengths: The stored tokens of each text.
        plan: Which texts are computed and read together.
        token_bytes: Size of a token.

    Args:
        root: Folder of all caches; this one gets a folder of its own in it, named by a key that
            covers the backbone, the engine, what is read, and every token id.
        prompts: The texts of the data set.
        reads: Which tokens are stored.
        fingerprint: The backbone.
        engine: What computes the states; engines round differently, so they share no cache.
        memory_bytes: The most that ``States`` holds in memory.
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
        memory_bytes: int = MEMORY_BYTES,
    ):
        self.prompts = prompts
        self.reads = reads
        self.fingerprint = fingerprint
        self.engine = engine
        self.memory_bytes = memory_bytes
        self.token_bytes = fingerprint.layers * fingerprint.width * _BYTES_PER_VALUE
        shard_tokens = max(1, shard_bytes // self.token_bytes)
        self.lengths = [int(prompt.mask(reads).sum()) for prompt in prompts]
        self.plan = ShardPlan.of(self.lengths, shard_tokens=shard_tokens)
        who = (FORMAT_VERSION, fingerprint.digest, fingerprint.dtype, engine, shard_bytes)
        names = [text_name(prompt, reads) for prompt in prompts]
        self.directory = root / hashlib.sha256(repr((who, names)).encode()).hexdigest()[:24]
        self._texts = StateFolder(self.directory)
        self._unlock: Callable[[], object] = lambda: None
        self._readers: int | None = None

    def __len__(self) -> int:
        """The number of shards."""
        return len(self.plan.rows)

    @property
    def bytes(self) -> int:
        """Size of all states."""
        return self.token_bytes * sum(self.lengths)

    def missing(self) -> list[int]:
        """Shards of which a text has not been written yet."""
        shards = enumerate(self.plan.rows)
        return [n for n, rows in shards if any(str(row) not in self._texts for row in rows)]

    def open(self, *, budget_bytes: int | None = None) -> list[int]:
        """Makes the folder, which other runs do not remove while this object exists.

        Args:
            budget_bytes: The most that this cache may take; None allows what the disk has.

        Returns:
            The shards to write.

        Raises:
            SidelightError: They would not fit.
        """
        if self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB):
            # What a killed run left half written.
            for partial in self.directory.glob("*.partial"):
                partial.unlink()
        self._lock(fcntl.LOCK_SH)
        missing = self.missing()
        to_write = self.token_bytes * sum(self.plan.tokens[index] for index in missing)
        free = shutil.disk_usage(self.directory).free - _RESERVE_BYTES
        limit = free if budget_bytes is None else min(free, budget_bytes)
        if to_write > free or (missing and self.bytes > limit):
            raise SidelightError(
                f"The hidden states need {self.bytes / 2**30:.1f} GiB, but only "
                f"{max(limit, 0) / 2**30:.1f} GiB may be used at {self.directory.parent}. "
                "Raise cache_budget=GIB, name another disk as cache=FOLDER, or use fewer rows "
                "(limit=N)."
            )
        return missing

    def write(self, shard: Shard) -> None:
        """Stores the texts of a shard."""
        for row, hidden in shard.texts():
            self._texts.write(str(row), hidden)

    def text(self, row: int) -> Float[Tensor, "layer token width"]:
        """A text's states, mapped from disk."""
        return self._texts.read(str(row))

    def read(self, index: int) -> Shard:
        """The texts of a shard."""
        return Shard.joined({row: self.text(row) for row in self.plan.rows[index]})

    def keep(self) -> None:
        """Keeps the cache from ``remove``, also from that of other runs."""
        (self.directory / _KEPT).touch()

    def remove(self) -> None:
        """Deletes the cache, unless a run was told to keep it.

        While another run reads it nothing happens: it is left to that run's ``remove``.
        """
        if not self.directory.exists() or (self.directory / _KEPT).exists():
            return
        if self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(self.directory, ignore_errors=True)
        self._unlock()
        self._readers = None

    def _lock(self, kind: int) -> bool:
        """Whether the folder is locked now, as long as this object exists."""
        if self._readers is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._readers = os.open(self.directory / _READERS, os.O_RDWR | os.O_CREAT, 0o666)
            self._unlock = weakref.finalize(self, os.close, self._readers)
        try:
            fcntl.flock(self._readers, kind)
        except BlockingIOError:
            return False
        except OSError:
            # A disk without locks.
            return True
        return True


class States:
    """The hidden states of some texts of a cache, as training reads them.

    They are held in memory if they are small enough, else read from disk in each epoch.

    Attributes:
        fingerprint: The backbone.
        reads: Which tokens of each text these are.
        plan: Which texts are read together; each text once.

    Args:
        cache: The cache that holds the texts.
        rows: Their rows in it; text i of these is the cache's ``rows[i]``.
    """

    def __init__(self, cache: ActivationCache, rows: Sequence[int]):
        self.fingerprint = cache.fingerprint
        self.reads = cache.reads
        self._cache = cache
        self._rows = rows
        lengths = [cache.lengths[row] for row in rows]
        is_small = cache.token_bytes * sum(lengths) <= cache.memory_bytes
        # All texts in another order are as many, but their labels are in that order.
        if list(rows) == list(range(len(cache.lengths))):
            self.plan = cache.plan
        elif is_small:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
            self.plan = ShardPlan((tuple(order),), (sum(lengths),))
        else:
            text_of = {row: text for text, row in enumerate(rows)}
            shards = [[text_of[row] for row in held if row in text_of] for held in cache.plan.rows]
            shards = [texts for texts in shards if texts]
            self.plan = ShardPlan(
                tuple(map(tuple, shards)),
                tuple(sum(lengths[text] for text in texts) for texts in shards),
            )
        self._held = [cache.text(row).clone() for row in rows] if is_small else None

    def __len__(self) -> int:
        """The number of shards."""
        return len(self.plan.rows)

    def read(self, index: int) -> Shard:
        """The texts of a shard."""
        return self._joined(self.plan.rows[index])

    def batches(self, index: int, *, size: int, shuffle: torch.Generator) -> Iterator[Shard]:
        """The texts of a shard as ``random_batches``."""
        rows = self.plan.rows[index]
        for start, stop in random_batches(len(rows), size=size, shuffle=shuffle):
            yield self._joined(rows[start:stop])

    def _joined(self, texts: Sequence[int]) -> Shard:
        if self._held is None:
            return Shard.joined({text: self._cache.text(self._rows[text]) for text in texts})
        return Shard.joined({text: self._held[text] for text in texts})


def random_batches(texts: int, *, size: int, shuffle: torch.Generator) -> Iterator[tuple[int, int]]:
    """The ends of batches of neighbouring texts, in random order and with a random first cut.

    Texts lie in random order, so neighbours are a random batch. Fewer texts than ``size`` are one
    batch; else the first and the last batch may have fewer texts.
    """
    first = int(torch.randint(1, size + 1, (), generator=shuffle)) if texts >= size else texts
    cuts = [*pairwise([0, *range(first, texts, size), texts])]
    for cut in torch.randperm(len(cuts), generator=shuffle).tolist():
        yield cuts[cut]


def text_name(prompt: EncodedPrompt, reads: Reads) -> str:
    """Stands for the tokens of a prompt and which of them are read."""
    # Each turn is judged by tokens that are read anyway.
    is_last = reads.scope == "last_turn"
    who = (prompt.token_ids, prompt.parts, reads.side, reads.template, is_last)
    return hashlib.sha256(repr(who).encode()).hexdigest()[:24]


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file that exists afterwards whole or, if killed, not at all.

    Raises:
        SidelightError: The disk is full, or cannot be written.
    """
    try:
        with replacing(path) as partial:
            save_file(dict(tensors), partial)
    except (OSError, SafetensorError) as error:
        raise SidelightError(
            f"Cannot write {path}: {error}. Free some space, or name another disk for the cache."
        ) from error
