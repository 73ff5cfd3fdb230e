"""A probe fitted to new traffic without training: its calibration and its thresholds.

Labelled texts give both anew. Without texts, thresholds move along the curves that the probe was
last calibrated with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from sidelight.data.evaluation import Report, evaluate
from sidelight.data.examples import LabelledExamples
from sidelight.errors import SidelightError
from sidelight.probes.manifest import Manifest
from sidelight.statistics.calibration import suggested_calibration
from sidelight.statistics.metrics import decide, log_losses
from sidelight.statistics.thresholds import (
    F1,
    ThresholdRule,
    require_thresholds,
    threshold_doubts,
)
from sidelight.training.measuring import (
    FLATTERING,
    calibrate_examples,
    describe_examples,
    trained_text_warnings,
    trained_texts,
)
from sidelight.training.traffic import Conversations

if TYPE_CHECKING:
    from sidelight.probes.probe import Probe

# With fewer texts a probe is better off as it is.
LEAST_LABELLED = 30
LEAST_PER_SIDE = 10
# Users are told where a figure is worse than before by this much.
_NOTICEABLE = 0.01


@dataclass(frozen=True)
class Recalibrated:
    """The result of a recalibration.

    Attributes:
        probe: For the new traffic; its record says what it was recalibrated on.
        figures: Before and after, on the new texts if there are some; each text is calibrated
            without it.
        warnings: What the user should know, one sentence each.
    """

    probe: "Probe"
    figures: tuple[Report, Report] | None
    warnings: tuple[str, ...]


def recalibrate(
    probe: "Probe",
    examples: LabelledExamples | None = None,
    logits: Float[np.ndarray, "text output"] | None = None,
    *,
    rule: ThresholdRule | None = None,
) -> Recalibrated:
    """Fits a probe to new traffic; its mechanism stays as it is.

    Args:
        probe: As it was trained, or recalibrated before.
        examples: Labelled texts of the new traffic, which calibrate and choose the thresholds as
            in training. None moves thresholds only.
        logits: The probe's, of each text.
        rule: What thresholds are chosen for; None is what they were chosen for before.

    Raises:
        SidelightError: The probe labels spans, there are too few texts, or it was trained on them.
    """
    rule = rule or ThresholdRule.parse(probe.history.threshold_rule)
    require_recalibratable(probe, rule, by_texts=examples is not None)
    if examples is None or logits is None:
        return _follow_rule(probe, rule)
    require_new_texts(probe, examples)
    return _follow_labels(probe, examples, logits, rule)


def require_recalibratable(
    probe: "Probe | Manifest", rule: ThresholdRule | None, *, by_texts: bool
) -> None:
    """Refuses a probe without thresholds of whole texts, or without what they would be chosen by.

    Raises:
        SidelightError: The probe labels spans, has no threshold for the rule, or keeps no curve.
    """
    if probe.spans is not None:
        raise SidelightError(
            f"Probe '{probe.name}' labels spans, and recalibration fits verdicts on whole texts. "
            "Train it again, with your recent texts or another --threshold."
        )
    require_thresholds(probe.task, rule or F1)
    if not by_texts and probe.task.kind == "multiclass":
        raise SidelightError(
            f"Probe '{probe.name}' has several classes, of which the most probable one wins, "
            "without a threshold. Name texts to recalibrate it on (--data)."
        )
    if not by_texts and not probe.history.curves:
        raise SidelightError(
            f"Probe '{probe.name}' keeps no curve to choose thresholds on. Name labelled texts to "
            "recalibrate it on (--data), or train it again."
        )


def require_new_texts(probe: "Probe | Manifest", examples: LabelledExamples) -> None:
    """Refuses texts that are too few to calibrate on, or that trained the probe.

    Raises:
        SidelightError: There are too few, as a whole or of a label, or all of them trained it.
    """
    texts = len(examples)
    counts = examples.count_by_label
    judged = () if probe.task.kind == "multiclass" else probe.task.output_labels
    most = texts - LEAST_PER_SIDE
    short = {
        label: counts[label] for label in judged if not LEAST_PER_SIDE <= counts[label] <= most
    }
    if texts < LEAST_LABELLED or short:
        counted = "".join(f", {count} of them '{label}'" for label, count in short.items())
        raise SidelightError(
            f"Too few labelled texts to recalibrate on: got {texts}{counted}; wanted "
            f"{LEAST_LABELLED} or more, with and without each label {LEAST_PER_SIDE} or more. "
            "Label more texts."
        )
    trained = probe.history.training
    is_training_file = examples.content_hash in (trained.sha256, trained.given_sha256)
    if is_training_file or trained_texts(probe.history, examples) == texts:
        raise SidelightError(
            f"Probe '{probe.name}' was trained on these texts, and scores them too well. "
            "Training has calibrated it by left-out texts already; give texts of the new traffic."
        )


def _recorded(
    probe: "Probe",
    fitted: "Probe",
    rule: ThresholdRule,
    entry: Mapping[str, Any],
    thresholds: Sequence[float],
) -> "Probe":
    """The fitted probe, with an entry in its record.

    Args:
        probe: As it was before.
        fitted: With its new calibration and thresholds.
        rule: What the thresholds were chosen for.
        entry: What is recorded of this recalibration.
        thresholds: What the rule gives without ordinary traffic.
    """
    kept = Conversations.kept(probe)
    record: dict[str, Any] = {**probe.record, "threshold_rule": str(rule)}
    if len(kept.logits):
        flagged = kept.count_flagged(probe.task, thresholds, fitted.calibration, rule)
        record["traffic"] = {**record["traffic"], "flagged": flagged}
    before = {
        "version": probe.version,
        "calibration": asdict(probe.calibration),
        "thresholds": list(probe.thresholds),
    }
    entry = {"date": datetime.now(UTC).date().isoformat(), "from": before, **entry}
    earlier = record["recalibrations"] if probe.history.recalibrations else []
    record["recalibrations"] = [*earlier, entry]
    return replace(fitted, record=record, version="")


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
    made = calibrate_examples(
        logits,
        examples,
        kind=kind,
        rule=rule,
        around=probe.calibration.scale,
        ordinary=Conversations.kept(probe),
    )
    after = made.report
    fitted = replace(probe, calibration=made.calibration, thresholds=after.thresholds)
    entry = {
        "what": f"calibrated by {kind} on {len(examples):,} labelled texts",
        **describe_examples(examples),
        "before": before.to_dict(),
        "after": after.to_dict(),
        "curves": made.record()["curves"],
    }
    losses = log_losses(task, old, labels)
    figures: dict[str, tuple[float | None, float | None]] = {
        "log loss": (float(losses.mean()), float(made.losses.mean()))
    }
    # Another rule wants other decisions.
    if str(rule) == probe.history.threshold_rule:
        for name, metric in (("accuracy", "accuracy"), ("F1", "f1")):
            figures[name] = before.metrics[metric].value, after.metrics[metric].value
    doubts = (
        *trained_text_warnings(probe.history, examples),
        *(() if made.folds else (FLATTERING,)),
        *threshold_doubts(task, examples.count_by_label, len(examples), rule),
        *_metric_warnings(figures),
    )
    recorded = _recorded(probe, fitted, rule, entry, made.alone)
    return Recalibrated(recorded, (before, after), doubts)


def _metric_warnings(figures: Mapping[str, tuple[float | None, float | None]]) -> list[str]:
    """Figures that are worse than before, in one sentence."""
    worse = [
        f"{name} {before:.3f} before, {after:.3f} now"
        for name, (before, after) in figures.items()
        if before is not None and after is not None
        if (after - before if name == "log loss" else before - after) >= _NOTICEABLE
    ]
    if not worse:
        return []
    return [
        f"The new probe is worse on these texts than the old one: {'; '.join(worse)}. Keep the old "
        "one, or label more texts."
    ]


def _follow_rule(probe: "Probe", rule: ThresholdRule) -> Recalibrated:
    curves = probe.history.curves
    alone = tuple(curve.threshold(rule) for curve in curves.values())
    thresholds = Conversations.kept(probe).quiet_thresholds(alone, probe.calibration, rule)
    positives = {label: curve.positives for label, curve in curves.items()}
    texts = max(curve.positives + curve.negatives for curve in curves.values())
    doubts = threshold_doubts(probe.task, positives, texts, rule)
    fitted = replace(probe, thresholds=thresholds)
    kept = probe.history.reference.model_dump(mode="json", include={"curves"})
    entry = {"what": f"thresholds for {rule}", **kept}
    return Recalibrated(_recorded(probe, fitted, rule, entry, alone), None, (*doubts,))
