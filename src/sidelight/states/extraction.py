"""One forward pass over each of many texts: for their hidden states, or for logits alone."""

import shutil
import tempfile
import weakref
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sidelight.backbone import TransformersBackbone
from sidelight.bank import Bank
from sidelight.errors import SidelightError
from sidelight.probe import Probe
from sidelight.progress import Progress, progress
from sidelight.prompts import EncodedPrompt, Reads, shared_unread
from sidelight.ragged import Ragged, by_length
from sidelight.states.cache import ActivationCache, Shard, StateFolder, text_name

# More is not remembered by a ``SharedSource``.
_SHARED_BYTES = 16 * 2**30
_SCORED_TEXTS = 32


@runtime_checkable
class StateSource(Protocol):
    """An engine that computes the hidden states of a cache."""

    @property
    def engine(self) -> str:
        """Its name, with all that decides how states are computed and rounded."""
        ...

    @property
    def max_tokens(self) -> int:
        """The longest text that it runs."""
        ...

    def shards(
        self, cache: ActivationCache, indices: Sequence[int], shown: Progress
    ) -> Generator[tuple[int, Shard]]:
        """Computes these shards of a cache, and gives each with its index when it is whole.

        Args:
            cache: The cache, with its texts, their shards, and what is read of them.
            indices: The shards to compute.
            shown: The progress bar, which advances by each token that has been run.
        """
        ...


def extract(
    source: StateSource,
    cache: ActivationCache,
    *,
    budget_bytes: int | None = None,
    title: str = "Extracting",
) -> ActivationCache:
    """Writes the missing shards; after a kill, a second call writes only the rest.

    Args:
        source: The engine that computes the hidden states.
        cache: The cache to fill, made for the source's engine.
        budget_bytes: The most that the cache may take; None allows what the disk has.
        title: Of the progress bar.

    Raises:
        SidelightError: The shards would not fit the disk or the budget, a hidden state is not
            finite, or the cache is another engine's.
    """
    if cache.engine != source.engine:
        raise SidelightError(
            f"This cache is for states of '{cache.engine}', but '{source.engine}' would fill it; "
            "the two round differently. Make the cache with engine=source.engine."
        )
    if missing := cache.open(budget_bytes=budget_bytes):
        _fill(source, cache, missing, title)
    return cache


def _fill(source: StateSource, cache: ActivationCache, missing: Sequence[int], title: str) -> None:
    total = sum(len(cache.prompts[row]) for index in missing for row in cache.plan.rows[index])
    # Writing overlaps the next shard's forward passes; one at a time, so two shards are in memory.
    with (
        ThreadPoolExecutor(1) as writer,
        progress(title, total, unit="tokens") as shown,
        closing(source.shards(cache, missing, shown)) as shards,
    ):
        pending: Future[None] | None = None
        for _, shard in shards:
            require_finite(shard, dtype=cache.fingerprint.dtype)
            if pending is not None:
                pending.result()
            pending = writer.submit(cache.write, shard)
        if pending is not None:
            pending.result()


class BackboneSource:
    """Any backbone's own forward passes, over batches of texts of similar length."""

    engine = "transformers"

    def __init__(self, backbone: TransformersBackbone):
        self._backbone = backbone

    @property
    def max_tokens(self) -> int:
        """The longest text that the backbone reads."""
        return self._backbone.encoder.max_tokens

    def shards(
        self, cache: ActivationCache, indices: Sequence[int], shown: Progress
    ) -> Generator[tuple[int, Shard]]:
        """Runs one shard after the other; what all texts begin with runs once a batch.

        Batches are of texts of similar length, whose states go to the plan's random order.
        """
        can_share = self._backbone.can_share_prefixes
        shared = shared_unread(cache.prompts, cache.reads) if can_share else 0
        for index in indices:
            rows = cache.plan.rows[index]
            prompts = [cache.prompts[row] for row in rows]
            lengths = [cache.lengths[row] for row in rows]
            shape = (cache.fingerprint.layers, sum(lengths), cache.fingerprint.width)
            hidden = torch.empty(shape, dtype=torch.bfloat16)
            texts = hidden.split(lengths, 1)
            for batch in by_length([len(prompt) - shared for prompt in prompts]):
                targets = [(texts[i], prompts[i].mask(cache.reads)[shared:]) for i in batch]
                with self._backbone.tapped(partial(_keep_read, targets)):
                    self._backbone.run([prompts[i] for i in batch], after=shared)
                shown.advance(sum(len(prompts[i]) for i in batch))
            yield index, Shard(hidden, torch.tensor(lengths), torch.tensor(rows))


class SharedSource:
    """A backbone's forward passes, over each text once, for all caches of a process.

    Caches that overlap, as those of the folds of a cross-validation do, get the states of texts
    that another has had. The states are kept on disk while this object exists.

    Args:
        backbone: Runs the texts.
        root: The folder that gets a folder for the states.
        budget_bytes: If all states together would take more, the older ones are forgotten.
    """

    engine = BackboneSource.engine

    def __init__(
        self, backbone: TransformersBackbone, root: Path, *, budget_bytes: int = _SHARED_BYTES
    ):
        self.backbone = backbone
        self._source = BackboneSource(backbone)
        self._budget_bytes = budget_bytes
        root.mkdir(parents=True, exist_ok=True)
        self._texts = StateFolder(Path(tempfile.mkdtemp(prefix="shared-", dir=root)))
        weakref.finalize(self, shutil.rmtree, self._texts.directory, ignore_errors=True)
        self._bytes = 0

    @property
    def max_tokens(self) -> int:
        """The longest text that the backbone reads."""
        return self._source.max_tokens

    def shards(
        self, cache: ActivationCache, indices: Sequence[int], shown: Progress
    ) -> Generator[tuple[int, Shard]]:
        """Runs the prompts that are new, then gives each shard."""
        rows = {index: cache.plan.rows[index] for index in indices}
        prompts = [cache.prompts[row] for texts in rows.values() for row in texts]
        if not self._remember(prompts, cache.reads, shown):
            yield from self._source.shards(cache, indices, shown)
            return
        for index, texts in rows.items():
            yield (
                index,
                Shard.joined({row: self._read(cache.prompts[row], cache.reads) for row in texts}),
            )

    def remembers(self, prompt: EncodedPrompt, reads: Reads) -> bool:
        """Whether the states of this prompt are known."""
        return text_name(prompt, reads) in self._texts

    def logits(
        self, probe: Probe, prompts: Sequence[EncodedPrompt]
    ) -> Float[np.ndarray, "prompt output"]:
        """A probe's logits of whole prompts that are remembered, without a forward pass."""
        logits = [np.empty((0, probe.task.outputs))]
        for start in range(0, len(prompts), _SCORED_TEXTS):
            chosen = prompts[start : start + _SCORED_TEXTS]
            states = {i: self._read(prompt, probe.reads) for i, prompt in enumerate(chosen)}
            logits.append(shard_logits(probe, Shard.joined(states)))
        return np.concatenate(logits)

    def _remember(self, prompts: Sequence[EncodedPrompt], reads: Reads, shown: Progress) -> bool:
        """Runs what is new; False if all of it would take more than the budget."""
        wanted = {text_name(prompt, reads): prompt for prompt in prompts}
        new = {name: prompt for name, prompt in wanted.items() if name not in self._texts}
        part = self._part(new, reads)
        if self._bytes + part.bytes > self._budget_bytes:
            new, part = wanted, self._part(wanted, reads)
            if part.bytes > self._budget_bytes:
                return False
            for path in self._texts.directory.iterdir():
                path.unlink()
            self._bytes = 0
        shown.advance(sum(map(len, prompts)) - sum(map(len, new.values())))
        if not new:
            return True
        self._bytes += part.bytes
        names = [*new]
        for _, shard in self._source.shards(part, range(len(part)), shown):
            for row, hidden in shard.texts():
                self._texts.write(names[row], hidden)
        return True

    def _part(self, prompts: Mapping[str, EncodedPrompt], reads: Reads) -> ActivationCache:
        # Never filled: it says which texts are run together.
        return ActivationCache(
            self._texts.directory,
            [*prompts.values()],
            reads=reads,
            fingerprint=self.backbone.fingerprint,
        )

    def _read(self, prompt: EncodedPrompt, reads: Reads) -> Float[Tensor, "layer _ width"]:
        return self._texts.read(text_name(prompt, reads))


@torch.inference_mode()
def shard_logits(probe: Probe, shard: Shard) -> Float[np.ndarray, "text output"]:
    """A probe's logits of whole texts, from their hidden states."""
    device = probe.standardisation.mean.device
    projection = probe.projection().to(device)
    logits = [np.empty((0, probe.task.outputs))]
    texts = len(shard.rows)
    for part in shard.parts([*range(0, texts, _SCORED_TEXTS), texts]):
        columns = projection.layers(part.hidden.to(device, torch.float32)).transpose(0, 1)
        state = probe.mechanism.summarise(Ragged(columns, part.lengths.to(device)))
        logits.append(probe.mechanism.finish(state).double().cpu().numpy())
    return np.concatenate(logits)


def _keep_read(
    texts: Sequence[tuple[Float[Tensor, "layer _ width"], Bool[Tensor, " _"]]],
    layer: int,
    hidden: Float[Tensor, "text token width"],
) -> None:
    """Copies the read tokens of each text of a batch to where they belong."""
    for (states, mask), text in zip(texts, hidden, strict=True):
        states[layer] = text[: len(mask)][mask]


def require_finite(shard: Shard, *, dtype: str) -> None:
    """Refuses states that overflowed, and names the text."""
    for layer, hidden in enumerate(shard.hidden):
        broken = ~hidden.isfinite().all(1)
        if broken.any():
            # The token's text, by the texts that end before it.
            token = int(broken.int().argmax())
            text = int(torch.searchsorted(shard.lengths.cumsum(0), token, right=True))
            remedy = (
                "Use a dtype with a larger range: --dtype bfloat16."
                if dtype == "float16"
                else "Look for broken weights in the model."
            )
            raise SidelightError(
                f"Text {int(shard.rows[text]) + 1} has a hidden state at layer {layer} that is not "
                f"a finite number in {dtype}. {remedy}"
            )


def score(
    backbone: TransformersBackbone,
    bank: Bank,
    prompts: Sequence[EncodedPrompt],
    shown: Progress | None = None,
) -> list[np.ndarray]:
    """For each probe the logits of all prompts, ``[prompt, output]``, in the given order.

    Hidden states are projected while the pass runs and then gone. A prompt without any token that
    a probe reads gets NaN, and so does plain text from a probe of chats alone. ``shown`` is the
    progress bar of a larger work; without it, this has its own.
    """
    lengths = [len(prompt) for prompt in prompts]
    scores = [np.full((len(prompts), probe.task.outputs), np.nan) for probe in bank.probes]
    tap = bank.tap()
    own_bar = progress("Judging", sum(lengths), unit="tokens")
    with own_bar if shown is None else nullcontext(shown) as bar:
        for batch in by_length(lengths):
            chosen = [prompts[i] for i in batch]
            with backbone.tapped(tap):
                backbone.run(chosen)
            projected = tap.projected()
            is_text = [torch.arange(projected.shape[1]) < len(prompt) for prompt in chosen]
            columns = projected[torch.stack(is_text)]
            readings = bank.prompt_logits(columns, [bytes(prompt.parts) for prompt in chosen])
            for probe, logits, of_prompts in zip(bank.probes, scores, readings, strict=True):
                logits[batch] = [reading.logits for reading in of_prompts]
                if probe.prompt_format == "chat":
                    logits[[i for i in batch if prompts[i].is_plain]] = np.nan
            bar.advance(sum(lengths[i] for i in batch))
    return scores
