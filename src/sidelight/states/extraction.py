"""One forward pass over each of many texts: for their hidden states, or for logits alone."""

from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sidelight.errors import SidelightError
from sidelight.models.conversation import EncodedPrompt, shared_unread
from sidelight.probes.bank import Bank
from sidelight.probes.probe import Probe, ProbeOutput
from sidelight.probes.ragged import Ragged, by_length
from sidelight.progress import Progress, progress
from sidelight.states.backbone import Backbone
from sidelight.states.cache import ActivationCache, Shard

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

    def states(
        self, cache: ActivationCache, rows: Sequence[int], advance: Progress
    ) -> Generator[Mapping[int, Float[Tensor, "layer _ width"]]]:
        """Computes the states of these rows of a cache, and gives some of them at a time.

        Args:
            cache: The cache, with its texts and what is read of them.
            rows: The texts to compute.
            advance: To be called with the number of tokens that have been run.
        """
        ...


def extract(
    source: StateSource,
    cache: ActivationCache,
    *,
    title: str = "Extracting",
) -> ActivationCache:
    """Writes the missing texts; after a kill, a second call writes only the rest.

    Args:
        source: The engine that computes the hidden states.
        cache: The cache to fill, made for the source's engine.
        title: Of the progress bar.

    Raises:
        SidelightError: The states would not fit the disk, or one is not finite.
    """
    # Engines round differently.
    assert cache.engine == source.engine
    missing = cache.open()
    if not missing:
        return cache
    # Writing overlaps the next forward pass; one at a time, so little is in memory.
    with (
        ThreadPoolExecutor(1) as writer,
        progress(title, sum(len(cache.prompts[row]) for row in missing), unit="tokens") as advance,
        closing(source.states(cache, missing, advance)) as batches,
    ):
        written = writer.submit(cache.write, {})
        for texts in batches:
            require_finite(texts, dtype=cache.fingerprint.dtype)
            written.result()
            written = writer.submit(cache.write, texts)
        written.result()
    return cache


class BackboneSource:
    """Any backbone's own forward passes, over batches of texts of similar length."""

    def __init__(self, backbone: Backbone):
        self.backbone = backbone
        self.engine = backbone.engine

    @property
    def max_tokens(self) -> int:
        """The longest text that the backbone reads."""
        return self.backbone.encoder.max_tokens

    def states(
        self, cache: ActivationCache, rows: Sequence[int], advance: Progress
    ) -> Generator[Mapping[int, Float[Tensor, "layer _ width"]]]:
        """Runs one batch after the other; what all texts begin with runs once a batch."""
        layers, width = cache.fingerprint.layers, cache.fingerprint.width
        can_share = self.backbone.can_share_prefixes
        shared = shared_unread(cache.prompts, cache.reads) if can_share else 0
        lengths = [len(cache.prompts[row]) - shared for row in rows]
        for batch in by_length(lengths, batch_tokens=self.backbone.batch_tokens):
            prompts = [cache.prompts[rows[i]] for i in batch]
            masks = [prompt.mask(cache.reads)[shared:] for prompt in prompts]
            shapes = ((layers, cache.lengths[rows[i]], width) for i in batch)
            texts = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
            with self.backbone.tapped(_ReadTap([*zip(texts, masks, strict=True)])):
                self.backbone.run(prompts, after=shared)
            advance(sum(map(len, prompts)))
            yield {rows[i]: hidden for i, hidden in zip(batch, texts, strict=True)}


def cached_logits(probe: Probe, cache: ActivationCache) -> Float[np.ndarray, "text output"]:
    """A probe's logits of whole texts of a cache, without a forward pass."""
    logits, rows = [np.empty((0, probe.task.outputs))], range(len(cache.prompts))
    for start in rows[::_SCORED_TEXTS]:
        logits.append(shard_logits(probe, cache.read(rows[start : start + _SCORED_TEXTS])))
    return np.concatenate(logits)


@torch.inference_mode()
def shard_logits(probe: Probe, shard: Shard) -> Float[np.ndarray, "text output"]:
    """A probe's logits of whole texts, from their hidden states."""
    device = probe.standardisation.mean.device
    projection = probe.projection().to(device)
    columns = projection.layers(shard.hidden.to(device, torch.float32)).transpose(0, 1)
    state = probe.mechanism.summarise(Ragged(columns, shard.lengths.to(device)))
    return probe.mechanism.finish(state).cpu().double().numpy()


class _ReadTap:
    """Copies the read tokens of each text of a batch to where they belong."""

    def __init__(self, texts: Sequence[tuple[Float[Tensor, "layer _ width"], Bool[Tensor, " _"]]]):
        self._texts = texts
        self._start = self._stop = 0

    def __call__(self, layer: int, hidden: Float[Tensor, "text token width"]) -> None:
        if layer == 0:
            self._start, self._stop = self._stop, self._stop + hidden.shape[1]
        for (states, mask), text in zip(self._texts, hidden, strict=True):
            is_read = mask[self._start : self._stop]
            read = text[: len(is_read)][is_read]
            before = int(mask[: self._start].sum())
            states[layer, before : before + len(read)] = read


def require_finite(texts: Mapping[int, Float[Tensor, "layer _ width"]], *, dtype: str) -> None:
    """Refuses states that overflowed, and names the text."""
    for row, hidden in texts.items():
        is_finite = hidden.isfinite().flatten(1).all(1)
        if not is_finite.all():
            remedy = (
                "Use a dtype with a larger range: --dtype bfloat16, or a GGUF file of BF16 or Q8_0."
                if dtype == "float16"
                else "Look for broken weights in the model."
            )
            raise SidelightError(
                f"Text {row + 1} has a hidden state at layer {int(is_finite.int().argmin())} that "
                f"is not a finite number in {dtype}. {remedy}"
            )


def text_logits(
    backbone: Backbone, bank: Bank, prompts: Sequence[EncodedPrompt]
) -> list[list[ProbeOutput]]:
    """For each probe what it says of all prompts, in the given order.

    Hidden states are projected while the pass runs and then gone. A prompt without any token that
    a probe reads gets NaN, and so does plain text from a probe of chats alone.
    """
    lengths = [len(prompt) for prompt in prompts]
    judged: list[dict[int, ProbeOutput]] = [{} for _ in bank.probes]
    tap = bank.tap()
    with progress("Judging", sum(lengths), unit="tokens") as advance:
        for batch in by_length(lengths, batch_tokens=backbone.batch_tokens):
            chosen = [prompts[i] for i in batch]
            with backbone.tapped(tap):
                backbone.run(chosen)
            projected = tap.projected()
            is_text = [torch.arange(projected.shape[1]) < len(prompt) for prompt in chosen]
            columns = projected[torch.stack(is_text)]
            by_probe = bank.prompt_logits(columns, [bytes(prompt.parts) for prompt in chosen])
            for probe, texts, of_prompts in zip(bank.probes, judged, by_probe, strict=True):
                for i, text in zip(batch, of_prompts, strict=True):
                    can_judge = probe.can_judge(is_plain=prompts[i].is_plain)
                    texts[i] = text if can_judge else ProbeOutput(np.full_like(text.logits, np.nan))
            advance(sum(lengths[i] for i in batch))
    return [[texts[i] for i in range(len(prompts))] for texts in judged]
