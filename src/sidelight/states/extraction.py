"""One forward pass over each of many texts, for their hidden states or only for logits."""

from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

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
from sidelight.states.cache import ActivationCache, Shard
from sidelight.states.reader import Backbone, Reader

_SCORED_TEXTS = 32


def extract(
    reader: Reader,
    cache: ActivationCache,
    *,
    title: str = "Extracting",
) -> ActivationCache:
    """Write the states of missing texts; after an interruption, a second call writes only the rest.

    Args:
        reader: Reader that computes the hidden states.
        cache: The cache to fill, made for the reader's engine.
        title: Title of the progress bar.

    Raises:
        SidelightError: The states would not fit on the disk, or a state is not finite.
    """
    # Engines round differently.
    assert cache.engine == reader.engine
    if cache.is_streamed:
        return cache
    missing = cache.open()
    if not missing:
        return cache
    # Writing overlaps the next forward pass; one at a time, to limit the memory.
    with (
        ThreadPoolExecutor(1) as writer,
        progress(title, sum(len(cache.prompts[row]) for row in missing), unit="tokens") as advance,
        closing(reader.states(cache, missing, advance)) as batches,
    ):
        written = writer.submit(cache.write, {})
        for texts in batches:
            require_finite(texts, dtype=cache.fingerprint.dtype)
            written.result()
            written = writer.submit(cache.write, texts)
        written.result()
    return cache


def streamed(reader: Reader, cache: ActivationCache) -> ActivationCache:
    """A cache whose states are recomputed by the reader whenever they are read."""

    def compute(
        cache: ActivationCache, rows: Sequence[int]
    ) -> Generator[Mapping[int, Float[Tensor, "layer _ width"]]]:
        with closing(reader.states(cache, rows, lambda _: None)) as batches:
            for texts in batches:
                require_finite(texts, dtype=cache.fingerprint.dtype)
                yield texts

    return cache.streamed(compute)


def tapped_states(
    backbone: Backbone, cache: ActivationCache, rows: Sequence[int], advance: Progress
) -> Generator[Mapping[int, Float[Tensor, "layer _ width"]]]:
    """``Reader.states`` for a backbone: batches of similar length, each with its common prefix run
    once.
    """
    layers, width = cache.layers, cache.fingerprint.width
    shared = shared_unread(cache.prompts, cache.reads) if backbone.can_share_prefixes else 0
    lengths = [len(cache.prompts[row]) - shared for row in rows]
    for batch in by_length(lengths, batch_tokens=backbone.batch_tokens):
        prompts = [cache.prompts[rows[i]] for i in batch]
        masks = [prompt.mask(cache.reads)[shared:] for prompt in prompts]
        shapes = ((layers, cache.lengths[rows[i]], width) for i in batch)
        texts = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
        with backbone.tapped(_ReadTap([*zip(texts, masks, strict=True)])):
            backbone.run(prompts, after=shared, layers=layers)
        advance(sum(map(len, prompts)))
        yield {rows[i]: hidden for i, hidden in zip(batch, texts, strict=True)}


class _ReadTap:
    """Copies the read tokens of each text of a batch to their destination."""

    def __init__(self, texts: Sequence[tuple[Float[Tensor, "layer _ width"], Bool[Tensor, " _"]]]):
        self._texts = texts
        self._layers = len(texts[0][0])
        self._start = self._stop = 0

    def __call__(self, layer: int, hidden: Float[Tensor, "text token width"]) -> None:
        if layer == 0:
            self._start, self._stop = self._stop, self._stop + hidden.shape[1]
        if layer >= self._layers:
            return
        for (states, mask), text in zip(self._texts, hidden, strict=True):
            is_read = mask[self._start : self._stop]
            read = text[: len(is_read)][is_read]
            before = int(mask[: self._start].sum())
            states[layer, before : before + len(read)] = read


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
    projections = projection.layers(shard.hidden.to(device, torch.float32)).transpose(0, 1)
    state = probe.mechanism.summarise(Ragged(projections, shard.lengths.to(device)))
    return probe.mechanism.finish(state).cpu().double().numpy()


def require_finite(texts: Mapping[int, Float[Tensor, "layer _ width"]], *, dtype: str) -> None:
    """Refuse states that overflowed; the error names the text."""
    for row, hidden in texts.items():
        is_finite = hidden.isfinite().flatten(1).all(1)
        if not is_finite.all():
            remedy = (
                "Use a dtype with a larger range, such as bfloat16 (--dtype)."
                if dtype == "float16"
                else "Check the model for corrupt weights."
            )
            raise SidelightError(
                f"Text {row + 1} has a hidden state at layer {int(is_finite.int().argmin())} "
                f"that is not finite in {dtype}. {remedy}"
            )


def text_logits(
    backbone: Backbone, bank: Bank, prompts: Sequence[EncodedPrompt]
) -> list[list[ProbeOutput]]:
    """The outputs of each probe for all prompts, in the given order.

    Hidden states are projected during the pass and not stored. A probe's output is NaN for a prompt
    without any token that it reads, and for plain text if the probe was trained only on chats.
    """
    lengths = [len(prompt) for prompt in prompts]
    outputs: list[dict[int, ProbeOutput]] = [{} for _ in bank.probes]
    tap = bank.tap()
    with progress("Classifying", sum(lengths), unit="tokens") as advance:
        for batch in by_length(lengths, batch_tokens=backbone.batch_tokens):
            chosen = [prompts[i] for i in batch]
            with backbone.tapped(tap):
                backbone.run(chosen, layers=tap.depth)
            projected = tap.projected()
            is_text = [torch.arange(projected.shape[1]) < len(prompt) for prompt in chosen]
            projections = projected[torch.stack(is_text)]
            by_probe = bank.prompt_logits(
                projections, [bytes(prompt.token_roles) for prompt in chosen]
            )
            for probe, texts, of_prompts in zip(bank.probes, outputs, by_probe, strict=True):
                for i, text in zip(batch, of_prompts, strict=True):
                    can_classify = probe.can_classify(prompts[i])
                    texts[i] = (
                        text if can_classify else ProbeOutput(np.full_like(text.logits, np.nan))
                    )
            advance(sum(lengths[i] for i in batch))
    return [[texts[i] for i in range(len(prompts))] for texts in outputs]
