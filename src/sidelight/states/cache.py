"""Hidden states of a data set on disk, in shards that many probes train from.

``ActivationCache`` writes and reads the shards; ``states_of`` gives all or some of its texts, from
memory if they are small enough.

A shard holds the states of some texts, ragged and in bf16: hundreds of texts of a small backbone, a
handful of a wide one. Its file appears under its name only when it is whole, so an extraction that
was killed continues where it stopped.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from time import sleep

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
from sidelight.storage import FolderLock, sync, write_json

FORMAT_VERSION = 1
SHARD_BYTES = 512 * 2**20
_BYTES_PER_VALUE = 2
# Left free on the disk whatever the budget says.
_RESERVE_BYTES = 2 * 2**30
# A file of this name says that a run was told to keep the hidden states.
_KEPT = "kept"
# What may be held in memory: two shards, some texts of a cache, or pooled states.
MEMORY_BYTES = 2 * SHARD_BYTES
# Between two looks at a cache that another run writes.
_WAIT_S = 0.5


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

    def batches(self, *, size: int, shuffle: torch.Generator) -> Iterator["Shard"]:
        """Neighbouring texts, in random order and with a random first cut.

        Texts lie in random order, so neighbours are a random batch, without a copy. A shard with
        fewer texts than ``size`` is one batch; the first and the last batch of a larger one may
        have fewer texts.
        """
        texts = len(self.rows)
        first = int(torch.randint(1, size + 1, (), generator=shuffle)) if texts >= size else texts
        parts = list(self.parts([0, *range(first, texts, size), texts]))
        for index in torch.randperm(len(parts), generator=shuffle).tolist():
            yield parts[index]

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
    """Which texts go to which shard: fixed by the data, so that extraction can resume.

    Attributes:
        rows: For each shard, the texts in it.
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


@dataclass(frozen=True)
class States:
    """Hidden states of some texts, shard by shard: what training reads.

    Attributes:
        fingerprint: The backbone.
        reads: Which tokens of each text these are.
        plan: Which texts are in which shard; together each text once.
        read: Gives a shard by its number; its texts lie in random order.
    """

    fingerprint: Fingerprint
    reads: Reads
    plan: ShardPlan
    read: Callable[[int], Shard]

    def __len__(self) -> int:
        """The number of shards."""
        return len(self.plan.rows)


class ActivationCache:
    """The shards of one data set under one backbone, computed by one engine.

    Attributes:
        lengths: The stored tokens of each text.
        plan: Which texts are in which shard.
        token_bytes: Size of a token.

    Args:
        root: Folder of all caches; this one gets a folder of its own in it, named by a key that
            covers the backbone, the engine, what is read, and every token id.
        prompts: The texts of the data set.
        reads: Which tokens are stored.
        fingerprint: The backbone.
        engine: What computes the states; engines round differently, so they share no cache.
        memory_bytes: The most that ``states_of`` holds in memory.
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
        self.directory = root / _key(prompts, reads, who)
        self._lock: FolderLock | None = None

    def __len__(self) -> int:
        """The number of shards."""
        return len(self.plan.rows)

    def missing(self) -> list[int]:
        """Shards that have not been written yet."""
        return [index for index in range(len(self)) if not self._path(index).exists()]

    @contextmanager
    def filling(self, *, budget_bytes: int | None = None) -> Generator[list[int]]:
        """Gives the shards to write, while no other run reads or writes them.

        Waits for a run that fills the same cache. Afterwards other runs may read it, and it is
        not removed while this object exists. What a killed run left half written is cleared.

        Args:
            budget_bytes: The most that this cache may take; None allows what the disk has.

        Raises:
            SidelightError: The missing shards would not fit.
        """
        lock = self._locked()
        try:
            missing = self.missing()
            if missing:
                self._prepare(missing, budget_bytes)
            yield missing
            lock.take(alone=False)
        except BaseException:
            # A traceback may keep this object, and another try must not wait for it.
            lock.release()
            raise
        self._lock = lock

    def _locked(self) -> FolderLock:
        """The folder's lock: owned if there is something to write, else shared."""
        self._unlock()
        has_said = False
        while True:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(self.directory)
            alone = bool(self.missing())
            is_free = lock.take(alone=alone)
            if is_free and lock.is_current and (alone or not self.missing()):
                return lock
            lock.release()
            if not is_free and not has_said:
                has_said = True
                print(
                    "Another run is writing the hidden states of the same texts: waiting for it. "
                    "Name another folder with --cache to go on without.",
                    file=sys.stderr,
                )
            # Not a wait for the lock: what is asked for depends on what is missing by then.
            sleep(_WAIT_S)

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _prepare(self, missing: Sequence[int], budget_bytes: int | None) -> None:
        for partial in self.directory.glob("*.partial"):
            partial.unlink()
        needed = self.token_bytes * sum(self.plan.tokens)
        to_write = self.token_bytes * sum(self.plan.tokens[index] for index in missing)
        free = shutil.disk_usage(self.directory).free - _RESERVE_BYTES
        if to_write > free or (budget_bytes is not None and needed > budget_bytes):
            limit = free if budget_bytes is None else min(free, budget_bytes)
            raise SidelightError(
                f"The hidden states need {needed / 2**30:.1f} GiB, but only "
                f"{max(limit, 0) / 2**30:.1f} GiB may be used at {self.directory.parent}. "
                "Raise --cache-budget, name another disk with --cache, or use fewer rows (--limit)."
            )
        self._write_manifest()

    def write(self, index: int, shard: Shard) -> None:
        """Stores a shard; it exists afterwards or, if killed, not at all."""
        tensors = {"hidden": shard.hidden, "lengths": shard.lengths, "rows": shard.rows}
        write_tensors(tensors, self._path(index))

    def read(self, index: int) -> Shard:
        """A shard, mapped from disk."""
        return Shard(**load_file(self._path(index)))

    def keep(self) -> None:
        """Keeps the cache from ``remove``, also from that of other runs."""
        (self.directory / _KEPT).touch()

    def remove(self) -> None:
        """Deletes the cache, unless a run was told to keep it.

        While another run reads it nothing happens: it is left to that run's ``remove``.
        """
        self._unlock()
        if not self.directory.exists() or (self.directory / _KEPT).exists():
            return
        lock = FolderLock(self.directory)
        if lock.take(alone=True):
            shutil.rmtree(self.directory, ignore_errors=True)
        lock.release()

    def _path(self, index: int) -> Path:
        return self.directory / f"shard-{index:05d}.safetensors"

    def _write_manifest(self) -> None:
        manifest = {
            "format": FORMAT_VERSION,
            "backbone": asdict(self.fingerprint),
            "engine": self.engine,
            "reads": asdict(self.reads),
            "texts": len(self.prompts),
            "tokens": sum(self.plan.tokens),
            "shards": [list(rows) for rows in self.plan.rows],
        }
        write_json(self.directory / "manifest.json", manifest)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file that exists afterwards whole or, if killed, not at all.

    Raises:
        SidelightError: The disk is full, or cannot be written.
    """
    # Named by the process: two runs may write what they both read.
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file(dict(tensors), partial)
        sync(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise SidelightError(
            f"Cannot write {path}: {error}. Free some space, or name another disk with --cache."
        ) from error


def _key(prompts: Sequence[EncodedPrompt], reads: Reads, who: tuple[object, ...]) -> str:
    digest = hashlib.sha256(repr(who).encode())
    # The scope does not change which tokens are read.
    digest.update(f"Reads(side={reads.side!r}, template={reads.template!r})".encode())
    for prompt in prompts:
        digest.update(repr((prompt.token_ids, prompt.parts)).encode())
    return digest.hexdigest()[:24]


def states_of(cache: ActivationCache, rows: Sequence[int]) -> States:
    """The states of some texts: in memory as one shard, or picked from each shard that is read.

    More than the cache's ``memory_bytes`` is read from disk again in each epoch.

    Args:
        cache: The cache that holds the texts.
        rows: Their rows in it; text i of the result is the cache's ``rows[i]``.
    """
    # All texts in another order are as many, but their labels are in that order.
    if list(rows) == list(range(len(cache.lengths))):
        return States(cache.fingerprint, cache.reads, cache.plan, cache.read)
    text_of = {row: text for text, row in enumerate(rows)}
    wanted = [[row for row in held if row in text_of] for held in cache.plan.rows]
    shards = [index for index, held in enumerate(wanted) if held]

    def read(index: int) -> Shard:
        texts = cache.read(shards[index]).texts()
        return joined({text_of[row]: hidden for row, hidden in texts if row in text_of})

    if cache.token_bytes * sum(cache.lengths[row] for row in rows) > cache.memory_bytes:
        chosen = [wanted[index] for index in shards]
        plan = ShardPlan(
            tuple(tuple(text_of[row] for row in held) for held in chosen),
            tuple(sum(cache.lengths[row] for row in held) for held in chosen),
        )
        return States(cache.fingerprint, cache.reads, plan, read)
    found = dict(each for index in range(len(shards)) for each in read(index).texts())
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    whole = joined({text: found[text] for text in order})
    plan = ShardPlan((tuple(order),), (int(whole.lengths.sum()),))
    return States(cache.fingerprint, cache.reads, plan, lambda _: whole)


def joined(texts: Mapping[int, Float[Tensor, "layer _ width"]]) -> Shard:
    """A shard of the states of each row, in their order."""
    lengths = torch.tensor([hidden.shape[1] for hidden in texts.values()])
    return Shard(torch.cat([*texts.values()], 1), lengths, torch.tensor([*texts]))
