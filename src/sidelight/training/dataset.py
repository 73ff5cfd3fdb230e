"""Labelled texts with their hidden states: those that train, and those that measure.

Probes and baselines of one table read the same splits, so that no row of it has an advantage.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import SupportsIndex

import numpy as np
from jaxtyping import Bool, Float, Int

from sidelight.backbone import TransformersBackbone
from sidelight.data.examples import Example, Examples, LabelledExamples, located, place_of
from sidelight.errors import SidelightError
from sidelight.progress import say
from sidelight.prompts import EncodedPrompt, Reads, judged_units
from sidelight.spans import token_labels
from sidelight.states.cache import (
    SHARD_BYTES,
    ActivationCache,
    States,
)
from sidelight.states.extraction import BackboneSource, StateSource, extract
from sidelight.training.background import choose_conversations
from sidelight.training.contexts import Context, draw_contexts
from sidelight.training.settings import FitOptions
from sidelight.training.validation import FOLDS, Folds, choose_validation, shared_texts
from sidelight.types import Task

# The characters of each text's tokens.
TokenPlaces = Sequence[Sequence[tuple[int, int]]]

# The least share of texts alone in what training fits. Few texts have more contexts, which would
# drown them: without it, 32 of each class lost .03 to .17 of AUPRC in their own file.
_ALONE_SHARE = 0.7
# The parts of the background that measure, where texts are held out; training has FOLDS.
_MEASURING_PARTS = 2


@dataclass(frozen=True, eq=False)
class Split:
    """Some labelled texts and their hidden states.

    Attributes:
        examples: The texts.
        prompts: Their token ids.
        states: Hidden states of the whole data set that the texts are part of.
        rows: The index of each text in that data set.
        group_of: For each of that data set the group that stays in one fold: texts, their contexts,
            and the background of these. None: there are no contexts.
        is_alone: For each of that data set whether it is a text without a context.
        token_labels: Of each text which labels its tokens have; None: texts are labelled.
        places: Of each text, if its tokens are labelled, the characters of these.
        rationales: Of each text the tokens that it has its label for; None: they are not known.
    """

    examples: LabelledExamples
    prompts: tuple[EncodedPrompt, ...]
    states: ActivationCache
    rows: Int[np.ndarray, " text"]
    group_of: Int[np.ndarray, " _"] | None = None
    is_alone: Bool[np.ndarray, " _"] | None = None
    token_labels: Sequence[Bool[np.ndarray, "_ label"]] | None = None
    places: TokenPlaces = ()
    rationales: Sequence[Bool[np.ndarray, " _"]] | None = None

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def labels(self) -> np.ndarray:
        """The labels, as in ``LabelledExamples.labels``."""
        return self.examples.labels

    @property
    def task(self) -> Task:
        return self.examples.task

    @property
    def texts(self) -> list[str]:
        """The texts for a model without hidden states: prompt, then response if there is one."""
        return self.examples.whole_texts

    def select(self, texts: Iterable[SupportsIndex]) -> "Split":
        """A split of these texts alone; nothing is extracted again."""
        chosen = np.fromiter(texts, dtype=np.int64)
        return Split(
            self.examples.select(chosen),
            tuple(self.prompts[text] for text in chosen),
            self.states,
            self.rows[chosen],
            self.group_of,
            self.is_alone,
            self.token_labels and [self.token_labels[text] for text in chosen],
            self.places and [self.places[text] for text in chosen],
            self.rationales and [self.rationales[text] for text in chosen],
        )

    @cached_property
    def alone(self) -> Int[np.ndarray, " text"]:
        """The texts that are shown alone."""
        if self.is_alone is None:
            return np.arange(len(self))
        return np.flatnonzero(self.is_alone[self.rows])

    @cached_property
    def weights(self) -> Float[np.ndarray, " text"]:
        """How much each text counts in training, 1 in the mean."""
        texts, alone = len(self), len(self.alone)
        share = alone / max(1, texts)
        weights = np.ones(texts)
        if 0 < share < _ALONE_SHARE:
            weights[:] = (1 - _ALONE_SHARE) / (1 - share)
            weights[self.alone] = _ALONE_SHARE / share
        if self.examples.weights is None:
            return weights
        weights *= self.examples.weights
        return weights / weights.mean()

    @cached_property
    def first_rows(self) -> Int[np.ndarray, " text"]:
        """The first text of each group of equal ones, among those that are shown alone."""
        return self.alone[self.examples.select(self.alone).first_rows]

    def folds(self, count: int) -> Folds:
        """Folds of the texts, with their contexts and the background that these are made of.

        There are none if all texts are the same.
        """
        if self.group_of is None:
            count = min(count, self.examples.distinct)
            return self.examples.folds(count, seed=0) if count > 1 else ()
        groups = np.unique(self.group_of[self.rows], return_inverse=True)[1]
        count = min(count, int(groups.max()) + 1)
        folds = [np.flatnonzero(groups % count == fold) for fold in range(count)]
        return tuple(folds) if count > 1 else ()

    def without(self, texts: Int[np.ndarray, " _"]) -> "Split":
        """All but these texts."""
        return self.select(np.setdiff1d(np.arange(len(self)), texts))

    def without_contexts(self) -> "Split":
        """The texts that are shown alone."""
        return self if self.group_of is None else self.select(self.alone)

    @cached_property
    def units(self) -> list[list[Int[np.ndarray, " _"]]]:
        """The stored tokens of each part of a text that is judged beside the whole."""
        reads = self.states.reads
        if reads.scope != "each_turn":
            return [[] for _ in self.prompts]
        units: list[list[Int[np.ndarray, " _"]]] = []
        for prompt in self.prompts:
            mask = prompt.mask(reads).numpy()
            stored = mask.cumsum() - 1
            tokens = (unit.tokens for unit in judged_units(bytes(prompt.parts)))
            kept = (stored[positions[mask[positions]]] for positions in tokens)
            units.append([positions for positions in kept if len(positions)])
        return units

    def own_states(self) -> States:
        """The hidden states of these texts alone, as training reads them."""
        return States(self.states, self.rows.tolist())


@dataclass(frozen=True)
class ProbeDataset:
    """The splits that settings are chosen on. Test data is not part of it.

    Attributes:
        backbone: The frozen LLM.
        training: What parameters are fitted to: texts alone, then their contexts.
        measured: What early stopping, settings, calibration and thresholds are chosen on: texts
            alone, then their contexts. If texts are cross-fitted, these are those of ``training``.
        folds: Indices of the training texts of each fold if texts are cross-fitted, else none.
        warnings: What is doubtful about the texts, one sentence each.
        contexts: Those of ``measured``.
        given_sha256: Hash of the texts as they were given: none held out, no context added.
    """

    backbone: TransformersBackbone
    training: Split
    measured: Split
    folds: Folds = ()
    warnings: tuple[str, ...] = ()
    contexts: tuple[Context, ...] = ()
    given_sha256: str = ""

    @cached_property
    def originals(self) -> Split:
        """The training texts without their contexts."""
        return self.training.without_contexts()

    @cached_property
    def validation(self) -> Split:
        """The texts of ``measured`` without their contexts."""
        return self.measured.without_contexts()

    @property
    def task(self) -> Task:
        return self.training.task


def prepare(
    backbone: TransformersBackbone,
    training: LabelledExamples,
    validation: LabelledExamples | None,
    *,
    options: FitOptions,
    source: StateSource | None = None,
) -> ProbeDataset:
    """Chooses the validation texts, draws contexts, and runs the backbone over all texts.

    A fit and a search both begin here, so that a search chooses by the texts that calibrate later.
    The arguments are those of ``fit``.

    Raises:
        SidelightError: The validation texts do not allow a choice or a calibration, or the hidden
            states do not fit the disk.
    """
    given_sha256 = training.content_hash
    training, validation, folds, warnings = choose_validation(training, validation, options)
    task = options.with_none(training.task)
    training, validation = replace(training, task=task), replace(validation, task=task)
    background, doubts = choose_conversations(options.background, training)
    warnings += doubts
    groups = _groups(training, FOLDS)
    parts = background.parts(len(groups) + (0 if folds else _MEASURING_PARTS))
    contexts = draw_contexts(backbone, training, groups, parts[: len(groups)], options)
    split = partial(make_split, backbone, options=options, source=source)
    fitted = measured = split(training, contexts=contexts, groups=groups, title="Training texts")
    if folds:
        folds = fitted.folds(len(folds))
    else:
        warnings += shared_texts(training, validation)
        measuring = parts[len(groups) :]
        groups = _groups(validation, len(measuring))
        measuring = measuring[: len(groups)]
        contexts = draw_contexts(backbone, validation, groups, measuring, options)
        measured = split(
            validation,
            contexts=contexts,
            groups=groups,
            title="Validation texts",
            in_memory=fitted.states.token_bytes * sum(fitted.states.lengths),
        )
    for texts in (fitted,) if folds else (fitted, measured):
        cut = [prompt for prompt in texts.prompts if prompt.dropped]
        if cut:
            limit = min(options.max_tokens, max(map(len, cut)))
            warnings.append(
                f"{len(cut)} of {len(texts)} texts were cut to {limit} tokens for training "
                "(--set max_tokens=N); judging never cuts."
            )
    return ProbeDataset(
        backbone,
        fitted,
        measured,
        folds,
        tuple(warnings),
        contexts,
        given_sha256,
    )


def _groups(examples: LabelledExamples, count: int) -> Folds:
    """At most so many groups of texts, each with contexts and a part of the background."""
    count = min(count, examples.distinct)
    groups = examples.folds(count, seed=0) if count > 1 else (np.arange(len(examples)),)
    # With few texts of several classes, the first group can take all.
    return tuple(group for group in groups if len(group))


def make_split(
    backbone: TransformersBackbone,
    examples: LabelledExamples,
    options: FitOptions,
    *,
    title: str = "Extracting",
    source: StateSource | None = None,
    contexts: Sequence[Context] = (),
    groups: Folds = (),
    in_memory: int = 0,
) -> Split:
    """Runs the backbone over labelled texts, or finds their hidden states on disk.

    Args:
        backbone: The frozen LLM.
        examples: The texts.
        options: How texts are read, and where their hidden states go.
        title: The title of the progress bar.
        source: The engine that computes the states; None is the backbone itself.
        contexts: Further settings of the texts, which follow them.
        groups: The texts of each group that contexts were drawn for.
        in_memory: Bytes of other states that may be in memory at the same time.

    Raises:
        SidelightError: A text without a token to read, or no room for the states.
    """
    source = source or BackboneSource(backbone)
    limit = min(options.max_tokens, source.max_tokens)
    prompts = encode_shortened(backbone, examples, reads=options.reads, limit=limit)
    prompts += [context.prompt for context in contexts]
    cache = ActivationCache(
        options.states_folder(),
        prompts,
        reads=options.reads_of(examples.task),
        fingerprint=backbone.fingerprint,
        engine=source.engine,
        shard_bytes=min(SHARD_BYTES, max(1, options.memory_bytes // 2)),
        memory_bytes=options.memory_bytes - in_memory,
    )
    stored = sum(cache.path(row).exists() for row in range(len(prompts)))
    if stored:
        say(f"{title}: the hidden states of {stored:,} of {len(prompts):,} are on disk already.")
    states = extract(source, cache, title=title)
    rows = np.arange(len(prompts))
    if examples.spans is not None:
        places = span_places(backbone, examples.items, states.lengths)
        labels = [
            token_labels(text, own, spans, examples.task.output_labels)
            for (text, spans), own in zip(examples.text_spans, places, strict=True)
        ]
        return Split(examples, tuple(prompts), states, rows, None, None, labels, places)
    shown = _with_contexts(examples, contexts) if contexts else examples
    words = (
        None if shown.rationales is None else _rationales(backbone, shown, prompts, options.reads)
    )
    if not contexts:
        return Split(examples, tuple(prompts), states, rows, rationales=words)
    group_of = np.array([0] * len(examples) + [context.group for context in contexts])
    for group, texts in enumerate(groups):
        group_of[texts] = group
    is_alone = rows < len(examples)
    return Split(shown, tuple(prompts), states, rows, group_of, is_alone, rationales=words)


def _with_contexts(examples: LabelledExamples, contexts: Sequence[Context]) -> LabelledExamples:
    """The texts and their contexts, which have their labels; background has none of them."""
    sources = [0 if context.text is None else context.text for context in contexts]
    shown = examples.select([*range(len(examples)), *sources])
    labels = shown.labels.copy()
    is_background = [context.text is None for context in contexts]
    task = examples.task
    labels[len(examples) :][is_background] = task.outputs - 1 if task.abstains else 0
    items = (*examples.items, *(context.example for context in contexts))
    weights = None if shown.weights is None else shown.weights.copy()
    if weights is not None:
        weights[len(examples) :][is_background] = 1
    words = shown.rationales
    if words is not None:
        pairs = zip(words, [False] * len(examples) + is_background, strict=True)
        words = tuple("" if is_other else own for own, is_other in pairs)
    return replace(
        shown,
        items=items,
        labels=labels,
        warnings=examples.warnings,
        weights=weights,
        rationales=words,
    )


def _rationales(
    backbone: TransformersBackbone,
    examples: LabelledExamples,
    prompts: Sequence[EncodedPrompt],
    reads: Reads,
) -> list[Bool[np.ndarray, " _"]]:
    """Which of each text's stored tokens stand for the words that it has its label for.

    None of a text that was cut.
    """
    marks: list[Bool[np.ndarray, " _"]] = []
    for item, words, prompt in zip(examples.items, examples.rationales or (), prompts, strict=True):
        is_marked = np.zeros(len(prompt), dtype=np.bool_)
        if words and not prompt.dropped:
            texts = [message.content for message in item.messages]
            texts += [] if item.response is None else [item.response]
            # The question may have words of the answer.
            first = len(item.messages) if reads.side == "response" else 0
            message = next((i for i in range(first, len(texts)) if words in texts[i]), -1)
            start = texts[message].find(words)
            whole = backbone.encoder.encode_any_length(
                item.conversation, item.response, with_places=True
            )
            for token, place in enumerate(whole.places):
                if place is not None and place.message == message:
                    is_marked[token] = place.start < start + len(words) and place.end > start
        marks.append(is_marked[prompt.mask(reads).numpy()])
    return marks


def encode_shortened(
    backbone: TransformersBackbone, examples: Examples, *, reads: Reads, limit: int
) -> list[EncodedPrompt]:
    """The texts' token ids, at most ``limit`` of each.

    Raises:
        SidelightError: A text cannot be rendered, or has no token that is read.
    """
    prompts: list[EncodedPrompt] = []
    for index, item in enumerate(examples.items):
        with located(item, index):
            whole = backbone.encoder.encode_any_length(item.conversation, item.response)
            prompts.append(whole.shortened(limit, reads))
    unread = [index for index, prompt in enumerate(prompts) if not prompt.mask(reads).any()]
    if not unread:
        return prompts
    cut = sum(prompts[index].dropped > 0 for index in unread)
    remedy = (
        f"{cut} of them were cut to {limit} tokens: raise the limit (--set max_tokens=N)."
        if cut
        else "Name the column with the answers (--response COLUMN). In training use --set "
        "reads=prompt to read prompts instead."
    )
    raise SidelightError(
        f"{len(unread)} of {len(prompts)} texts have no token that the probe would read "
        f"({reads.side}), first {place_of(examples.items[unread[0]], unread[0])}. {remedy}"
    )


def span_places(
    backbone: TransformersBackbone, examples: Sequence[Example], read: Sequence[int]
) -> list[list[tuple[int, int]]]:
    """The characters of each text's first tokens; ``read`` says of how many."""
    places: list[list[tuple[int, int]]] = []
    for index, (example, count) in enumerate(zip(examples, read, strict=True)):
        with located(example, index):
            whole = backbone.encoder.encode_any_length(
                example.conversation, example.response, with_places=True
            ).places
        message = len(example.messages) - (example.response is None)
        of_message = [place for place in whole if place is not None and place.message == message]
        if len(of_message) < count:
            raise SidelightError(
                "The chat template rewrites the text, so its tokens have no characters. Use the "
                "raw prompt format for this model (--set format=raw)."
            )
        places.append([(place.start, place.end) for place in of_message[:count]])
    return places
