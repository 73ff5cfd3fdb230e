"""Calibration and measurement of the logits of labelled texts.

All logits are out-of-fold, and texts are measured with calibrations and thresholds from the other
folds.
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
from sidelight.statistics.background import Conversations, Detections
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

# Warning if there are no folds to measure by.
FLATTERING = (
    "A class has too few texts for separate calibration and measurement, so the metrics are too "
    "optimistic. Add more texts of this class."
)

# A source column with more values identifies documents rather than sources.
_MOST_SOURCES = 40
# Bytes of a text's hash: with 100,000 training texts, one in 10 million other texts collides.
_HASH_BYTES = 5


@dataclass(frozen=True)
class Calibrated:
    """Labelled texts with their probabilities.

    Attributes:
        calibration: Calibration fitted to all texts.
        probabilities: Out-of-fold probabilities, one row per text.
        losses: Log losses of these probabilities.
        curves: Operating curves of all texts under the calibration, for serving and later
            recalibration.
        text_thresholds: Thresholds from the rule on all texts, without background.
        report: Metrics at the thresholds of the other folds; its own thresholds are
            ``text_thresholds``, raised until background traffic passes.
        folds: Folds for measurement; empty if the rest of a fold is insufficient for a calibration,
            in which case texts were measured with the calibration fitted to them.
    """

    calibration: Calibration
    probabilities: Float[np.ndarray, "text output"]
    losses: Float[np.ndarray, " text"]
    curves: dict[str, OperatingCurve]
    text_thresholds: tuple[float, ...]
    report: Report
    folds: Folds

    def texts(self, examples: LabelledExamples) -> CalibrationTexts:
        """The card entry for the texts and the probe's metrics on them."""
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
    """Calibrate logits of labelled texts, and measure each fold with a calibration on the others.

    Args:
        logits: Logits of each text from a model that was not trained on it.
        examples: The texts.
        folds: Folds of cross-fitting, of which contexts are left out; if empty, folds are drawn.
        kind: Kind of calibration; None uses ``suggested_calibration``.
        rule: Objective of the thresholds.
        around: As for ``fit_calibration``.
        background: Background conversations that thresholds let pass. They are also used for
            calibration if they form a class.
    """
    background = background or Conversations.none(examples.task.outputs)
    task, labels = examples.task, examples.labels
    kind = kind or suggested_calibration(task)
    folds = _measuring_folds(examples, folds, kind)

    def fitted(rows: Int[np.ndarray, " _"]) -> Calibration:
        """Fit to these texts, and to background traffic if it is a class."""
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
    """The folds for measurement; empty if the rest of a fold is insufficient for a calibration."""
    if folds:
        folds = tuple(fold[fold < len(examples)] for fold in folds)
    else:
        count = min(FOLDS, examples.distinct)
        folds = examples.folds(count, seed=0) if count > 1 else ()
    rests = [np.setdiff1d(np.arange(len(examples)), fold) for fold in folds]
    # With few texts, a fold can contain all of them.
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
    """True and false positives by source.

    The mean over sources says little about an attack that resembles one of them.

    Args:
        examples: The texts; those without a source are left out, as are all texts if nearly every
            text has its own source.
        probabilities: Probabilities of each text from a model that was not trained on it.
        thresholds: Threshold of each label; without any, as for multi-class tasks, nothing is
            measured.
    """
    # As objects, because a string array allocates the length of the longest text for each.
    sources = np.array(examples.sources, dtype=object)
    names = {*examples.sources}
    if not thresholds or not 2 <= len(names) <= _MOST_SOURCES:
        return {}
    holds = np.asarray(examples.labels.reshape(len(examples), -1).any(1))
    flags = examples.task.flagged(probabilities, thresholds)
    measured: dict[str, Detections] = {}
    for source in sorted(names - {""}):
        is_source = sources == source
        measured[source] = Detections.count(flags, is_source & holds, is_source & ~holds)
    return measured


def describe_examples(examples: LabelledExamples) -> Texts:
    """The number of texts, their hash, and the number of texts with each label."""
    return Texts(rows=len(examples), sha256=examples.content_hash, classes=examples.count_by_label)


def describe_training(examples: LabelledExamples, input_sha256: str = "") -> TrainingTexts:
    """Describe training texts, with a hash of each text.

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
    """Short hashes of texts with their responses, in base64, for recognising a probe's training
    texts.

    Texts that differ only in case and spacing have the same hash.
    """
    return base64.b64encode(b"".join(sorted(set(_hashes(examples))))).decode()


def trained_texts(record: TrainingRecord, examples: Examples) -> int:
    """Number of texts that the probe with this record was trained on."""
    stored = base64.b64decode(record.training.texts)
    starts = range(0, len(stored), _HASH_BYTES)
    hashes = {stored[start : start + _HASH_BYTES] for start in starts}
    return sum(text in hashes for text in _hashes(examples))


def warn_of_trained_texts(record: TrainingRecord, examples: Examples) -> None:
    """Warn if the probe was trained on some of the texts."""
    count = trained_texts(record, examples)
    if count:
        warn(
            f"{count} of {len(examples)} texts were used in training, so the metrics are too "
            "optimistic. Leave these texts out."
        )


def _hashes(examples: Examples) -> list[bytes]:
    keys = ([item.text_key, item.response_key] for item in examples.items)
    return [hashlib.sha256(repr(key).encode()).digest()[:_HASH_BYTES] for key in keys]
