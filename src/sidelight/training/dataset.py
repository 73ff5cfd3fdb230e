"""Labelled texts with their hidden states, split into training and validation texts.

Probes and baselines of one table read the same splits, so that no row of it has an advantage.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Int
from safetensors.torch import load_file

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
from sidelight.prompts import EncodedPrompt, Reads, judged_units
from sidelight.ragged import Ragged
from sidelight.smollm2 import cache_root
from sidelight.states.cache import (
    SHARD_BYTES,
    ActivationCache,
    Pooled,
    States,
    write_tensors,
)
from sidelight.states.extraction import BackboneSource, StateSource, extract
from sidelight.thresholds import threshold_doubts
from sidelight.training.contexts import Context, draw_contexts, without_labelled
from sidelight.training.settings import FEW_TEXTS, FitOptions
from sidelight.types import Task

Folds = tuple[Int[np.ndarray, " _"], ...]
FOLDS = 5
# Of the background what measures, where texts are held out.
_MEASURED_SHARE = 0.3
# With fewer conversations, training warns.
_FEW_CONVERSATIONS = 50
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
        parts: For each of that data set the part that folds keep together: texts, their contexts,
            and the background of these. None: there are no contexts.
        is_alone: For each of that data set whether it is a text without a context.
        token_labels: Of each text which labels its tokens have; None: texts are labelled.
    """

    examples: LabelledExamples
    prompts: tuple[EncodedPrompt, ...]
    states: ActivationCache
    rows: Int[np.ndarray, " text"]
    parts: Int[np.ndarray, " _"] | None = None
    is_alone: Bool[np.ndarray, " _"] | None = None
    token_labels: Sequence[Bool[np.ndarray, "_ label"]] | None = None

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
            self.parts,
            self.is_alone,
            self.token_labels and [self.token_labels[text] for text in chosen],
        )

    @cached_property
    def alone(self) -> Int[np.ndarray, " text"]:
        """The texts that are shown alone."""
        if self.is_alone is None:
            return np.arange(len(self))
        return np.flatnonzero(self.is_alone[self.rows])

    @cached_property
    def first_rows(self) -> Int[np.ndarray, " text"]:
        """The first text of each group of equal ones, among those that are shown alone."""
        return self.alone[self.examples.select(self.alone).first_rows]

    def folds(self, count: int) -> Folds:
        """Folds of the texts, with their contexts and the background that these are made of.

        There are none if all texts are the same.
        """
        if self.parts is None:
            count = min(count, self.examples.distinct)
            return self.examples.folds(count, seed=0) if count > 1 else ()
        parts = np.unique(self.parts[self.rows], return_inverse=True)[1]
        count = min(count, int(parts.max()) + 1)
        folds = [np.flatnonzero(parts % count == fold) for fold in range(count)]
        return tuple(folds) if count > 1 else ()

    def without(self, texts: Int[np.ndarray, " _"]) -> "Split":
        """All but these texts."""
        return self.select(np.setdiff1d(np.arange(len(self)), texts))

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
            own = (unit.tokens for unit in judged_units(bytes(prompt.parts)))
            kept = (stored[tokens[mask[tokens]]] for tokens in own)
            units.append([tokens for tokens in kept if len(tokens)])
        return units

    @cached_property
    def pooled(self) -> Pooled:
        """Means and last tokens; computed once for a data set and kept beside its states."""
        return self._pooled(is_normalised=False)

    @cached_property
    def pooled_normalised(self) -> Pooled:
        """As ``pooled``, of states that are divided by their root mean square first."""
        return self._pooled(is_normalised=True)

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
        chosen = [self.states.text(row)[layer].clone() for row in self.rows.tolist()]
        return Ragged(torch.cat(chosen), torch.tensor([len(part) for part in chosen]))

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
        familiar: The texts of ``training`` that are not disguised; none without background.
        given_sha256: Hash of the texts as they were given: none held out, no context added.
    """

    backbone: TransformersBackbone
    training: Split
    measured: Split
    folds: Folds = ()
    warnings: tuple[str, ...] = ()
    contexts: tuple[Context, ...] = ()
    familiar: tuple[int, ...] = ()
    given_sha256: str = ""

    @cached_property
    def originals(self) -> Split:
        """The training texts without their contexts."""
        return _without_contexts(self.training)

    @cached_property
    def validation(self) -> Split:
        """The texts of ``measured`` without their contexts."""
        return _without_contexts(self.measured)

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
    task = options.with_none(training.task)
    training, validation = replace(training, task=task), replace(validation, task=task)
    conversations, known = without_labelled(options.background.conversations, training)
    if known:
        warnings.append(
            f"{known} conversations of the background hold a text of the training data, and were "
            "left out: its label beats the assumption that ordinary traffic has none."
        )
    if 0 < len(conversations) < _FEW_CONVERSATIONS:
        warnings.append(
            f"The background has {len(conversations)} conversations: they say little about "
            f"ordinary traffic. Give {_FEW_CONVERSATIONS} or more (--background)."
        )
    held = 0 if folds else round(len(conversations) * _MEASURED_SHARE)
    count = min(FOLDS, training.distinct)
    parts = training.folds(count, seed=0) if count > 1 else (np.arange(len(training)),)
    # Of few texts of several classes, the first folds may take all.
    parts = tuple(part for part in parts if len(part))
    shown = draw_contexts(backbone, training, parts, conversations[held:], options)
    refusal = linear_refusal(backbone, len(training) + len(shown), options)
    if refusal and options.names("linear"):
        raise SidelightError(
            f"{refusal}. Allow more (--set memory=GIB, memory_bytes=), "
            "name another mechanism, or use fewer rows (--set limit=N)."
        )
    split = partial(make_split, backbone, options=options, source=source)
    fitted = measured = split(training, contexts=shown, parts=parts, title="Training texts")
    if folds:
        contexts, folds = shown, fitted.folds(len(folds))
    else:
        warnings += shared_texts(training, validation)
        whole = (np.arange(len(validation)),)
        contexts = draw_contexts(backbone, validation, whole, conversations[:held], options)
        measured = split(validation, contexts=contexts, parts=whole, title="Validation texts")
    is_disguised = [False] * len(training) + [context.kind == "disguised" for context in shown]
    familiar: list[int] = []
    if conversations and shown:
        familiar = np.flatnonzero(np.invert(is_disguised)).tolist()
    for part in (fitted,) if folds else (fitted, measured):
        cut = [prompt for prompt in part.prompts if prompt.dropped]
        if cut:
            limit = min(options.max_tokens, max(map(len, cut)))
            warnings.append(
                f"{len(cut)} of {len(part)} texts were cut to {limit} tokens for training "
                "(--set max_tokens=N); judging never cuts."
            )
    return ProbeDataset(
        backbone,
        fitted,
        measured,
        folds,
        tuple(warnings),
        tuple(contexts),
        tuple(familiar),
        given,
    )


def linear_refusal(backbone: TransformersBackbone, texts: int, options: FitOptions) -> str:
    """Why the pooled states of all layers are too much for memory; "" if they are not."""
    sizes = backbone.fingerprint
    needed = 8 * texts * sizes.layers * sizes.width
    if needed <= options.memory_bytes:
        return ""
    return (
        f"'linear' needs {needed / 2**30:.1f} GiB for the pooled states of all layers, the limit "
        f"is {options.memory_bytes / 2**30:.1f} GiB"
    )


def _without_contexts(split: Split) -> Split:
    return split if split.parts is None else split.select(split.alone)


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
    contexts: Sequence[Context] = (),
    parts: Folds = (),
) -> Split:
    """Runs the backbone over labelled texts, or finds their hidden states on disk.

    Args:
        backbone: The frozen LLM.
        examples: The texts.
        options: How texts are read, where their hidden states go, and whether they stay there
            whichever run calls ``states.remove``.
        title: The title of the progress bar.
        source: The engine that computes the states; None is the backbone itself.
        contexts: Further settings of the texts, which follow them.
        parts: The texts of each part that contexts were drawn for.

    Raises:
        SidelightError: A text without a token to read, or no room for the states.
    """
    source = source or BackboneSource(backbone)
    limit = min(options.max_tokens, source.max_tokens)
    prompts = encode_shortened(backbone, examples, reads=options.reads, limit=limit)
    prompts += [context.prompt for context in contexts]
    cache = ActivationCache(
        options.cache_root or cache_root() / "activations",
        prompts,
        reads=options.reads_of(examples.task),
        fingerprint=backbone.fingerprint,
        engine=source.engine,
        shard_bytes=min(SHARD_BYTES, max(1, options.memory_bytes // 2)),
        memory_bytes=options.memory_bytes,
    )
    states = extract(source, cache, budget_bytes=options.cache_budget_bytes, title=title)
    if options.keep_cache:
        states.keep()
    rows = np.arange(len(prompts))
    if not contexts:
        return Split(examples, tuple(prompts), states, rows)
    part_of = np.array([0] * len(examples) + [context.part for context in contexts])
    for part, texts in enumerate(parts):
        part_of[texts] = part
    shown = _with_contexts(examples, contexts)
    return Split(shown, tuple(prompts), states, rows, part_of, rows < len(examples))


def _with_contexts(examples: LabelledExamples, contexts: Sequence[Context]) -> LabelledExamples:
    """The texts and their contexts, which have their labels; background has none of them."""
    sources = [0 if context.text is None else context.text for context in contexts]
    shown = examples.select([*range(len(examples)), *sources])
    labels = shown.labels.copy()
    is_background = [context.text is None for context in contexts]
    task = examples.task
    labels[len(examples) :][is_background] = task.outputs - 1 if task.abstains else 0
    items = (*examples.items, *(context.example for context in contexts))
    return replace(shown, items=items, labels=labels, warnings=examples.warnings)


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


def _require_read(
    prompts: Sequence[EncodedPrompt], examples: Examples, reads: Reads, limit: int
) -> None:
    unread = [index for index, prompt in enumerate(prompts) if not prompt.mask(reads).any()]
    if not unread:
        return
    cut = sum(prompts[index].dropped > 0 for index in unread)
    remedy = (
        f"{cut} of them were cut to {limit} tokens: raise the limit (--max-tokens N, in training "
        "--set max_tokens=N)."
        if cut
        else "Name the column with the answers (--response COLUMN). In training use --set "
        "reads=prompt to read prompts instead."
    )
    raise SidelightError(
        f"{len(unread)} of {len(prompts)} texts have no token that the probe would read "
        f"({reads.side}), first {place_of(examples.items[unread[0]], unread[0])}. {remedy}"
    )
