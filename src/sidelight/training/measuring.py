"""Logits of labelled texts made into probabilities, measured on texts that calibrated nothing."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sidelight.calibration import (
    Calibration,
    CalibrationKind,
    fit_calibration,
    require_calibratable,
    suggested_calibration,
)
from sidelight.data.examples import Examples, LabelledExamples
from sidelight.errors import SidelightError
from sidelight.evaluation import Report, evaluate
from sidelight.metrics import log_losses, score_counts
from sidelight.thresholds import F1, ThresholdRule, choose_thresholds, operating_curves
from sidelight.training.dataset import FOLDS, Folds
from sidelight.training.traffic import quiet_thresholds
from sidelight.types import Task

# Where there are no folds to measure by.
FLATTERING = (
    "A class has too few texts to measure on others than those that calibrate: the figures are "
    "flattering. Add more texts of it."
)

# Of a text's hash: among 100,000 training texts, one of 10 million others has an equal one.
_HASH_BYTES = 5


@dataclass(frozen=True)
class Calibrated:
    """Logits of validation texts made into probabilities.

    Attributes:
        calibration: Fitted to all of them.
        probabilities: Out-of-fold, one row per text; without folds, by ``calibration``.
        losses: Their log losses.
        report: Their figures, with decisions by thresholds that the other folds gave; the report's
            thresholds are chosen on all of the texts.
    """

    calibration: Calibration
    probabilities: Float[np.ndarray, "text output"]
    losses: Float[np.ndarray, " text"]
    report: Report


def calibrate_examples(
    logits: Float[np.ndarray, "text output"],
    examples: LabelledExamples,
    folds: Folds,
    *,
    kind: CalibrationKind | None = None,
    rule: ThresholdRule = F1,
    bootstrap: int = 1000,
    around: Sequence[float] = (),
    traffic: Float[np.ndarray, "conversation output"] | None = None,
) -> Calibrated:
    """Calibrates logits of labelled texts and measures them.

    Args:
        logits: Of each text.
        examples: The texts.
        folds: Indices of the texts that are measured by what the others give; if there are none,
            the texts are measured by what they themselves give.
        kind: How; None takes ``suggested_calibration``.
        rule: What the thresholds are chosen for.
        bootstrap: As for ``evaluate``.
        around: As for ``fit_calibration``.
        traffic: Logits of ordinary conversations, which thresholds let pass: see
            ``quiet_thresholds``. They calibrate too where they are a class of their own.
    """
    quiet = np.empty((0, logits.shape[1])) if traffic is None else traffic
    task, labels = examples.task, examples.labels
    kind = kind or suggested_calibration(task)

    def fitted(rows: Int[np.ndarray, " _"]) -> Calibration:
        """To these texts, and to ordinary traffic if it is a class."""
        counted, numbers = logits[rows], labels[rows]
        if task.abstains:
            counted = np.concatenate([counted, quiet])
            numbers = np.append(numbers, np.full(len(quiet), task.outputs - 1))
        return fit_calibration(kind, counted, numbers, task, around=around)

    calibration = fitted(np.arange(len(labels)))
    thresholds = choose_thresholds(task, calibration.apply(logits), labels, rule=rule)
    thresholds = quiet_thresholds(thresholds, calibration, quiet, rule)
    probabilities = np.empty_like(logits)
    applied = np.empty((len(labels), len(thresholds)))
    for fold in folds or (np.arange(len(labels)),):
        rest = np.setdiff1d(np.arange(len(labels)), fold)
        rest = rest if len(rest) else fold
        own = fitted(rest)
        probabilities[fold] = own.apply(logits[fold])
        chosen = choose_thresholds(task, own.apply(logits[rest]), labels[rest], rule=rule)
        applied[fold] = quiet_thresholds(chosen, own, quiet, rule)
    report = evaluate(
        task,
        probabilities,
        labels,
        thresholds=thresholds,
        row_thresholds=applied,
        bootstrap=bootstrap,
    )
    losses = log_losses(task, probabilities, labels)
    return Calibrated(calibration, probabilities, losses, report)


def measuring_folds(
    examples: LabelledExamples, *, folds: Folds = (), kind: CalibrationKind | None = None
) -> Folds:
    """Folds of texts, each to be measured by what calibrates on the others.

    Those of cross-fitting if there are some. Empty if the others of some fold do not have what
    a calibration needs.
    """
    if folds:
        folds = tuple(fold[fold < len(examples)] for fold in folds)
    else:
        count = min(FOLDS, examples.distinct)
        folds = examples.folds(count, seed=0) if count > 1 else ()
    try:
        for fold in folds:
            rest = np.setdiff1d(np.arange(len(examples)), fold)
            wanted = kind or suggested_calibration(examples.task)
            require_calibratable(wanted, examples.labels[rest], examples.task)
    except SidelightError:
        return ()
    return folds


def describe_scores(
    task: Task,
    probabilities: Float[np.ndarray, "text output"],
    labels: Int[np.ndarray, "text ..."] | None = None,
) -> dict[str, Any]:
    """What serving and a later recalibration need to know of the scores of some texts.

    ``scores`` are histograms, which drift is measured from; ``curves``, of labelled texts, what
    each threshold flags.
    """
    columns = dict(zip(task.labels[-task.outputs :], probabilities.T, strict=True))
    curves = {} if labels is None else operating_curves(task, probabilities, labels)
    return {
        "scores": {label: score_counts(own.tolist()) for label, own in columns.items()},
        "curves": {label: curve.to_dict() for label, curve in curves.items()},
    }


def describe_examples(examples: LabelledExamples) -> dict[str, Any]:
    """How many texts there are, a hash of them, and how many have each label."""
    counts = examples.label_counts.tolist()
    return {
        "rows": len(examples),
        "sha256": examples.content_hash,
        "classes": dict(zip(examples.task.labels, counts, strict=True)),
    }


def text_hashes(examples: Examples) -> str:
    """Short hashes of texts with their responses, in base64, so that a probe knows its texts again.

    Texts that differ in case and spacing alone have one hash.
    """
    return base64.b64encode(b"".join(sorted(set(_hashes(examples))))).decode()


def trained_texts(record: Mapping[str, Any], examples: Examples) -> int:
    """How many of the texts trained the probe with this record; older probes know none."""
    stored = base64.b64decode(record.get("training", {}).get("texts", ""))
    starts = range(0, len(stored), _HASH_BYTES)
    known = {stored[start : start + _HASH_BYTES] for start in starts}
    return sum(text in known for text in _hashes(examples))


def trained_text_warnings(record: Mapping[str, Any], examples: Examples) -> tuple[str, ...]:
    """A sentence if some of the texts that are measured trained the probe."""
    count = trained_texts(record, examples)
    if not count:
        return ()
    return (f"{count} of {len(examples)} texts were trained on: the figures flatter the probe.",)


def _hashes(examples: Examples) -> list[bytes]:
    keys = ([item.text_key, item.response_key] for item in examples.items)
    return [hashlib.sha256(repr(key).encode()).digest()[:_HASH_BYTES] for key in keys]
