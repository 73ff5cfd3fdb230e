"""The texts of a probe with their hidden states, and which of them training leaves out.

Probes and baselines in one table use the same splits, so that no row has an advantage.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from sidelight.data.examples import LabelledExamples, located, place_of
from sidelight.errors import warn
from sidelight.states.reader import Reader
from sidelight.training.background import Background, choose_conversations
from sidelight.training.contexts import Context, has_contexts
from sidelight.training.dataset import Split, plan_split, text_encoder
from sidelight.training.encoding import TextEncoder
from sidelight.training.keeping import choose_keeping, store
from sidelight.training.loop import Candidate
from sidelight.training.settings import FitOptions
from sidelight.training.validation import (
    FOLDS,
    Folds,
    Rows,
    choose_validation,
    warn_of_shared_texts,
)
from sidelight.types import Task

# Number of groups with contexts in a held-out part; the rest has FOLDS.
_SCORING_FOLDS = 2


@dataclass(frozen=True)
class ProbeDataset:
    """The texts for fitting and for model selection, without test data.

    Attributes:
        reader: The frozen LLM, in any engine.
        split: All texts alone, then in contexts.
        left_out: Rows of each part that training leaves out, with contexts; see ``Folds``.
        input_sha256: Hash of the input texts, before holding out and without contexts.
    """

    reader: Reader
    split: Split
    left_out: Folds
    input_sha256: str = ""

    @staticmethod
    def held_out(reader: Reader, training: Split, validation: Split) -> "ProbeDataset":
        """A probe is trained on one split, and selected and calibrated on another."""
        rows = len(training) + np.arange(len(validation))
        return ProbeDataset(reader, training.joined(validation), (rows,))

    @property
    def folds(self) -> Folds:
        """The folds of cross-fitting; empty with a held-out part."""
        return self.left_out if len(self.left_out) > 1 else ()

    @cached_property
    def training(self) -> Split:
        """What the probe is trained on: texts alone, then their contexts."""
        return self.split if self.folds else self.split.without(self.left_out[0])

    @cached_property
    def scored(self) -> Split:
        """What is scored by a probe that was not trained on it: texts alone, then their contexts.

        It decides on early stopping, settings, calibration and thresholds.
        """
        return self.split if self.folds else self.split.select(self.left_out[0])

    @cached_property
    def validation(self) -> Split:
        """The texts of ``scored`` without their contexts."""
        return self.scored.without_contexts()

    @cached_property
    def contexts(self) -> tuple[Context, ...]:
        """The contexts of ``scored``, which follow its texts; their groups count from 0."""
        contexts = self.scored.contexts[len(self.validation) :]
        groups = np.unique([context.group for context in contexts], return_inverse=True)[1]
        pairs = zip(contexts, groups.tolist(), strict=True)
        return tuple(replace(context, group=group) for context, group in pairs)

    @property
    def task(self) -> Task:
        return self.split.task


def prepare(
    reader: Reader,
    training: LabelledExamples,
    validation: LabelledExamples | None,
    *,
    options: FitOptions,
    candidates: Sequence[Candidate] = (),
) -> ProbeDataset:
    """Choose the texts to leave out, draw contexts, and run the model over all texts.

    Training and search both begin here, so that a search selects on the texts that later calibrate.
    The arguments are those of ``fit``, and the candidates to train. States are compressed only if
    every candidate can be trained on compressed states; without candidates, they stay uncompressed.

    Raises:
        SidelightError: The validation texts do not allow selection or calibration, or the hidden
            states do not fit on the disk.
    """
    input_sha256 = training.content_hash
    limit = min(options.max_tokens, reader.max_tokens)
    encode = text_encoder(reader.encoder, training)
    training = _with_room(encode, training, limit, title="training")
    if validation is not None:
        validation = _with_room(encode, validation, limit, title="validation")
    texts, left_out = choose_validation(training, validation, options)
    texts = replace(texts, task=options.with_none(texts.task))
    background_texts = options.background if has_contexts(texts, options) else Background()
    if len(left_out) > 1:
        groups = [left_out]
    else:
        held_out = np.concatenate(left_out)
        rest = np.setdiff1d(np.arange(len(texts)), held_out)
        warn_of_shared_texts(texts.select(rest), texts.select(held_out))
        groups = [_groups(texts, rest, FOLDS), _groups(texts, held_out, _SCORING_FOLDS)]
    # Texts that are left out too: background traffic trains as negatives.
    background = choose_conversations(background_texts, texts)
    conversations = iter(background.split_into(sum(map(len, groups))))
    depths = [reader.fingerprint.first_layers(settings.layers) for _, settings in candidates]
    split = plan_split(
        reader,
        texts,
        options,
        parts=[[(rows, next(conversations)) for rows in each] for each in groups],
        # Other training runs that share states may read all layers.
        layers=max(depths) if depths and not options.keep_cache else None,
        encode=encode,
    )
    # It holds the complete prompts of all texts.
    del encode
    planned = ProbeDataset(reader, split, split.with_contexts(left_out), input_sha256)
    tokens = sum(split.states.lengths)
    keeping = choose_keeping(reader, planned.training, candidates, options, tokens=tokens)
    dataset = replace(planned, split=keeping.apply(reader, split))
    # What trains comes first in memory.
    store(reader, dataset.training, title="Training texts")
    if not dataset.folds:
        store(reader, dataset.scored, title="Validation texts")
    cut = [prompt for prompt in split.states.prompts if prompt.dropped]
    if cut:
        limit = min(options.max_tokens, max(map(len, cut)))
        warn(
            f"{len(cut)} of {len(split)} texts were truncated to {limit} tokens for training "
            "(--set max_tokens=N). Prediction never truncates."
        )
    return dataset


def _with_room(
    encode: TextEncoder, examples: LabelledExamples, limit: int, *, title: str
) -> LabelledExamples:
    """The texts that fit within a limit next to their system prompt; warns about the others.

    If none fits, for example with a long template, all are returned, and encoding refuses them.
    """
    full: list[int] = []
    for index, item in enumerate(examples.items):
        # A text of one message has only the template, as all texts do.
        if len(item.messages) > 1:
            with located(item, index):
                prompt = encode(item.messages, item.response)
            if len(prompt) > limit and prompt.fixed >= limit:
                full.append(index)
    if len(full) in (0, len(examples)):
        return examples
    warn(
        f"{len(full)} of {len(examples)} {title} texts were left out, because their system "
        f"prompt and chat template already take {limit} tokens or more. The first is "
        f"{place_of(examples.items[full[0]], full[0])}. Shorten the system prompts, or raise the "
        "limit (--set max_tokens=N)."
    )
    fitting = examples.select(np.setdiff1d(np.arange(len(examples)), full))
    return replace(fitting, skipped=examples.skipped)


def _groups(texts: LabelledExamples, rows: Rows, count: int) -> Folds:
    """At most this many groups of these rows, each with contexts and a part of the background."""
    chosen = texts.select(rows)
    count = min(count, chosen.distinct)
    groups = chosen.folds(count, seed=0) if count > 1 else (np.arange(len(rows)),)
    # With few texts of several classes, the first group can contain all.
    return tuple(rows[group] for group in groups if len(group))
