"""Recalibration: fitting a probe's calibration and thresholds to new traffic without training.

With labelled texts, both are refitted. Without texts, thresholds move along the curves of the last
calibration.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from sidelight.data.evaluation import Report, evaluate
from sidelight.data.examples import LabelledExamples
from sidelight.errors import SidelightError, warn
from sidelight.probes.card import ProbeCard, Recalibration
from sidelight.statistics.calibration import suggested_calibration
from sidelight.statistics.metrics import decide, log_losses
from sidelight.statistics.thresholds import (
    F1,
    ThresholdRule,
    require_thresholds,
    warn_of_few_texts,
)
from sidelight.training.measuring import (
    FLATTERING,
    calibrate_examples,
    trained_texts,
    warn_of_trained_texts,
)

if TYPE_CHECKING:
    from sidelight.probes.probe import Probe

# With fewer texts, recalibration makes a probe worse.
LEAST_LABELLED = 30
LEAST_PER_SIDE = 10
# A metric that is worse by this much is reported.
_NOTICEABLE = 0.01


@dataclass(frozen=True)
class Recalibrated:
    """The result of a recalibration.

    Attributes:
        probe: The new probe; its record states what it was recalibrated on.
        reports: Metrics before and after, on the new texts if there are any, each calibrated on the
            other texts.
    """

    probe: "Probe"
    reports: tuple[Report, Report] | None


def recalibrate(
    probe: "Probe",
    examples: LabelledExamples | None = None,
    logits: Float[np.ndarray, "text output"] | None = None,
    *,
    rule: ThresholdRule | None = None,
) -> Recalibrated:
    """Fit a probe to new traffic without changing its mechanism.

    Args:
        probe: The trained or previously recalibrated probe.
        examples: Labelled texts of the new traffic, for calibration and thresholds as in training.
            None only moves the thresholds.
        logits: The probe's logits of each text.
        rule: Objective of the thresholds; None keeps the previous one.

    Raises:
        SidelightError: The probe labels spans, there are too few texts, or it was trained on them.
    """
    rule = rule or ThresholdRule.parse(probe.card.training.threshold_rule)
    require_recalibratable(probe.card, rule, by_texts=examples is not None)
    if examples is None or logits is None:
        return _follow_rule(probe, rule)
    require_new_texts(probe.card, examples)
    return _follow_labels(probe, examples, logits, rule)


def require_recalibratable(card: ProbeCard, rule: ThresholdRule | None, *, by_texts: bool) -> None:
    """Refuse a probe without thresholds for whole texts, or without data to choose them on.

    Raises:
        SidelightError: The probe labels spans, has no threshold for the rule, or has no stored
            curve.
    """
    if card.spans is not None:
        raise SidelightError(
            f"Probe '{card.name}' labels spans, but recalibration applies only to verdicts on "
            "whole texts. Retrain the probe with your recent texts or another --threshold."
        )
    require_thresholds(card.task, rule or F1)
    if not by_texts and not card.task.flaggable:
        raise SidelightError(
            f"Probe '{card.name}' has several classes and predicts the most probable one, so it "
            "has no threshold. Name texts to recalibrate it on (--data)."
        )
    if not by_texts and not card.training.curves:
        raise SidelightError(
            f"Probe '{card.name}' has no stored operating curve to choose thresholds from. Name "
            "labelled texts to recalibrate it on (--data), or retrain it."
        )


def require_new_texts(card: ProbeCard, examples: LabelledExamples) -> None:
    """Refuse texts that are too few to calibrate on, or that the probe was trained on.

    Raises:
        SidelightError: There are too few texts in total or of a label, or the probe was trained on
            all of them.
    """
    texts = len(examples)
    counts = examples.count_by_label
    most = texts - LEAST_PER_SIDE
    short = {
        label: counts[label]
        for label in card.task.flaggable
        if not LEAST_PER_SIDE <= counts[label] <= most
    }
    if texts < LEAST_LABELLED or short:
        counted = "".join(f", {count} of them '{label}'" for label, count in short.items())
        raise SidelightError(
            f"Too few labelled texts to recalibrate on: got {texts}{counted}. At least "
            f"{LEAST_LABELLED} are needed, including {LEAST_PER_SIDE} with and {LEAST_PER_SIDE} "
            "without each label. Label more texts."
        )
    trained = card.training.training
    is_training_file = examples.content_hash in (trained.sha256, trained.input_sha256)
    if is_training_file or trained_texts(card.training, examples) == texts:
        raise SidelightError(
            f"Probe '{card.name}' was trained on these texts, so its scores on them are too "
            "optimistic. Training has already calibrated it on held-out texts. Give texts from "
            "the new traffic."
        )


def _recorded(
    probe: "Probe",
    rule: ThresholdRule,
    text_thresholds: Sequence[float],
    entry: Recalibration,
    **fitted: Any,
) -> "Probe":
    """The probe with the fitted fields, and an entry in its training record.

    Args:
        probe: The probe before recalibration.
        rule: Objective of the thresholds.
        text_thresholds: Thresholds from the rule without background traffic.
        entry: Record of this recalibration, in addition to the previous state.
        fitted: The new calibration and thresholds.
    """
    record = probe.card.training
    traffic = record.traffic
    if traffic is not None and len(traffic.background):
        calibration = fitted.get("calibration", probe.calibration)
        flagged = traffic.background.count_flagged(probe.task, text_thresholds, calibration, rule)
        traffic = replace(traffic, flagged=flagged)
    before = {
        "version": probe.version,
        "calibration": probe.calibration,
        "thresholds": probe.thresholds,
    }
    added = {
        "threshold_rule": str(rule),
        "traffic": traffic,
        "recalibrations": (*record.recalibrations, entry.model_copy(update=before)),
    }
    # It was fitted to the previous probabilities.
    return probe.changed(**fitted, judge_fit=None, training=record.model_copy(update=added))


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _follow_labels(
    probe: "Probe",
    examples: LabelledExamples,
    logits: Float[np.ndarray, "text output"],
    rule: ThresholdRule,
) -> Recalibrated:
    task, labels = probe.task, examples.labels
    kind = suggested_calibration(task)
    old = probe.calibration.apply(logits)
    before = evaluate(decide(task, old, labels, thresholds=probe.thresholds))
    calibrated = calibrate_examples(
        logits,
        examples,
        kind=kind,
        rule=rule,
        around=probe.calibration.scale,
        background=probe.card.background,
    )
    after = calibrated.report
    entry = Recalibration(
        date=_today(),
        what=f"calibrated by {kind} on {len(examples):,} labelled texts",
        before=before,
        texts=calibrated.texts(examples),
    )
    losses = log_losses(task, old, labels)
    metrics: dict[str, tuple[float | None, float | None]] = {
        "log loss": (float(losses.mean()), float(calibrated.losses.mean()))
    }
    # Another objective leads to different decisions.
    if str(rule) == probe.card.training.threshold_rule:
        for name, metric in (("accuracy", "accuracy"), ("F1", "f1")):
            metrics[name] = before.metrics[metric].value, after.metrics[metric].value
    warn_of_trained_texts(probe.card.training, examples)
    if not calibrated.folds:
        warn(FLATTERING)
    warn_of_few_texts(task, examples.count_by_label, len(examples), rule)
    _warn_of_worse(metrics)
    _warn_of_judge_fit(probe)
    fitted = {"calibration": calibrated.calibration, "thresholds": after.thresholds}
    recorded = _recorded(probe, rule, calibrated.text_thresholds, entry, **fitted)
    return Recalibrated(recorded, (before, after))


def _warn_of_judge_fit(probe: "Probe") -> None:
    """Warn that recalibration invalidates the fit to a judge."""
    fit = probe.card.judge_fit
    if fit is not None:
        warn(
            f"The new probe is no longer fitted to judge {fit.model}: the fit applied to the old "
            "probabilities and thresholds. Run `sidelight eval --judge` to fit it again."
        )


def _warn_of_worse(metrics: Mapping[str, tuple[float | None, float | None]]) -> None:
    """Warn about metrics that are worse than before."""
    worse = [
        f"{name} {before:.3f} before, {after:.3f} now"
        for name, (before, after) in metrics.items()
        if before is not None and after is not None
        if (after - before if name == "log loss" else before - after) >= _NOTICEABLE
    ]
    if worse:
        warn(
            f"On these texts, the new probe is worse than the old one: {'; '.join(worse)}. Keep "
            "the old probe, or label more texts."
        )


def _follow_rule(probe: "Probe", rule: ThresholdRule) -> Recalibrated:
    curves = probe.card.training.curves
    text_thresholds = tuple(curve.threshold(rule) for curve in curves.values())
    thresholds = probe.card.background.thresholds_at_fpr(text_thresholds, probe.calibration, rule)
    positives = {label: curve.positives for label, curve in curves.items()}
    texts = max(curve.positives + curve.negatives for curve in curves.values())
    warn_of_few_texts(probe.task, positives, texts, rule)
    entry = Recalibration(date=_today(), what=f"thresholds for {rule}")
    recorded = _recorded(probe, rule, text_thresholds, entry, thresholds=thresholds)
    _warn_of_judge_fit(probe)
    return Recalibrated(recorded, None)
