"""The training and validation splits of a probe, with their hidden states.

Probes and baselines in one table use the same splits, so that no row has an advantage.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from sidelight.data.examples import LabelledExamples, located, place_of
from sidelight.errors import warn
from sidelight.states.cache import Memory
from sidelight.states.reader import Reader
from sidelight.training.background import Background, choose_conversations
from sidelight.training.contexts import Context, has_contexts
from sidelight.training.dataset import Split, plan_split, text_encoder
from sidelight.training.encoding import TextEncoder
from sidelight.training.keeping import choose_keeping
from sidelight.training.loop import Candidate
from sidelight.training.settings import FitOptions
from sidelight.training.validation import FOLDS, Folds, choose_validation, warn_of_shared_texts
from sidelight.types import Task

# Number of background parts for measurement if texts are held out; training has FOLDS.
_MEASURING_FOLDS = 2


@dataclass(frozen=True)
class ProbeDataset:
    """The splits for fitting and for model selection, without test data.

    Attributes:
        reader: The frozen LLM, in any engine.
        training: Split that parameters are fitted to: texts alone, then their contexts.
        measured: Split for early stopping, settings, calibration and thresholds: texts alone, then
            their contexts. With cross-fitting, the same as ``training``.
        folds: Indices of the training texts of each fold with cross-fitting, else empty.
        input_sha256: Hash of the input texts, before holding out and without contexts.
    """

    reader: Reader
    training: Split
    measured: Split
    folds: Folds = ()
    input_sha256: str = ""

    @cached_property
    def originals(self) -> Split:
        """The training texts without their contexts."""
        return self.training.without_contexts()

    @cached_property
    def validation(self) -> Split:
        """The texts of ``measured`` without their contexts."""
        return self.measured.without_contexts()

    @cached_property
    def contexts(self) -> tuple[Context, ...]:
        """The contexts of ``measured``, which follow its texts."""
        return self.measured.contexts[len(self.validation) :]

    @property
    def task(self) -> Task:
        return self.training.task


def prepare(
    reader: Reader,
    training: LabelledExamples,
    validation: LabelledExamples | None,
    *,
    options: FitOptions,
    candidates: Sequence[Candidate] = (),
) -> ProbeDataset:
    """Choose the validation texts, draw contexts, and run the model over all texts.

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
    training, validation, folds = choose_validation(training, validation, options)
    task = options.with_none(training.task)
    training, validation = replace(training, task=task), replace(validation, task=task)
    background_texts = options.background if has_contexts(training, options) else Background()
    background = choose_conversations(background_texts, training)
    rows = _groups(training, FOLDS)
    background_folds = background.split_into(len(rows) + (0 if folds else _MEASURING_FOLDS))
    groups = [*zip(rows, background_folds, strict=False)]
    memory = Memory(options.memory_bytes)
    depths = [reader.fingerprint.first_layers(settings.layers) for _, settings in candidates]
    # Other training runs that share states may read all layers.
    layers = max(depths) if depths and not options.keep_cache else None
    split = partial(
        plan_split, reader, options=options, layers=layers, memory=memory, encode=encode
    )
    planned = [split(training, groups=groups)]
    if not folds:
        warn_of_shared_texts(training, validation)
        background_folds = background_folds[len(rows) :]
        groups = [*zip(_groups(validation, len(background_folds)), background_folds, strict=False)]
        planned.append(split(validation, groups=groups))
    # They hold the complete prompts of all texts.
    del encode, split
    keeping = choose_keeping(reader, planned, candidates, options)
    titles = ("Training texts", "Validation texts")
    splits = [
        keeping.apply(reader, plan, title=title)
        for plan, title in zip(planned, titles, strict=False)
    ]
    fitted, measured = splits[0], splits[-1]
    if folds:
        folds = fitted.folds(len(folds))
    for texts in splits:
        cut = [prompt for prompt in texts.states.prompts if prompt.dropped]
        if cut:
            limit = min(options.max_tokens, max(map(len, cut)))
            warn(
                f"{len(cut)} of {len(texts)} texts were truncated to {limit} tokens for training "
                "(--set max_tokens=N). Prediction never truncates."
            )
    return ProbeDataset(reader, fitted, measured, folds, input_sha256)


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


def _groups(examples: LabelledExamples, count: int) -> Folds:
    """At most this many groups of texts, each with contexts and a part of the background."""
    count = min(count, examples.distinct)
    groups = examples.folds(count, seed=0) if count > 1 else (np.arange(len(examples)),)
    # With few texts of several classes, the first group can contain all.
    return tuple(group for group in groups if len(group))
