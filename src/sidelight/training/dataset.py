"""A labelled data set on a backbone: texts, labels and hidden states, as a table's rows need them.

Probes and baselines of one table read the same splits, so that no row of it has an advantage.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Int
from safetensors.torch import load_file
from torch import Tensor

from sidelight.backbone import TransformersBackbone
from sidelight.data.examples import LabelledExamples, located, place_of
from sidelight.errors import SidelightError
from sidelight.prompts import EncodedPrompt, Reads
from sidelight.ragged import Ragged
from sidelight.states.cache import ActivationCache, states_of, write_tensors
from sidelight.states.extraction import BackboneSource, StateSource, extract
from sidelight.states.pooled import Pooled, pool
from sidelight.training.loop import TrainingSet
from sidelight.types import Task


@dataclass(frozen=True, eq=False)
class Split:
    """Some labelled texts and their hidden states.

    Attributes:
        examples: The texts.
        prompts: Their token ids.
        states: Hidden states of the data set that the texts are part of.
        rows: Where in that data set each text is.
    """

    examples: LabelledExamples
    prompts: tuple[EncodedPrompt, ...]
    states: ActivationCache
    rows: Int[np.ndarray, " text"]

    def __len__(self) -> int:
        """The number of texts."""
        return len(self.examples)

    @property
    def labels(self) -> np.ndarray:
        """As in ``LabelledExamples.labels``."""
        return self.examples.labels

    @property
    def task(self) -> Task:
        """The classes."""
        return self.examples.task

    @property
    def texts(self) -> list[str]:
        """What a model without hidden states reads: prompt, then response if there is one."""
        return [
            item.text if item.response is None else f"{item.text}\n{item.response}"
            for item in self.examples.items
        ]

    def select(self, texts: Iterable[SupportsIndex]) -> "Split":
        """Only these texts; nothing is extracted again."""
        chosen = np.fromiter(texts, dtype=np.int64)
        return Split(
            self.examples.select(chosen),
            tuple(self.prompts[text] for text in chosen),
            self.states,
            self.rows[chosen],
        )

    @cached_property
    def pooled(self) -> Pooled:
        """Means and last tokens; computed once for a data set and kept beside its states."""
        path = self.states.directory / "pooled.safetensors"
        if not path.exists():
            whole = pool(self.states)
            write_tensors({"means": whole.means, "lasts": whole.lasts.bfloat16()}, path)
        stored = load_file(path)
        rows = torch.from_numpy(self.rows)
        return Pooled(stored["means"][rows], stored["lasts"][rows].float())

    def tokens(self, layer: int) -> Ragged:
        """One layer's hidden states, ``[token, width]`` in bf16, text after text."""
        found: dict[int, Tensor] = {}
        wanted = set(self.rows.tolist())
        for index in range(len(self.states)):
            shard = self.states.read(index)
            parts = shard.hidden[layer].split(shard.lengths.tolist())
            for row, part in zip(shard.rows.tolist(), parts, strict=True):
                if row in wanted:
                    found[row] = part.clone()
        chosen = [found[row] for row in self.rows.tolist()]
        return Ragged(torch.cat(chosen), torch.tensor([len(part) for part in chosen]))

    def training_set(self) -> TrainingSet:
        """What ``train_mechanisms`` reads; a small part of a data set lies in memory."""
        # All texts in another order are as many, but their labels are in that order.
        if np.array_equal(self.rows, np.arange(len(self.states.prompts))):
            return TrainingSet(self.states, self.labels)
        return TrainingSet(states_of(self.states, self.rows.tolist()), self.labels)


@dataclass(frozen=True)
class ProbeDataset:
    """The splits that settings are chosen on. Test data is not part of it.

    Attributes:
        backbone: The frozen LLM.
        training: What parameters are fitted to.
        validation: What early stopping, settings, calibration and thresholds are chosen on.
    """

    backbone: TransformersBackbone
    training: Split
    validation: Split

    @property
    def task(self) -> Task:
        """The classes."""
        return self.training.task


def make_split(
    backbone: TransformersBackbone,
    examples: LabelledExamples,
    *,
    reads: Reads,
    max_tokens: int,
    cache_root: Path,
    budget_bytes: int | None = None,
    keep_cache: bool = True,
    title: str = "Extracting",
    source: StateSource | None = None,
) -> Split:
    """Runs the backbone over labelled texts, or finds their hidden states on disk.

    Args:
        backbone: The frozen LLM.
        examples: The texts.
        reads: The tokens that probes look at.
        max_tokens: Longer texts are cut; see ``EncodedPrompt.shortened``.
        cache_root: Folder of all caches.
        budget_bytes: The most that the states may take; None allows what the disk has.
        keep_cache: Whether the states stay on disk, whichever run calls ``states.remove``.
        title: Of the progress bar.
        source: The engine that computes the states; None is the backbone itself.

    Raises:
        SidelightError: A text without a token to read, or no room for the states.
    """
    source = source or BackboneSource(backbone)
    limit = min(max_tokens, source.max_tokens)
    prompts = _encode(backbone, examples, reads, limit)
    _require_read(prompts, examples, reads, limit)
    cache = ActivationCache(
        cache_root, prompts, reads=reads, fingerprint=backbone.fingerprint, engine=source.engine
    )
    states = extract(source, cache, budget_bytes=budget_bytes, title=title)
    if keep_cache:
        states.keep()
    return Split(examples, prompts, states, np.arange(len(examples)))


def _encode(
    backbone: TransformersBackbone, examples: LabelledExamples, reads: Reads, limit: int
) -> tuple[EncodedPrompt, ...]:
    """The texts' tokens, at most ``limit`` of each."""
    prompts: list[EncodedPrompt] = []
    for index, item in enumerate(examples.items):
        with located(item, index):
            whole = backbone.encoder.encode_any_length(item.messages, item.response)
            prompts.append(whole.shortened(limit, reads))
    return tuple(prompts)


def _require_read(
    prompts: Sequence[EncodedPrompt], examples: LabelledExamples, reads: Reads, limit: int
) -> None:
    unread = [index for index, prompt in enumerate(prompts) if not prompt.mask(reads).any()]
    if not unread:
        return
    cut = sum(prompts[index].dropped > 0 for index in unread)
    remedy = (
        f"{cut} of them were cut to {limit} tokens: raise --max-tokens."
        if cut
        else "Read the prompt, or name the answers' column (--response, where there is one)."
    )
    raise SidelightError(
        f"{len(unread)} of {len(prompts)} texts have no token that the probe would read "
        f"({reads.side}), first {place_of(examples.items[unread[0]], unread[0])}. {remedy}"
    )
