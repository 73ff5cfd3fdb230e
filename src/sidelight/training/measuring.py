"""Logits of labelled texts made into probabilities, measured on texts that calibrated nothing."""

from collections.abc import Sequence
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
from sidelight.data.examples import LabelledExamples
from sidelight.errors import SidelightError
from sidelight.evaluation import Report, evaluate
from sidelight.metrics import log_losses, score_counts
from sidelight.thresholds import F1, ThresholdRule, choose_thresholds, operating_curves
from sidelight.training.dataset import FOLDS, Folds
from sidelight.types import Task

# Where there are no folds to measure by.
FLATTERING = (
    "A class has too few texts to measure on others than those that calibrate: the figures are "
    "flattering. Add more texts of it."
)


@dataclass(frozen=True)
class Calibrated:
    """Logits of validation texts made into probabilities.

    Attributes:
        calibration: Fitted to all of them.
        probabilities: Each text's by a calibration that the other folds gave.
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
    """
    task, labels = examples.task, examples.labels
    kind = kind or suggested_calibration(task)
    calibration = fit_calibration(kind, logits, labels, task, around=around)
    thresholds = choose_thresholds(task, calibration.apply(logits), labels, rule=rule)
    probabilities = np.empty_like(logits)
    applied = np.empty((len(labels), len(thresholds)))
    for fold in folds or (np.arange(len(labels)),):
        rest = np.setdiff1d(np.arange(len(labels)), fold)
        rest = rest if len(rest) else fold
        own = fit_calibration(kind, logits[rest], labels[rest], task, around=around)
        probabilities[fold] = own.apply(logits[fold])
        applied[fold] = choose_thresholds(task, own.apply(logits[rest]), labels[rest], rule=rule)
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

    ``scores`` are histograms, which drift is measured from; ``priors`` the mean probabilities;
    ``curves``, of labelled texts, what each threshold flags.
    """
    columns = dict(zip(task.labels[-task.outputs :], probabilities.T, strict=True))
    curves = {} if labels is None else operating_curves(task, probabilities, labels)
    return {
        "scores": {label: score_counts(own.tolist()) for label, own in columns.items()},
        "priors": {label: float(own.mean()) for label, own in columns.items()},
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
