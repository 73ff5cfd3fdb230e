"""How good a probe and a judge are together, by the share of texts that the judge is asked about.

The judge's answers are known here; ``judges.answers`` asks. All figures are out of fold.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from sidelight.data.evaluation import Estimate
from sidelight.data.examples import LabelledExamples
from sidelight.errors import SidelightError
from sidelight.judges.settings import JUDGE_THRESHOLD, JudgeSettings
from sidelight.probes.card import JudgeFit, ProbeCard
from sidelight.probes.probe import Probe
from sidelight.statistics.combination import fit_combination
from sidelight.statistics.metrics import decide, measure_resamples
from sidelight.statistics.thresholds import OperatingCurve, ThresholdRule
from sidelight.training.measuring import describe_examples, trained_texts
from sidelight.training.validation import FOLDS, Folds, complete_folds
from sidelight.types import Flags, Task, Values

SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
# A share of questions without an answer that the figures bear.
_MOST_UNANSWERED = 0.05
# With fewer deferred texts of either label, a fit moves from draw to draw.
_LEAST_DEFERRED = 10
_RESAMPLES = 1000
_METRICS = ("recall_at_1pct_fpr", "auprc")

Draws = Mapping[str, Float[Values, " draw"]]


@dataclass(frozen=True)
class DeferralPoint:
    """A probe and a judge together, if this share is deferred.

    Attributes:
        share: Of background traffic, as in ``defer``; 1: every text; None: the probe alone.
        threshold: The probability from which a text is deferred.
        deferred: How many of the texts are.
        recall_at_1pct_fpr: At 1 % false positives; only deferred texts are flagged.
        auprc: Of the combined probabilities, and of the probe's where none is deferred.
    """

    share: float | None
    threshold: float
    deferred: int
    recall_at_1pct_fpr: Estimate
    auprc: Estimate


@dataclass(frozen=True)
class Decisions:
    """Texts that are flagged at a threshold.

    Attributes:
        found: Positive ones.
        flagged: Others.
    """

    found: int
    flagged: int


@dataclass(frozen=True)
class DeferralReport:
    """The figures of a probe and a judge on labelled texts.

    Attributes:
        rows: Texts with an answer, or that needed none.
        positives: How many of them have the label.
        unanswered: Texts that the judge gave no verdict on; they are left out.
        probe: The probe alone.
        points: By share; the last one defers every text, if the judge was asked about all.
        judge: The judge alone; None: it was not asked about all texts.
        gain: In recall at 1 % false positives, of deferring the fit's share over the probe alone.
        judge_gain: Likewise, of the judge alone over deferring the share.
        fit: What a card keeps.
        decisions: At the thresholds: of the ``probe``, of the ``fit``, of the judge ``without a
            fit``.
    """

    rows: int
    positives: int
    unanswered: int
    probe: DeferralPoint
    points: tuple[DeferralPoint, ...]
    judge: DeferralPoint | None
    gain: Estimate
    judge_gain: Estimate | None
    fit: JudgeFit
    decisions: Mapping[str, Decisions]

    @property
    def findings(self) -> list[str]:
        """What follows, in one or two sentences."""
        share, gain, gained = f"{self.fit.share:.3g}", self.gain, self.judge_gain
        if (gain.low or 0) > 0:
            lines = [
                f"Deferring a share of {share} gains {_signed(gain)} of recall at 1 % false "
                "positives over the probe alone."
            ]
        else:
            lines = [
                f"The judge adds nothing that these texts could show: deferring a share of {share} "
                f"changes recall at 1 % false positives by {_signed(gain)}. Serve the probe alone, "
                "or try another judge or criterion."
            ]
        if gained is not None and (gained.low or 0) > 0:
            lines.append(
                f"The judge alone would be better, by {_signed(gained)}: ask it about every text, "
                "if its cost allows, or defer a larger share."
            )
        return lines

    def plot(self, folder: Path, *, title: str) -> Path:
        """Draws recall against the share of texts that are deferred."""
        from sidelight.data.plots import plot_deferral

        points = [self.probe, *self.points]
        estimates = [point.recall_at_1pct_fpr for point in points]
        judge_recall = self.judge and self.judge.recall_at_1pct_fpr.value
        return plot_deferral(
            [point.deferred / self.rows for point in points],
            [
                (estimate.value or 0, estimate.low or 0, estimate.high or 0)
                for estimate in estimates
            ],
            probe=self.probe.recall_at_1pct_fpr.value or 0,
            judge=judge_recall,
            path=folder / "second_stage.png",
            title=title,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "rows": self.rows,
            "positives": self.positives,
            "unanswered": self.unanswered,
            "probe": _point_json(self.probe),
            "points": [_point_json(point) for point in self.points],
            "judge": self.judge and _point_json(self.judge),
            "gain": self.gain.to_dict(),
            "judge_gain": self.judge_gain and self.judge_gain.to_dict(),
            "fit": self.fit.model_dump(mode="json"),
            "decisions": {name: asdict(counts) for name, counts in self.decisions.items()},
            "findings": self.findings,
        }


def _signed(estimate: Estimate) -> str:
    return f"{estimate.value or 0:+.3f} [{estimate.low or 0:+.3f}, {estimate.high or 0:+.3f}]"


def _point_json(point: DeferralPoint) -> dict[str, Any]:
    metrics = {name: getattr(point, name).to_dict() for name in _METRICS}
    counted = {"share": point.share, "threshold": point.threshold, "deferred": point.deferred}
    return {**counted, **metrics}


def require_fittable(card: ProbeCard, examples: LabelledExamples, share: float) -> None:
    """Refuses what no fit could be made of, before the judge is asked.

    Raises:
        SidelightError: The probe has several labels or finds spans, was trained on all texts, or
            has no background to take a share of; or there are too few texts of a label.
    """
    if card.task.kind != "binary" or card.spans is not None:
        what = "labels spans" if card.spans is not None else f"has the task {card.task.kind}"
        raise SidelightError(
            f"Probe '{card.name}' {what}, and a judge is fitted to a probe that says whether one "
            "label holds. Leave --judge out: without a fit, the judge decides alone."
        )
    if trained_texts(card.training, examples) == len(examples):
        raise SidelightError(
            f"Probe '{card.name}' was trained on these texts, and scores them too well to be "
            "fitted to a judge. Give labelled texts that it has not seen."
        )
    if not complete_folds(examples):
        counts = ", ".join(f"{n} '{label}'" for label, n in examples.count_by_label.items())
        raise SidelightError(
            f"Too few texts to fit a judge: got {counts}; wanted {FOLDS} distinct ones of each "
            "label or more, better 100. Label more texts."
        )
    if share and not len(card.background):
        raise SidelightError(
            f"Probe '{card.name}' has no record of background traffic, so a share of it cannot be "
            "deferred. Recalibrate it with --background, or defer what it flags with --share 0."
        )


def defer_thresholds(probe: Probe, share: float, most: float = 1.0) -> dict[float, float]:
    """For each share, the probability from which a policy defers a text, as ``BoundRule`` does.

    Args:
        probe: The probe; without background conversations, nothing lies between 0 and all.
        share: One that is wanted beside ``SHARES``.
        most: The largest; 1 is every text.
    """
    (label,), (threshold,) = probe.task.output_labels, probe.thresholds
    has_background = len(probe.card.background) > 0
    shares = sorted({*SHARES, share}) if has_background else [0.0]
    found = {
        each: min(threshold, probe.share_threshold(label, each)) if each else threshold
        for each in shares
        if each <= max(most, share)
    }
    return found | ({1.0: 0.0} if most >= 1 else {})


def combined_out_of_fold(
    scores: Float[Values, " row"],
    answers: Float[Values, " row"],
    holds: Bool[Flags, " row"],
    is_deferred: Bool[Flags, " row"],
    folds: Folds,
) -> Float[Values, " row"]:
    """Of deferred texts the combined probability, by a fit to the other folds; of others 0.

    Args:
        scores: The probe's probabilities.
        answers: The judge's; those of texts that are not deferred are not read.
        holds: Whether the label holds.
        is_deferred: Which texts the judge is asked about.
        folds: Row numbers of each.
    """
    found = np.zeros(len(scores))
    for fold in folds:
        is_left_out = np.zeros(len(found), dtype=np.bool_)
        is_left_out[fold] = True
        fitted, used = is_deferred & ~is_left_out, is_deferred & is_left_out
        combination = fit_combination(scores[fitted], answers[fitted], holds[fitted])
        found[used] = combination.apply(scores[used], answers[used])
    return found


def _measure(task: Task, probabilities: Float[Values, " row"], holds: Bool[Flags, " row"]) -> Draws:
    decided = decide(task, probabilities[:, None], holds.astype(np.int64), thresholds=(0.5,))
    return measure_resamples(decided, resamples=_RESAMPLES, seed=0)


def fit_judge(
    probe: Probe,
    examples: LabelledExamples,
    scores: Float[Values, " row"],
    answers: Float[Values, " row"],
    *,
    judge: JudgeSettings,
    thresholds: Mapping[float, float],
    share: float,
    rule: ThresholdRule | None = None,
) -> DeferralReport:
    """Fits how a probe and a judge decide together, and measures it at every share.

    Args:
        probe: The probe.
        examples: Labelled texts that it was not trained on.
        scores: Its calibrated probabilities of them.
        answers: The judge's probabilities; NaN: there is none.
        judge: Which judge answered.
        thresholds: By share of background traffic, the score from which a text is deferred; the
            judge was asked about all texts that reach the lowest.
        share: The one of these that the fit is for.
        rule: What the threshold is chosen for; None: what the probe's was.

    Raises:
        SidelightError: Too many questions have no answer, or too few texts are deferred.
    """
    rule = rule or ThresholdRule.parse(probe.card.training.threshold_rule)
    is_asked = scores >= min(thresholds.values())
    is_answered = _answered(is_asked, answers)
    examples = examples.select(np.flatnonzero(is_answered).tolist())
    scores, answers, holds = scores[is_answered], answers[is_answered], examples.labels == 1
    folds, measure = complete_folds(examples), partial(_measure, probe.task, holds=holds)
    combine = partial(combined_out_of_fold, scores, answers, holds, folds=folds)
    probe_only = measure(scores)
    measured: dict[float, Draws] = {}
    points: list[DeferralPoint] = []
    for asked_share, threshold in sorted(thresholds.items()):
        is_deferred = scores >= threshold
        combined = combine(is_deferred)
        ranked = measure(np.where(is_deferred, combined, scores))
        recall = measure(combined)["recall_at_1pct_fpr"]
        measured[asked_share] = {**ranked, "recall_at_1pct_fpr": recall}
        points.append(_point(asked_share, threshold, int(is_deferred.sum()), measured[asked_share]))
    judge_only = measure(answers) if is_asked.all() else None
    is_deferred = scores >= thresholds[share]
    combined = combine(is_deferred)
    flags = {
        "probe": scores >= probe.thresholds[0],
        "fit": is_deferred & _flags(combined, holds, folds, rule),
        "without a fit": is_deferred & (answers >= JUDGE_THRESHOLD),
    }
    return DeferralReport(
        len(scores),
        int(holds.sum()),
        int((~is_answered).sum()),
        _point(None, 1.0, 0, probe_only),
        tuple(points),
        None if judge_only is None else _point(1.0, 0.0, len(scores), judge_only),
        _difference(measured[share], probe_only),
        None if judge_only is None else _difference(judge_only, measured[share]),
        JudgeFit(
            judge=judge.digest,
            model=judge.model,
            **_fitted(scores, answers, holds, combined, is_deferred, rule),
            share=share,
            texts=describe_examples(examples),
            recall=Estimate.of(measured[share]["recall_at_1pct_fpr"]),
            recall_of_probe=Estimate.of(probe_only["recall_at_1pct_fpr"]),
            date=datetime.now(UTC).date().isoformat(),
        ),
        {
            name: Decisions(int((asked_share & holds).sum()), int((asked_share & ~holds).sum()))
            for name, asked_share in flags.items()
        },
    )


def _answered(is_asked: Bool[Flags, " row"], answers: Float[Values, " row"]) -> Bool[Flags, " row"]:
    """The texts that need no answer or have one."""
    is_missing = is_asked & np.isnan(answers)
    missing, asked = int(is_missing.sum()), int(is_asked.sum())
    if missing > _MOST_UNANSWERED * asked:
        raise SidelightError(
            f"The judge gave no verdict on {missing} of {asked} texts, more than "
            f"{_MOST_UNANSWERED:.0%}, so nothing is fitted. Run the command again to ask about "
            "these alone; texts that are too long need a higher max_characters."
        )
    return ~is_missing


def _point(share: float | None, threshold: float, deferred: int, draws: Draws) -> DeferralPoint:
    recall, auprc = (Estimate.of(draws[name]) for name in _METRICS)
    return DeferralPoint(share, threshold, deferred, recall, auprc)


def _difference(one: Draws, another: Draws) -> Estimate:
    """In recall at 1 % false positives, paired by resample."""
    name = "recall_at_1pct_fpr"
    return Estimate.of(one[name] - another[name])


def _fitted(
    scores: Float[Values, " row"],
    answers: Float[Values, " row"],
    holds: Bool[Flags, " row"],
    combined: Float[Values, " row"],
    is_deferred: Bool[Flags, " row"],
    rule: ThresholdRule,
) -> dict[str, Any]:
    """The fit to all deferred texts; its threshold is chosen on out-of-fold probabilities."""
    deferred = int(is_deferred.sum())
    positives = int(holds[is_deferred].sum())
    if min(positives, deferred - positives) < _LEAST_DEFERRED:
        raise SidelightError(
            f"Of these texts, {positives} with the label and {deferred - positives} without it "
            f"would be deferred; wanted {_LEAST_DEFERRED} of each or more. Defer more with "
            "--share, or label more texts."
        )
    fitted = fit_combination(scores[is_deferred], answers[is_deferred], holds[is_deferred])
    curve = OperatingCurve.of(combined, holds)
    return {
        "weight": fitted.weight,
        "threshold": fitted.threshold(curve.threshold(rule)),
        "threshold_rule": str(rule),
        "deferred": deferred,
    }


def _flags(
    combined: Float[Values, " row"], holds: Bool[Flags, " row"], folds: Folds, rule: ThresholdRule
) -> Bool[Flags, " row"]:
    """The texts that are flagged, each at a threshold that the other folds gave."""
    flags = np.zeros(len(combined), dtype=np.bool_)
    for fold in folds:
        rest = np.setdiff1d(np.arange(len(combined)), fold)
        threshold = OperatingCurve.of(combined[rest], holds[rest]).threshold(rule)
        flags[fold] = combined[fold] >= threshold
    return flags
