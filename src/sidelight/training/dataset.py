"""Labelled texts with their hidden states."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Float, Int

from sidelight.data.examples import LabelledExamples, SpanExamples
from sidelight.data.spans import token_labels
from sidelight.models.conversation import split_segments
from sidelight.models.encode import PromptEncoder
from sidelight.probes.ragged import Ragged
from sidelight.states.cache import SHARD_BYTES, ActivationCache, Memory
from sidelight.states.extraction import extract
from sidelight.states.reader import Reader
from sidelight.training.contexts import Context, Group, draw_contexts
from sidelight.training.encoding import TextEncoder, encode_shortened, span_places
from sidelight.training.settings import FitOptions
from sidelight.training.targets import Targets, TokenTargets
from sidelight.training.validation import Folds
from sidelight.types import Task

# The characters of each text's tokens.
TokenPlaces = Sequence[Sequence[tuple[int, int]]]

# The least share of texts alone in what training fits. Few texts have more contexts, which would
# drown them: without it, 32 of each class lost .03 to .17 of AUPRC in their own file.
_WITHOUT_CONTEXT_SHARE = 0.7


@dataclass(frozen=True, eq=False)
class Split:
    """Some labelled texts and their hidden states.

    Attributes:
        examples: The texts.
        states: Their hidden states.
        contexts: The setting of each text, with the group that stays in one fold: texts, their
            contexts, and the background of these. None of them: all are shown alone.
        places: The characters of each text's tokens, if these are labelled.
    """

    examples: LabelledExamples
    states: ActivationCache
    contexts: tuple[Context, ...] = ()
    places: TokenPlaces = ()

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def labels(self) -> np.ndarray:
        """The labels, as in ``LabelledExamples.labels``."""
        return self.examples.labels

    @property
    def span_examples(self) -> SpanExamples:
        """The texts, if their spans are labelled."""
        assert isinstance(self.examples, SpanExamples)
        return self.examples

    @property
    def task(self) -> Task:
        return self.examples.task

    @property
    def texts(self) -> list[str]:
        """The texts for a model without hidden states: prompt, then response if there is one."""
        return self.examples.full_texts

    def select(self, texts: Iterable[SupportsIndex]) -> "Split":
        """A split of these texts alone; nothing is extracted again."""
        chosen = np.fromiter(texts, dtype=np.int64)
        return Split(
            self.examples.select(chosen),
            self.states.select(chosen.tolist()),
            self.contexts and tuple(self.contexts[text] for text in chosen),
            self.places and [self.places[text] for text in chosen],
        )

    @cached_property
    def without_context(self) -> Int[np.ndarray, " text"]:
        """The texts that are shown alone."""
        if not self.contexts:
            return np.arange(len(self))
        return np.flatnonzero([context.kind == "without_context" for context in self.contexts])

    @cached_property
    def weights(self) -> Float[np.ndarray, " text"]:
        """How much each text counts in training, 1 in the mean."""
        texts, count = len(self), len(self.without_context)
        share = count / max(1, texts)
        weights = np.ones(texts)
        if 0 < share < _WITHOUT_CONTEXT_SHARE:
            weights[:] = (1 - _WITHOUT_CONTEXT_SHARE) / (1 - share)
            weights[self.without_context] = _WITHOUT_CONTEXT_SHARE / share
        if self.examples.weights is None:
            return weights
        weights *= self.examples.weights
        return weights / weights.mean()

    @cached_property
    def targets(self) -> Targets:
        """The labels that training compares the logits of these texts with."""
        weights = torch.from_numpy(self.weights).float()
        if not isinstance(self.examples, SpanExamples):
            return Targets(Ragged.one_row_each(torch.from_numpy(self.labels)), weights)
        rows = zip(self.examples.text_spans, self.places, strict=True)
        names = self.task.output_labels
        flags = [token_labels(text, places, spans, names) for (text, spans), places in rows]
        labels = _end_to_end([text_flags.astype(np.int64) for text_flags in flags])
        return TokenTargets(labels, weights)

    @cached_property
    def first_rows(self) -> Int[np.ndarray, " text"]:
        """The first text of each group of equal ones, among those that are shown alone."""
        return self.without_context[self.examples.select(self.without_context).first_rows]

    def with_contexts(self, parts: Folds) -> Folds:
        """Parts of the texts, with their contexts and the background that these are made of.

        A group that contexts were drawn for is in one part.
        """
        if not self.contexts:
            return parts
        groups = np.array([context.group for context in self.contexts])
        return tuple(np.flatnonzero(np.isin(groups, groups[rows])) for rows in parts)

    def folds(self, count: int) -> Folds:
        """Folds of the texts, with their contexts and the background that these are made of.

        There are none if all texts are the same.
        """
        if not self.contexts:
            count = min(count, self.examples.distinct)
            return self.examples.folds(count, seed=0) if count > 1 else ()
        groups = np.unique([context.group for context in self.contexts], return_inverse=True)[1]
        count = min(count, int(groups.max()) + 1)
        folds = [np.flatnonzero(groups % count == fold) for fold in range(count)]
        return tuple(folds) if count > 1 else ()

    def joined(self, appended: "Split") -> "Split":
        """These texts, then those of another split; none may have contexts."""
        assert not self.contexts + appended.contexts, "texts come before contexts"
        return Split(
            self.examples.joined(appended.examples),
            self.states.joined(appended.states),
            places=[*self.places, *appended.places],
        )

    def without(self, texts: Int[np.ndarray, " _"]) -> "Split":
        """All but these texts."""
        return self.select(np.setdiff1d(np.arange(len(self)), texts))

    def without_contexts(self) -> "Split":
        """The texts that are shown alone."""
        return self.select(self.without_context) if self.contexts else self

    @cached_property
    def segments(self) -> list[list[Int[np.ndarray, " _"]]]:
        """The stored tokens of each part of a text that is classified beside the whole."""
        reads = self.states.reads
        if reads.scope != "each_turn":
            return [[] for _ in self.states.prompts]
        segments: list[list[Int[np.ndarray, " _"]]] = []
        for prompt in self.states.prompts:
            mask = prompt.mask(reads).numpy()
            stored = mask.cumsum() - 1
            tokens = (segment.tokens for segment in split_segments(bytes(prompt.token_roles)))
            positions_read = (stored[positions[mask[positions]]] for positions in tokens)
            segments.append([positions for positions in positions_read if len(positions)])
        return segments


def _end_to_end(rows: Sequence[np.ndarray]) -> Ragged:
    """The rows of each text as its segment."""
    lengths = torch.tensor([*map(len, rows)])
    return Ragged(torch.from_numpy(np.concatenate(rows)), lengths)


def make_split(
    reader: Reader,
    examples: LabelledExamples,
    options: FitOptions,
    *,
    title: str = "Extracting",
) -> Split:
    """Runs the model over labelled texts, or finds their whole states on disk.

    Args:
        reader: The frozen LLM, in any engine.
        examples: The texts, which are shown alone.
        options: How texts are read, and where their hidden states go.
        title: The title of the progress bar.

    Raises:
        SidelightError: A text without a token to read, or no room for the states.
    """
    split = plan_split(reader, examples, options)
    extract(reader, split.states, title=title)
    return split


def plan_split(
    reader: Reader,
    examples: LabelledExamples,
    options: FitOptions,
    *,
    parts: Sequence[Sequence[Group]] = (),
    layers: int | None = None,
    encode: TextEncoder | None = None,
) -> Split:
    """Labelled texts and their contexts, encoded; their hidden states have not been computed.

    Args:
        reader: The frozen LLM, in any engine.
        examples: The texts.
        options: How texts are read, and where their hidden states go.
        parts: The groups of texts that contexts are drawn for; those of a part share
            ``options.context_tokens``. Without any, there are no contexts.
        layers: How many hidden states of a token are read, from the embedding up; None: all.
        encode: Encodes the texts, if some are encoded already.

    Raises:
        SidelightError: A text without a token to read.
    """
    encode = encode or text_encoder(reader.encoder, examples)
    drawn, contexts, groups = list[Context](), (), list[Group]()
    for siblings in parts:
        first = len(groups)
        drawn += draw_contexts(reader, examples, siblings, options, encode, first=first)
        groups += siblings
    limit = min(options.max_tokens, reader.max_tokens)
    prompts = encode_shortened(encode, examples, reads=options.reads, limit=limit)
    if drawn:
        group_of = {text: group for group, (rows, _) in enumerate(groups) for text in rows.tolist()}
        pairs = enumerate(zip(examples.items, prompts, strict=True))
        without_context = [
            Context("without_context", *pair, 0, text, group_of[text]) for text, pair in pairs
        ]
        contexts = (*without_context, *drawn)
        prompts = [context.prompt for context in contexts]
        examples = _in_contexts(examples, contexts)
    states = ActivationCache(
        options.states_folder(),
        prompts,
        reads=options.reads_of(examples.task),
        fingerprint=reader.fingerprint,
        layers=layers,
        engine=reader.engine,
        shard_bytes=min(SHARD_BYTES, max(1, options.memory_bytes // 2)),
        memory=Memory(options.memory_bytes),
    )
    places: TokenPlaces = ()
    if isinstance(examples, SpanExamples):
        complete = [encode(item.messages, item.response) for item in examples.items]
        places = span_places(examples.items, complete, states.lengths)
    return Split(examples, states, contexts, places)


def text_encoder(encoder: PromptEncoder, examples: LabelledExamples) -> TextEncoder:
    """An encoder for these texts, with the characters of tokens if spans are labelled."""
    return TextEncoder(encoder, with_places=isinstance(examples, SpanExamples))


def _in_contexts(examples: LabelledExamples, contexts: Sequence[Context]) -> LabelledExamples:
    """The text in each context, which has its labels; background has none of them."""
    selected, task = examples.select([context.text or 0 for context in contexts]), examples.task
    is_background = np.array([context.text is None for context in contexts])
    labels, weights = selected.labels.copy(), selected.weights
    labels[is_background] = task.outputs - 1 if task.abstains else 0
    return replace(
        selected,
        items=tuple(context.example for context in contexts),
        labels=labels,
        weights=None if weights is None else np.where(is_background, 1.0, weights),
    )
