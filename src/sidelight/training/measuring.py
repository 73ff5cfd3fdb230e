"""Logits of labelled texts made into probabilities, and measured.

All logits are out-of-fold, and texts are measured at calibrations and thresholds that the other
folds gave.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sidelight.data.annotators import annotators_of
from sidelight.data.evaluation import Report, evaluate
from sidelight.data.examples import Examples, LabelledExamples
from sidelight.errors import SidelightError, warn
from sidelight.probes.card import CalibrationTexts, Texts, TrainingRecord, TrainingTexts
from sidelight.statistics.background import Conversations, Detections, flags_of
from sidelight.statistics.calibration import (
    Calibration,
    CalibrationKind,
    fit_calibration,
    require_calibratable,
    suggested_calibration,
)
from sidelight.statistics.metrics import decide, log_losses
from sidelight.statistics.thresholds import (
    F1,
    OperatingCurve,
    ThresholdRule,
    choose_thresholds,
    operating_curves,
)
from sidelight.training.validation import FOLDS, Folds

# Where there are no folds to measure by.
FLATTERING = (
    "A class has too few texts for separate calibration and measurement, so the metrics are too "
    "optimistic. Add more texts of this class."
)

# A column with more values says which document each text is from.
_MOST_SOURCES = 40
# Bytes of a text's hash: among 100,000 training texts, one of 10 million others has an equal one.
_HASH_BYTES = 5


@dataclass(frozen=True)
class Calibrated:
    """Labelled texts with their probabilities.

    Attributes:
        calibration: Fitted to all texts.
        probabilities: Out-of-fold, one row per text.
        losses: The log losses of these.
        curves: Of all texts by the calibration, for serving and a later recalibration.
        text_thresholds: The thresholds that the rule gives on all texts alone.
        report: Decisions by thresholds that the other folds gave; its own are ``text_thresholds``,
            raised until background traffic passes.
        folds: What texts were measured by; none where the rest of some fold lacks what a
            calibration needs: they were measured by what they calibrate.
    """

    calibration: Calibration
    probabilities: Float[np.ndarray, "text output"]
    losses: Float[np.ndarray, " text"]
    curves: dict[str, OperatingCurve]
    text_thresholds: tuple[float, ...]
    report: Report
    folds: Folds

    def texts(self, examples: LabelledExamples) -> CalibrationTexts:
        """What a card says of the texts and of the probe's figures on them."""
        sources = measure_sources(examples, self.probabilities, self.report.thresholds)
        description = describe_examples(examples).model_dump()
        return CalibrationTexts(
            **description, report=self.report, curves=self.curves, sources=sources
        )


def calibrate_examples(
    logits: Float[np.ndarray, "text output"],
    examples: LabelledExamples,
    folds: Folds = (),
    *,
    kind: CalibrationKind | None = None,
    rule: ThresholdRule = F1,
    around: Sequence[float] = (),
    background: Conversations | None = None,
) -> Calibrated:
    """Calibrate logits of labelled texts, and measure each fold by what calibrates on the others.

    Args:
        logits: Of each text, by a model that did not train on it.
        examples: The texts.
        folds: Those by which the texts were cross-fitted, of which those of contexts are left out;
            none draws some.
        kind: How; None takes ``suggested_calibration``.
        rule: What the thresholds are chosen for.
        around: As for ``fit_calibration``.
        background: Background conversations, which thresholds let pass. They calibrate too where
            they are a class of their own.
    """
    background = background or Conversations.none(examples.task.outputs)
    task, labels = examples.task, examples.labels
    kind = kind or suggested_calibration(task)
    folds = _measuring_folds(examples, folds, kind)

    def fitted(rows: Int[np.ndarray, " _"]) -> Calibration:
        """To these texts, and to background traffic if it is a class."""
        counted, numbers = logits[rows], labels[rows]
        if task.abstains:
            counted = np.concatenate([counted, background.logits])
            numbers = np.append(numbers, np.full(len(background.logits), task.outputs - 1))
        return fit_calibration(kind, counted, numbers, task, around=around)

    every = np.arange(len(labels))
    calibration = fitted(every)
    probabilities = calibration.apply(logits)
    curves = operating_curves(task, probabilities, labels)
    text_thresholds = tuple(curve.threshold(rule) for curve in curves.values())
    thresholds = background.thresholds_at_fpr(text_thresholds, calibration, rule)
    applied = np.tile(thresholds, (len(labels), 1))
    for fold in folds:
        rest = np.setdiff1d(every, fold)
        of_rest = fitted(rest)
        probabilities[fold] = of_rest.apply(logits[fold])
        chosen = choose_thresholds(task, of_rest.apply(logits[rest]), labels[rest], rule=rule)
        applied[fold] = background.thresholds_at_fpr(chosen, of_rest, rule)
    predictions = decide(task, probabilities, labels, thresholds=thresholds, row_thresholds=applied)
    losses = log_losses(task, probabilities, labels)
    report = evaluate(predictions)
    return Calibrated(calibration, probabilities, losses, curves, text_thresholds, report, folds)


def _measuring_folds(examples: LabelledExamples, folds: Folds, kind: CalibrationKind) -> Folds:
    """The folds to measure by; none if the rest of some fold lacks what a calibration needs."""
    if folds:
        folds = tuple(fold[fold < len(examples)] for fold in folds)
    else:
        count = min(FOLDS, examples.distinct)
        folds = examples.folds(count, seed=0) if count > 1 else ()
    rests = [np.setdiff1d(np.arange(len(examples)), fold) for fold in folds]
    # With few texts, a fold can hold all of them.
    if not all(map(len, rests)):
        return ()
    try:
        for rest in rests:
            require_calibratable(kind, examples.labels[rest], examples.task)
    except SidelightError:
        return ()
    return folds


def measure_sources(
    examples: LabelledExamples,
    probabilities: Float[np.ndarray, "text output"],
    thresholds: Sequence[float],
) -> dict[str, Detections]:
    """Texts found, and falsely flagged, of each source.

    A mean over sources says little of an attack that is like one of them.

    Args:
        examples: The texts; those without a source are left out, and all if nearly each has one
            of its own.
        probabilities: Of each, by a model that did not train on it.
        thresholds: Of each label; without any, as of several classes, nothing is measured.
    """
    # As objects: an array of texts gives each the room of the longest, maybe a whole document.
    sources = np.array(examples.sources, dtype=object)
    names = {*examples.sources}
    if not thresholds or not 2 <= len(names) <= _MOST_SOURCES:
        return {}
    holds = np.asarray(examples.labels.reshape(len(examples), -1).any(1))
    flags = flags_of(examples.task, probabilities, thresholds)
    measured: dict[str, Detections] = {}
    for source in sorted(names - {""}):
        is_source = sources == source
        measured[source] = Detections.count(flags, is_source & holds, is_source & ~holds)
    return measured


def describe_examples(examples: LabelledExamples) -> Texts:
    """How many texts there are, a hash of them, and how many have each label."""
    return Texts(rows=len(examples), sha256=examples.content_hash, classes=examples.count_by_label)


def describe_training(examples: LabelledExamples, input_sha256: str = "") -> TrainingTexts:
    """The same of training texts, with a hash of each.

    Args:
        examples: The texts that parameters were fitted to.
        input_sha256: Hash of the texts before some were held out.
    """
    description = describe_examples(examples).model_dump()
    return TrainingTexts(
        **description,
        texts=text_hashes(examples),
        input_sha256=input_sha256,
        annotators=annotators_of(examples),
    )


def text_hashes(examples: Examples) -> str:
    """Short hashes of texts with their responses, in base64, so that a probe knows its texts again.

    Texts that differ in case and spacing alone have one hash.
    """
    return base64.b64encode(b"".join(sorted(set(_hashes(examples))))).decode()


def trained_texts(record: TrainingRecord, examples: Examples) -> int:
    """How many of the texts trained the probe with this record."""
    stored = base64.b64decode(record.training.texts)
    starts = range(0, len(stored), _HASH_BYTES)
    hashes = {stored[start : start + _HASH_BYTES] for start in starts}
    return sum(text in hashes for text in _hashes(examples))


def warn_of_trained_texts(record: TrainingRecord, examples: Examples) -> None:
    """Warn if some of the texts that are measured trained the probe."""
    count = trained_texts(record, examples)
    if count:
        warn(
            f"{count} of {len(examples)} texts were used in training, so the metrics are too "
            "optimistic. Leave these texts out."
        )


def _hashes(examples: Examples) -> list[bytes]:
    keys = ([item.text_key, item.response_key] for item in examples.items)
    return [hashlib.sha256(repr(key).encode()).digest()[:_HASH_BYTES] for key in keys]
