"""Labelled texts with their hidden states, split into training and validation texts.

Probes and baselines of one table read the same splits, so that no row of it has an advantage.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import cycle
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Int
from safetensors.torch import load_file
from torch import Tensor

from sidelight.backbone import TransformersBackbone
from sidelight.calibration import require_calibratable, suggested_calibration
from sidelight.data.examples import (
    Examples,
    LabelledExamples,
    located,
    place_of,
    validation_share,
)
from sidelight.errors import SidelightError
from sidelight.progress import progress
from sidelight.prompts import EncodedPrompt, Message, Reads, piece_lengths
from sidelight.ragged import Ragged
from sidelight.smollm2 import cache_root
from sidelight.states.cache import (
    SHARD_BYTES,
    ActivationCache,
    Pooled,
    Shard,
    States,
    states_of,
    write_tensors,
)
from sidelight.states.extraction import BackboneSource, StateSource, extract
from sidelight.thresholds import threshold_doubts
from sidelight.training.settings import FEW_TEXTS, FitOptions, require_labels_of_parts
from sidelight.training.variants import with_variants
from sidelight.types import Task

FOLDS = 5
# Numbers of turns of a packed conversation, and its longest length in multiples of max_tokens.
_PACKED_TURNS = (3, 5)
_PACKED_LENGTH = 4
# With fewer validation texts of a class, training warns.
_ROUGH_BELOW = 10


@dataclass(frozen=True, eq=False)
class Split:
    """Some labelled texts and their hidden states.

    Attributes:
        examples: The texts.
        prompts: Their token ids.
        states: Hidden states of the whole data set that the texts are part of.
        rows: The index of each text in that data set.
    """

    examples: LabelledExamples
    prompts: tuple[EncodedPrompt, ...]
    states: ActivationCache
    rows: Int[np.ndarray, " text"]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def labels(self) -> np.ndarray:
        """As in ``LabelledExamples.labels``."""
        return self.examples.labels

    @property
    def task(self) -> Task:
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

    def without(self, texts: Int[np.ndarray, " _"]) -> "Split":
        """All but these texts."""
        return self.select(np.setdiff1d(np.arange(len(self)), texts))

    @cached_property
    def pooled(self) -> Pooled:
        """Means and last tokens; computed once for a data set and kept beside its states."""
        return self._pooled(is_normalised=False)

    @cached_property
    def pooled_normalised(self) -> Pooled:
        """As ``pooled``, of states that are divided by their root mean square first."""
        return self._pooled(is_normalised=True)

    def pooled_last_layer(self) -> Pooled:
        """As ``pooled``, of the last layer alone: for any number of texts."""
        shape = (len(self.states.lengths), 1, self.states.fingerprint.width)
        means, lasts = torch.empty(shape), torch.empty(shape)
        for shard in map(self.states.read, range(len(self.states))):
            own = Shard(shard.hidden[-1:], shard.lengths, shard.rows).pooled()
            means[shard.rows], lasts[shard.rows] = own.means, own.lasts
        rows = torch.from_numpy(self.rows)
        return Pooled(means[rows], lasts[rows])

    def _pooled(self, *, is_normalised: bool) -> Pooled:
        name = "pooled-normalised" if is_normalised else "pooled"
        path = self.states.directory / f"{name}.safetensors"
        if not path.exists():
            sizes = self.states.fingerprint
            shape = (len(self.states.lengths), sizes.layers, sizes.width)
            means, lasts = torch.empty(shape), torch.empty(shape, dtype=torch.bfloat16)
            with progress("Pooling", shape[0], unit="texts") as shown:
                for shard in map(self.states.read, range(len(self.states))):
                    own = shard.pooled(is_normalised=is_normalised)
                    means[shard.rows], lasts[shard.rows] = own.means, own.lasts.bfloat16()
                    shown.advance(len(shard.rows))
            write_tensors({"means": means, "lasts": lasts}, path)
        stored = load_file(path)
        rows = torch.from_numpy(self.rows)
        return Pooled(stored["means"][rows], stored["lasts"][rows].float())

    def tokens(self, layer: int) -> Ragged:
        """One layer's hidden states, ``[token, width]`` in bf16, text after text."""
        found: dict[int, Tensor] = {}
        wanted = set(self.rows.tolist())
        for index in range(len(self.states)):
            for row, hidden in self.states.read(index).texts():
                if row in wanted:
                    found[row] = hidden[layer].clone()
        chosen = [found[row] for row in self.rows.tolist()]
        return Ragged(torch.cat(chosen), torch.tensor([len(part) for part in chosen]))

    def own_states(self) -> States:
        """The hidden states of these texts alone, as training reads them."""
        return states_of(self.states, self.rows.tolist())


Folds = tuple[Int[np.ndarray, " _"], ...]


@dataclass(frozen=True)
class ProbeDataset:
    """The splits that settings are chosen on. Test data is not part of it.

    Attributes:
        backbone: The frozen LLM.
        training: What parameters are fitted to: texts, then their variants.
        validation: What early stopping, settings, calibration and thresholds are chosen on. If
            texts are cross-fitted, these are the training texts without their variants.
        folds: Indices of the training texts of each fold if texts are cross-fitted, else none.
        warnings: What is doubtful about the texts, one sentence each.
        variants: How many there are.
        given_sha256: Hash of the texts as they were given: none held out, no variant added.
    """

    backbone: TransformersBackbone
    training: Split
    validation: Split
    folds: Folds = ()
    warnings: tuple[str, ...] = ()
    variants: int = 0
    given_sha256: str = ""

    @property
    def originals(self) -> Split:
        """The training texts without their variants."""
        return self.training.select(range(len(self.training) - self.variants))

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
    """Chooses the validation texts, and runs the backbone over all texts.

    A fit and a search both begin here, so that a search chooses by the texts that calibrate later.
    The arguments are those of ``fit``.

    Raises:
        SidelightError: The validation texts do not allow a choice or a calibration, or the hidden
            states do not fit the disk.
    """
    folds: Folds = ()
    warnings, given = list(training.warnings), training.content_hash
    if validation is not None:
        warnings += validation.warnings
    elif folds := choose_folds(training):
        validation = training
        warnings += training.grouping_warnings()
    else:
        warnings += _why_held_out(training)
        whole = training
        training, validation = whole.split(validation_share(len(whole)), seed=0)
        warnings += training.warnings
        is_binary = whole.task.kind == "binary"
        if not len(validation) or (is_binary and not validation.label_counts.all()):
            raise SidelightError(
                "Too few distinct texts to hold some of each label out for validation: got "
                f"{whole.distinct} in all, and equal texts stay together. Give {FOLDS} or more of "
                "each label, or others to validate on (--validation, validation=)."
            )
    if options.long_inputs:
        require_labels_of_parts(training.task)
    require_same_task(training, validation)
    kind = options.calibration or suggested_calibration(training.task)
    require_calibratable(kind, validation.labels, training.task)
    counts = dict(zip(training.task.labels, validation.label_counts.tolist(), strict=True))
    doubts = threshold_doubts(training.task, counts, len(validation), options.threshold)
    warnings += doubts
    rarest = min(counts.values())
    if rarest < _ROUGH_BELOW and not doubts:
        warnings.append(
            f"The rarest class has {rarest} validation texts: calibration and the validation "
            "figures are rough. More labelled texts of it would help most."
        )
    shown, sources = with_variants(
        training, plain=backbone.encoder.prompt_format == "both", disguised=options.augment
    )
    by_turns = options.reads_of(training.task).scope == "each_turn"
    extracted = partial(
        make_split,
        backbone,
        options=options,
        source=source,
        in_turns=by_turns and backbone.encoder.prompt_format != "raw",
    )
    fitted = extracted(shown, title="Training texts")
    checked = fitted.select(range(len(training)))
    if folds:
        folds = tuple(
            np.append(fold, len(training) + np.flatnonzero(np.isin(sources, fold)))
            for fold in folds
        )
    else:
        warnings += shared_texts(training, validation)
        checked = extracted(validation, title="Validation texts")
    for split in (fitted,) if folds else (fitted, checked):
        cut = [prompt for prompt in split.prompts if prompt.dropped]
        if cut:
            limit = min(options.max_tokens, max(map(len, cut)))
            warnings.append(
                f"{len(cut)} of {len(split)} texts were cut to {limit} tokens for training "
                "(--max-tokens); judging never cuts."
            )
    return ProbeDataset(
        backbone, fitted, checked, folds, tuple(warnings), len(sources), given_sha256=given
    )


def choose_folds(examples: LabelledExamples) -> Folds:
    """The folds to cross-fit by; none if there are many texts, or if a fold would lack a class."""
    rarest = int(examples.label_counts.min())
    if len(examples) >= FEW_TEXTS or min(rarest, examples.distinct) < FOLDS:
        return ()
    folds = examples.folds(FOLDS, seed=0)
    return folds if all(examples.select(fold).label_counts.all() for fold in folds) else ()


def _why_held_out(examples: LabelledExamples) -> list[str]:
    """Why texts that are few enough to be cross-fitted are not."""
    if len(examples) >= FEW_TEXTS:
        return []
    rarest = int(examples.label_counts.argmin())
    label = examples.task.labels[rarest]
    return [
        f"Cross-fitting needs {FOLDS} distinct texts per label; '{label}' has "
        f"{examples.label_counts[rarest]}, or some of them are equal. Instead, "
        f"{validation_share(len(examples)):.0%} of the texts were held out for validation. Add "
        f"more texts of '{label}'."
    ]


def require_same_task(training: LabelledExamples, validation: LabelledExamples) -> None:
    """Checks that validation can choose what training needs.

    Raises:
        SidelightError: The labels differ, a class of a binary task has no text, or every label of
            a multi-label task is on all texts or on none.
    """
    task = training.task
    if validation.task != task:
        raise SidelightError(
            f"The validation data has the labels {validation.task}, the training data {task}. "
            "Load it with task=training.task."
        )
    counts = validation.label_counts
    missing = [label for label, count in zip(task.labels, counts, strict=True) if count == 0]
    if missing and task.kind == "binary":
        raise SidelightError(
            f"The validation data has no '{missing[0]}' text, so no threshold can be chosen. "
            "Add some, or leave validation data out: part of the training data is held out then."
        )
    if task.kind == "multilabel" and not ((counts > 0) & (counts < len(validation))).any():
        raise SidelightError(
            "In the validation data every label is on all texts or on none, so no threshold can be "
            "chosen. Add texts with and without a label."
        )


def shared_texts(training: LabelledExamples, validation: LabelledExamples) -> list[str]:
    """A warning if texts, with the same response if any, are on both sides."""
    seen = {(item.text, item.response) for item in training.items}
    shared = sum((item.text, item.response) in seen for item in validation.items)
    return [f"{shared} validation texts are also training texts."] if shared else []


def make_split(
    backbone: TransformersBackbone,
    examples: LabelledExamples,
    options: FitOptions,
    *,
    title: str = "Extracting",
    source: StateSource | None = None,
    in_turns: bool = False,
) -> Split:
    """Runs the backbone over labelled texts, or finds their hidden states on disk.

    Args:
        backbone: The frozen LLM.
        examples: The texts.
        options: How texts are read, where their hidden states go, and whether they stay there
            whichever run calls ``states.remove``.
        title: The title of the progress bar.
        source: The engine that computes the states; None is the backbone itself.
        in_turns: Whether half of the texts are read as turns of conversations.

    Raises:
        SidelightError: A text without a token to read, or no room for the states.
    """
    source = source or BackboneSource(backbone)
    limit = min(options.max_tokens, source.max_tokens)
    prompts = encode_shortened(backbone, examples, reads=options.reads, limit=limit)
    run, texts = [*prompts], [[text] for text in range(len(prompts))]
    if in_turns:
        longest = min(source.max_tokens, _PACKED_LENGTH * options.max_tokens)
        run, texts = _conversations(backbone, examples, prompts, longest)
    cache = ActivationCache(
        options.cache_root or cache_root() / "activations",
        run,
        reads=options.reads_of(examples.task),
        fingerprint=backbone.fingerprint,
        engine=source.engine,
        texts=texts,
        shard_bytes=min(SHARD_BYTES, max(1, options.memory_bytes // 2)),
        memory_bytes=options.memory_bytes,
    )
    states = extract(source, cache, budget_bytes=options.cache_budget_bytes, title=title)
    if options.keep_cache:
        states.keep()
    return Split(examples, tuple(prompts), states, np.arange(len(examples)))


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
    _require_read(prompts, examples, reads, limit)
    return prompts


def _conversations(
    backbone: TransformersBackbone,
    examples: LabelledExamples,
    prompts: Sequence[EncodedPrompt],
    longest: int,
) -> tuple[list[EncodedPrompt], list[list[int]]]:
    """The prompts to run, and the texts that are the turns of each.

    Half of the texts are turns of conversations that are packed from them, and keep their own
    labels: users' and assistants', since a client writes both. A longer conversation than
    ``longest`` is not made.
    """
    alone = set(range(len(prompts)))
    run: list[EncodedPrompt] = []
    texts: list[list[int]] = []
    for turns in _packed(examples, prompts):
        messages = [
            Message(role, examples.items[text].text)
            for role, text in zip(cycle(("user", "assistant")), turns, strict=False)
        ]
        try:
            prompt = backbone.encoder.encode_any_length(messages)
        except SidelightError:
            # A template may refuse an assistant's turn, or rewrite it.
            continue
        # It may also join turns, or strip one to nothing.
        is_whole = len(piece_lengths(bytes(prompt.parts))) == len(turns)
        if is_whole and len(prompt) <= longest:
            run.append(prompt)
            texts.append(turns)
            alone.difference_update(turns)
    run += [prompts[text] for text in sorted(alone)]
    texts += [[text] for text in sorted(alone)]
    return run, texts


def _packed(examples: LabelledExamples, prompts: Sequence[EncodedPrompt]) -> Iterator[list[int]]:
    """Which texts are the turns of one conversation; an odd number, so that a user has the last."""
    fit = [
        text
        for text, (item, prompt) in enumerate(zip(examples.items, prompts, strict=True))
        if [message.role for message in item.messages] == ["user"]
        and item.response is None
        and not (item.is_plain or prompt.dropped)
    ]
    generator = np.random.default_rng(0)
    left = generator.permutation(fit)[: len(fit) // 2].tolist()
    while len(left) >= min(_PACKED_TURNS):
        turns = int(generator.choice([size for size in _PACKED_TURNS if size <= len(left)]))
        yield left[:turns]
        left = left[turns:]


def _require_read(
    prompts: Sequence[EncodedPrompt], examples: Examples, reads: Reads, limit: int
) -> None:
    unread = [index for index, prompt in enumerate(prompts) if not prompt.mask(reads).any()]
    if not unread:
        return
    cut = sum(prompts[index].dropped > 0 for index in unread)
    remedy = (
        f"{cut} of them were cut to {limit} tokens: raise --max-tokens."
        if cut
        else "Use --reads prompt, or name the column with the answers (--response COLUMN)."
    )
    raise SidelightError(
        f"{len(unread)} of {len(prompts)} texts have no token that the probe would read "
        f"({reads.side}), first {place_of(examples.items[unread[0]], unread[0])}. {remedy}"
    )
