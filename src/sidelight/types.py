"""Mechanism specifications, tasks, spans, and the verdicts of one or several probes on a text."""

import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import PlainSerializer, PlainValidator

from sidelight.errors import SidelightError, did_you_mean

# Arrays of labels, probabilities and metrics; jaxtyping adds their axes.
# Not NDArray, which is an alias from numpy 2.5 on, and jaxtyping wants a class.
_Shape = tuple[Any, ...]
Values = np.ndarray[_Shape, np.dtype[np.float64]]
Weights = np.ndarray[_Shape, np.dtype[np.float32]]
Numbers = np.ndarray[_Shape, np.dtype[np.int64]]
Flags = np.ndarray[_Shape, np.dtype[np.bool_]]
AnyArray = np.ndarray[_Shape, np.dtype[np.generic]]


def as_json(dtype: type[np.generic], *, axes: int | None = None) -> tuple[Any, ...]:
    """Annotations with which pydantic reads and writes an array of numbers as lists.

    Args:
        dtype: Dtype of the array.
        axes: Number of axes; None allows any.
    """

    def read(values: Any) -> AnyArray:
        try:
            array = np.array(values, dtype=dtype)
        except TypeError as error:
            raise ValueError(str(error)) from error
        if not array.size and axes is not None:
            array = array.reshape(len(array), *[0] * (axes - 1))
        if axes not in (None, array.ndim):
            raise ValueError(f"expected lists nested {axes} levels deep")
        return array

    return PlainValidator(read), PlainSerializer(AnyArray.tolist, return_type=list[Any])


TaskKind = Literal["binary", "multiclass", "multilabel"]
StatesChoice = Literal["auto", "disk", "stream", "whole"]
"""How to store the hidden states of a training run."""
OptionValue = int | str
# The class that training adds for background traffic that belongs to no class of the file.
NONE = "none"


_MOST_LABEL_CHARACTERS = 1000


def is_label(text: str) -> bool:
    """Whether a text can name a class in headers, metrics and logs: a single line, not too long."""
    is_short = len(text) <= _MOST_LABEL_CHARACTERS
    return is_short and all(unicodedata.category(c) != "Cc" for c in text)


def visible(text: str) -> str:
    """The text with control characters escaped, so that it cannot control a terminal."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in ("Cc", "Cs") else c
        for c in text
    )


@dataclass(frozen=True)
class MechanismSpec:
    """A mechanism and its options, as recorded in a probe's card."""

    name: str
    options: Mapping[str, OptionValue]


@dataclass(frozen=True)
class Task:
    """The decision that a probe makes: its kind and its labels.

    A task gets the class of its kind, as a ``pathlib.Path`` gets that of its system. The methods
    here suit most kinds; the subclasses hold the exceptions.

    Attributes:
        kind: ``binary`` (one positive class), ``multiclass`` (exactly one label holds) or
            ``multilabel`` (each label holds or not).
        labels: Names in the order of the outputs; (negative, positive) for a binary task.

    Raises:
        SidelightError: The kind is unknown.
    """

    kind: TaskKind
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.kind not in _CLASS_OF_KIND:
            raise SidelightError(
                f"Unknown kind of task '{self.kind}'.{did_you_mean(self.kind, _CLASS_OF_KIND)}"
            )
        # Not in __new__, because pydantic and copies pass no arguments to it.
        object.__setattr__(self, "__class__", _CLASS_OF_KIND[self.kind])

    def __repr__(self) -> str:
        return f"Task(kind={self.kind!r}, labels={self.labels!r})"

    @property
    def output_labels(self) -> tuple[str, ...]:
        """The label of each logit; for a binary task, only the positive class."""
        return self.labels

    @property
    def outputs(self) -> int:
        """The number of logits: one for a binary task, else one per label."""
        return len(self.output_labels)

    @property
    def is_sound(self) -> bool:
        """Whether the number of labels fits the kind, and the labels are distinct and printable."""
        count = len(self.labels)
        return count >= 2 and len({*self.labels}) == count and all(map(is_label, self.labels))

    @property
    def flaggable(self) -> tuple[str, ...]:
        """The labels that have a threshold; empty for a multi-class task."""
        return self.output_labels

    @property
    def abstains(self) -> bool:
        """Whether the last of several classes is ``none``, for texts of no other class."""
        return False

    @property
    def foreground(self) -> slice:
        """The labels other than the class ``none`` of background traffic."""
        return slice(-1) if self.abstains else slice(None)

    @property
    def choices(self) -> dict[str | bool, str]:
        """The label that each answer names, if exactly one label holds; else empty."""
        return {label: label for label in self.labels}

    @property
    def flags(self) -> str:
        """The object of the sentence "The probe flags ..."."""
        return "each label that reaches its threshold"

    @property
    def background_errors(self) -> str:
        """The name of verdicts on background traffic that are wrong."""
        return "False positives"

    def has_thresholds(self, thresholds: Sequence[float]) -> bool:
        """Whether these are a threshold between 0 and 1 for each label that has one."""
        return len(thresholds) == len(self.flaggable) and all(
            0 <= least <= 1 for least in thresholds
        )

    def is_form_of(self, labels: AnyArray) -> bool:
        """Whether these can be labels of texts, as in ``LabelledExamples.labels``."""
        return labels.ndim == 1 and bool(np.isin(labels, np.arange(len(self.labels))).all())

    def holds(self, labels: AnyArray) -> Flags:
        """Whether each label holds, ``[text, label]``.

        Args:
            labels: As in ``LabelledExamples.labels``, or decisions of the same form.
        """
        return labels.reshape(-1, 1) == np.arange(len(self.labels))

    def targets(self, labels: AnyArray) -> Flags:
        """Whether the label of each logit holds, ``[text, output]``; arguments as for ``holds``."""
        return self.holds(labels)[:, -self.outputs :]

    def labels_of(self, targets: AnyArray) -> Numbers:
        """The inverse of ``targets``, for a binary or multi-label task."""
        return targets.astype(np.int64)

    def label_probabilities(self, probabilities: Values) -> Values:
        """Probability of each label, ``[text, label]``, from the probability of each output."""
        return probabilities

    def decided(self, probabilities: Values, thresholds: Sequence[float] | Values) -> Flags:
        """Whether each label is predicted, ``[text, label]``.

        Args:
            probabilities: Of each output, ``[text, output]``.
            thresholds: Of each output, or of each text and output; unused if multi-class.
        """
        return self.holds(probabilities >= np.array(thresholds))

    def flagged(self, probabilities: Values, thresholds: Sequence[float] | Values) -> Flags:
        """Which texts are flagged, or given a class other than ``none``; arguments as above."""
        return np.asarray((probabilities >= np.array(thresholds)).any(axis=1))

    def confidences(self, probabilities: Values, targets: Flags) -> tuple[Values, Flags]:
        """Probability and truth of each label, or of only the most probable of several classes."""
        return probabilities, targets

    def likelihoods(self, probabilities: Values, labels: Numbers) -> Values:
        """Probability of what holds in each text: each label or its absence, or the class.

        Args:
            probabilities: Of each output, ``[text, output]``.
            labels: As in ``LabelledExamples.labels``.
        """
        return np.where(self.targets(labels), probabilities, 1 - probabilities)

    def confusion_matrix(self, actual: Flags, predicted: Flags) -> Numbers:
        """Counts of texts, ``[actual, predicted]``; for a multi-label task, of each label.

        Args:
            actual: Whether each label holds, ``[text, label]``.
            predicted: Whether it was predicted.
        """
        return actual.T.astype(np.int64) @ predicted.astype(np.int64)

    def logit_weights(self, label: str) -> Weights:
        """Weights whose sum of logits is the evidence for the label of an output."""
        return np.eye(self.outputs, dtype=np.float32)[self.output_labels.index(label)]

    def decide(
        self,
        probe: str,
        probabilities: Mapping[str, float],
        thresholds: Mapping[str, float],
        spans: "Sequence[Span] | None" = None,
        annotated: Iterable[str] = (),
        *,
        turn: int | None = None,
        version: str = "",
    ) -> "Verdict":
        """Return the verdict of a probe at the given thresholds.

        Args:
            probe: Name of the probe.
            probabilities: Calibrated probability of every label, in the order of ``labels``.
            thresholds: Lowest probability at which each label holds; a label without one never
                does.
            spans: Labelled spans. Their labels hold too, because tokens and texts are calibrated
                separately. Spans of labels without a threshold are left out.
            annotated: Labels that hold as well if the spans are unknown.
            turn: The turn that decided, as ``Verdict.turn``.
            version: Version of the probe, as in ``Verdict.version``.
        """
        if spans is not None:
            spans = tuple(span for span in spans if span.label in thresholds)
            annotated = (span.label for span in spans)
        annotated = {*annotated}
        reached = tuple(
            name
            for name, least in thresholds.items()
            if probabilities[name] >= least or name in annotated
        )
        best, labels = self._named(probabilities, reached)
        return Verdict(
            probe, best, labels, dict(probabilities), bool(reached), turn, spans, version=version
        )

    def _named(
        self, probabilities: Mapping[str, float], reached: tuple[str, ...]
    ) -> tuple[str, tuple[str, ...]]:
        """``Verdict.label`` and ``labels``, given the labels that reach their thresholds."""
        best = max(probabilities, key=probabilities.__getitem__)
        return best, reached or (best,)


class _Binary(Task):
    @property
    def output_labels(self) -> tuple[str, ...]:
        return self.labels[-1:]

    @property
    def is_sound(self) -> bool:
        return len(self.labels) == 2 and super().is_sound

    @property
    def choices(self) -> dict[str | bool, str]:
        return {**super().choices, False: self.labels[0], True: self.labels[1]}

    @property
    def flags(self) -> str:
        return f"'{self.labels[1]}'"

    def labels_of(self, targets: AnyArray) -> Numbers:
        return targets[:, 0].astype(np.int64)

    def label_probabilities(self, probabilities: Values) -> Values:
        return np.hstack([1 - probabilities, probabilities])

    def _named(
        self, probabilities: Mapping[str, float], reached: tuple[str, ...]
    ) -> tuple[str, tuple[str, ...]]:
        best = reached[0] if reached else self.labels[0]
        return best, reached or (best,)


class _MultiClass(Task):
    @property
    def flaggable(self) -> tuple[str, ...]:
        return ()

    @property
    def abstains(self) -> bool:
        return self.labels[-1] == NONE

    @property
    def flags(self) -> str:
        return "nothing: with several classes, a verdict names one, and `flagged` stays false"

    @property
    def background_errors(self) -> str:
        return f"Classes other than '{NONE}'"

    def decided(self, probabilities: Values, thresholds: Sequence[float] | Values) -> Flags:
        return self.holds(probabilities.argmax(axis=1))

    def flagged(self, probabilities: Values, thresholds: Sequence[float] | Values) -> Flags:
        return probabilities.argmax(axis=1) != self.labels.index(NONE)

    def confidences(self, probabilities: Values, targets: Flags) -> tuple[Values, Flags]:
        winner = probabilities.argmax(axis=1, keepdims=True)
        stated = np.take_along_axis(probabilities, winner, axis=1)
        return stated, np.take_along_axis(targets, winner, axis=1)

    def likelihoods(self, probabilities: Values, labels: Numbers) -> Values:
        return np.take_along_axis(probabilities, labels[:, None], axis=1)

    def logit_weights(self, label: str) -> Weights:
        # The softmax ignores what all logits share.
        return super().logit_weights(label) - np.float32(1 / self.outputs)


class _MultiLabel(Task):
    @property
    def choices(self) -> dict[str | bool, str]:
        return {}

    def is_form_of(self, labels: AnyArray) -> bool:
        return labels.shape[1:] == (len(self.labels),) and bool(np.isin(labels, (0, 1)).all())

    def holds(self, labels: AnyArray) -> Flags:
        # Also for an empty array, which has one axis.
        return labels.reshape(len(labels), len(self.labels)).astype(np.bool_)

    def confusion_matrix(self, actual: Flags, predicted: Flags) -> Numbers:
        both = (np.stack([~flags, flags]).astype(np.int64) for flags in (actual, predicted))
        return np.einsum("arl,prl->lap", *both)

    def _named(
        self, probabilities: Mapping[str, float], reached: tuple[str, ...]
    ) -> tuple[str, tuple[str, ...]]:
        best, _ = super()._named(probabilities, reached)
        return best, reached


_CLASS_OF_KIND: Mapping[TaskKind, type[Task]] = {
    "binary": _Binary,
    "multiclass": _MultiClass,
    "multilabel": _MultiLabel,
}


@dataclass(frozen=True, order=True)
class Span:
    """Characters of a text that have a label.

    Attributes:
        start: Index of the first character, in Unicode code points.
        end: Index after the last character.
        label: The label.
        probability: Calibrated probability of the most confident token; None for ground truth.
        message: Index of the message that contains the span, from 0, if a conversation has several.
        words: The text of the span; it never leaves the process and is not part of ``repr``.
    """

    start: int
    end: int
    label: str
    probability: float | None = field(default=None, compare=False)
    message: int | None = field(default=None, compare=False)
    words: str = field(default="", compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, without the words and without values that are None."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        del values["words"]
        return values


@dataclass(frozen=True)
class Verdict:
    """The statement of one probe about one text.

    Attributes:
        probe: Name of the probe.
        label: The predicted class (binary), else the most probable label, even if nothing is
            flagged.
        labels: The labels that hold at the probe's thresholds, and the labels of ``spans``, or of
            any token if the spans are unknown; any number if multi-label. A label without a span
            belongs to the text as a whole.
        probabilities: Calibrated probability of every label.
        flagged: Whether the positive class (binary) or any label (multi-label) reaches its
            threshold or has a span. A multi-class verdict is never flagged, because it names a
            class, not a danger.
        turn: Index of the deciding turn, counted from 0 without leading system turns (the first of
            several turns classified together); None if the whole text decided.
        spans: Labelled spans of the prompt or the response, in order; None if the probe labels no
            spans, or if the positions of its tokens are unknown.
        ignored: Labelled spans that do not count, because the rule ignores them.
        version: ``Probe.version`` of the probe; "" if it was not loaded from an artifact. Ignored
            by equality.
    """

    probe: str
    label: str
    labels: tuple[str, ...]
    probabilities: dict[str, float]
    flagged: bool
    turn: int | None = None
    spans: tuple[Span, ...] | None = None
    ignored: tuple[Span, ...] = ()
    version: str = field(default="", compare=False)

    @property
    def known_spans(self) -> tuple[Span, ...]:
        """``spans``, or none if they are unknown."""
        return self.spans or ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, with those of ``spans_dict``."""
        # The dictionary keeps the positions of the first two keys.
        values = {"probe": self.probe, "version": self.version, **asdict(self)}
        del values["spans"], values["ignored"]
        return {**values, **self.spans_dict()}

    def spans_dict(self) -> dict[str, list[dict[str, Any]]]:
        """``spans`` in JSON's form only if known, and ``ignored`` only if there are any."""
        values = {} if self.spans is None else {"spans": spans_json(self.spans)}
        return {**values, "ignored": spans_json(self.ignored)} if self.ignored else values


def spans_json(spans: Iterable[Span]) -> list[dict[str, Any]]:
    """Spans in the form used in files and responses."""
    return [span.to_dict() for span in spans]


TokenLabel = tuple[int, str, float]
"""The index of a token among those that the probe reads, its label, and the label's probability."""


@dataclass(frozen=True)
class Verdicts:
    """The verdicts of several probes on one text, or on part of it.

    Attributes:
        verdicts: One verdict for each probe that gave one.
        failed: Names of the probes that gave no verdict, which must never be treated as a negative
            one.
        token_labels: Labelled tokens by probe that labels spans; the engine turns them into spans,
            because it knows the characters of the tokens.
        tools: Verdicts on only the tool turns of a prompt; None if unknown.
    """

    verdicts: tuple[Verdict, ...] = ()
    failed: tuple[str, ...] = ()
    token_labels: Mapping[str, Sequence[TokenLabel]] = field(
        default_factory=dict[str, Sequence[TokenLabel]], compare=False
    )
    tools: "Verdicts | None" = field(default=None, compare=False)

    def __or__(self, newer: "Verdicts") -> "Verdicts":
        """Merge both; for a probe in both, the newer verdict or failure counts."""
        renewed = {*(verdict.probe for verdict in newer.verdicts), *newer.failed}
        return Verdicts(
            tuple(verdict for verdict in self.verdicts if verdict.probe not in renewed)
            + newer.verdicts,
            tuple(name for name in self.failed if name not in renewed) + newer.failed,
            {**self.token_labels, **newer.token_labels},
            newer.tools or self.tools,
        )

    def verdict(self, probe: str) -> Verdict | None:
        """The verdict of the probe of this name; None if it gave none."""
        return next((verdict for verdict in self.verdicts if verdict.probe == probe), None)

    def of(self, names: Collection[str]) -> "Verdicts":
        """Only the verdicts and failures of these probes."""
        return Verdicts(
            tuple(verdict for verdict in self.verdicts if verdict.probe in names),
            tuple(name for name in self.failed if name in names),
            {name: labels for name, labels in self.token_labels.items() if name in names},
            self.tools,
        )
