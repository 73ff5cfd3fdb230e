"""The threshold of a label: its rule, and the operating curve that it is chosen on."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from pydantic import ConfigDict

from sidelight.errors import SidelightError, warn
from sidelight.statistics.metrics import checked_labels
from sidelight.types import AnyArray, Flags, Numbers, Task, Values

# Scores this close to 0 or 1 count as equal, because no threshold within (0, 1) can separate them.
_SATURATED = 1e-9
# Maximum number of points of a stored curve.
POINTS = 128
# False-positive rates for which a threshold is reported.
RATES = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1)
# With fewer positive texts, the threshold varies between draws.
ENOUGH_POSITIVES = 30
# Weight of the calibrated probabilities, as a number of texts of the rarer class. On draws of 60 to
# 1,000 texts of three data sets, F1 on other texts is 0.003 to 0.011 higher than with labels alone.
PRIOR_TEXTS = 100.0

_FORMS = (
    "f1, fpr=0.01 (the highest recall that flags at most this share of negative texts), "
    "recall=0.95 (the fewest false positives at a recall of at least this share), or cost=10:1 "
    "(a miss costs 10 times as much as a false positive)"
)
_NUMBER = r"\d*\.?\d+(?:[eE]-?\d+)?"


@dataclass(frozen=True)
class ThresholdRule:
    """The aim of a threshold.

    Attributes:
        kind: ``f1``: the highest F1. ``fpr``: the most recall at a bounded false-positive rate.
            ``recall``: the fewest false positives at a recall. ``cost``: the lowest cost.
        value: The false-positive rate, the recall, or the cost of a miss in false positives.
    """

    kind: Literal["f1", "fpr", "recall", "cost"] = "f1"
    value: float = 1.0

    @staticmethod
    def parse(text: str) -> "ThresholdRule":
        """Read ``f1``, ``fpr=0.01``, ``recall=0.95`` or ``cost=10:1``.

        Raises:
            SidelightError: It is none of them.
        """
        if text == "f1":
            return ThresholdRule()
        rate = re.fullmatch(rf"(fpr|recall)=({_NUMBER})", text)
        if rate and 0 < float(rate[2]) < 1:
            return ThresholdRule("fpr" if rate[1] == "fpr" else "recall", float(rate[2]))
        cost = re.fullmatch(rf"cost=({_NUMBER}):({_NUMBER})", text)
        if cost and 0 < float(cost[1]) < math.inf and 0 < float(cost[2]) < math.inf:
            return ThresholdRule("cost", float(cost[1]) / float(cost[2]))
        raise SidelightError(
            f"Cannot read the threshold '{text}'. Write {_FORMS}. Rates lie between 0 and 1; "
            "costs are greater than 0."
        )

    def __str__(self) -> str:
        """The text that ``parse`` reads."""
        if self.kind == "f1":
            return "f1"
        if self.kind == "cost":
            ratio = f"1:{1 / self.value:.12g}" if self.value < 1 else f"{self.value:.12g}:1"
            return f"cost={ratio}"
        return f"{self.kind}={self.value:.12g}"


F1 = ThresholdRule()


class OperatingPoint(NamedTuple):
    """A threshold, and how many positive and negative texts reach it."""

    threshold: float
    found: int
    flagged: int


@dataclass(frozen=True)
class OperatingCurve:
    """Texts that each threshold of a label flags, counted where the probe was not trained.

    The first point flags the fewest texts, none where that is possible, and the last one the most.

    Attributes:
        thresholds: Strictly falling.
        true_positives: Positive texts that reach the threshold.
        false_positives: Negative texts that reach it.
        expected: The sum of the probabilities of the texts that reach it: the positives that the
            calibration expects among them.
        positives: All positive texts.
        negatives: All negative texts.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    thresholds: tuple[float, ...]
    true_positives: tuple[int, ...]
    false_positives: tuple[int, ...]
    expected: tuple[float, ...]
    positives: int
    negatives: int

    def __post_init__(self) -> None:
        points = list(self.thresholds)
        is_falling = points == sorted(set(points), reverse=True)
        if not points or not is_falling or not 0 <= points[-1] <= points[0] <= 1:
            raise ValueError("thresholds must decrease strictly within 0 to 1")
        totals = (self.positives, self.negatives, self.positives + self.negatives + 1)
        rising = (self.true_positives, self.false_positives, self.expected)
        for counts, total in zip(rising, totals, strict=True):
            bounded = [0, *counts, total]
            if len(counts) != len(points) or bounded != sorted(bounded):
                raise ValueError(
                    "each threshold needs a count, and counts must not decrease or exceed the total"
                )

    @staticmethod
    def of(
        scores: Float[Values, " text"], holds: Bool[Flags, " text"], *, points: int = POINTS
    ) -> "OperatingCurve":
        """The curve of some texts; each threshold lies midway between neighbouring scores."""
        # Saturated scores make one step at either end.
        within = np.clip(scores, _SATURATED, 1 - _SATURATED)
        steps, step = np.unique(-within, return_inverse=True)  # falling scores
        heights = np.append(-steps, 0.0)
        counts = np.stack(
            [
                np.bincount(step, weights=holds),
                np.bincount(step, weights=~holds),
                np.bincount(step, weights=scores),
            ]
        ).cumsum(axis=1)
        thresholds = (heights[:-1] + heights[1:]) / 2
        if heights[0] < 1 - _SATURATED:
            thresholds = np.append((1 + heights[0]) / 2, thresholds)
            counts = np.hstack([np.zeros((3, 1)), counts])
        if heights[-2] <= _SATURATED:
            thresholds, counts = thresholds[:-1], counts[:, :-1]
        positives, negatives = int(holds.sum()), int((~holds).sum())
        points_drawn = _spread(
            counts[0] / max(positives, 1), counts[1] / max(negatives, 1), points=points
        )
        return OperatingCurve(
            tuple(thresholds[points_drawn].tolist()),
            tuple(counts[0, points_drawn].astype(int).tolist()),
            tuple(counts[1, points_drawn].astype(int).tolist()),
            tuple(counts[2, points_drawn].round(4).tolist()),
            positives,
            negatives,
        )

    def threshold(self, rule: ThresholdRule = F1, *, prior_texts: float = PRIOR_TEXTS) -> float:
        """The threshold that satisfies the rule best; the middle one in a tie.

        Without a positive text, it is 0.5. If no threshold respects the false-positive rate or
        reaches the recall, it is the highest or the lowest.

        Each text counts as positive by a weighted mean of its label and its probability. The
        probability has the weight of ``prior_texts`` texts of the rarer class, so with many texts
        the labels dominate, and with few texts the calibration does. With the calibration alone,
        the best cost is at Bayes' threshold and the best F1 at half its value (Lipton et al. 2014).
        """
        if self.positives == 0:
            return 0.5
        weight = prior_texts / (prior_texts + min(self.positives, self.negatives))
        labels = np.array(self.true_positives, dtype=float)
        expected = np.array(self.expected)
        flagged = labels + np.array(self.false_positives)
        true = (1 - weight) * labels + weight * expected
        texts = self.positives + self.negatives
        positives = (1 - weight) * self.positives + weight * self.expected[-1]
        recall = true / max(positives, _SATURATED)
        alarms = (flagged - true) / max(texts - positives, _SATURATED)
        share = positives / texts
        if rule.kind == "fpr":
            point = max(int((alarms <= rule.value).sum()) - 1, 0)
        elif rule.kind == "recall":
            point = min(int((recall < rule.value).sum()), len(recall) - 1)
        else:
            hits, false = share * recall, (1 - share) * alarms
            utility = (
                2 * hits / (share + hits + false)
                if rule.kind == "f1"
                else -(rule.value * (share - hits) + false)
            )
            best = np.flatnonzero(utility >= utility.max() - 1e-12)
            point = int(best[len(best) // 2])
        return self.thresholds[point]

    def operating_points(self, rates: Sequence[float] = RATES) -> list[OperatingPoint]:
        """For each false-positive rate, the threshold with the highest recall within that rate.

        Rates that lead to the same decisions share one point.
        """
        alarms = np.array(self.false_positives)
        found: dict[int, OperatingPoint] = {}
        for rate in rates:
            within = np.flatnonzero(alarms <= rate * self.negatives)
            if len(within):
                point = int(within[-1])
                found[point] = OperatingPoint(
                    self.thresholds[point], self.true_positives[point], self.false_positives[point]
                )
        return [*found.values()]

    def at(self, threshold: float) -> tuple[int, int]:
        """Positive and negative texts flagged at the point closest to a threshold."""
        point = int(np.abs(np.array(self.thresholds) - threshold).argmin())
        return self.true_positives[point], self.false_positives[point]


def _spread(
    recall: Float[Values, " point"], alarms: Float[Values, " point"], *, points: int
) -> Int[Numbers, " kept"]:
    """At most this many points, including both ends.

    They are evenly spaced by the arcsine of the rates' roots, whose sampling error is the same for
    all rates, so that small rates of false positives and high recalls keep their detail.
    """
    if len(recall) <= points:
        return np.arange(len(recall))
    place = np.arcsin(np.sqrt(recall.clip(0, 1))) + np.arcsin(np.sqrt(alarms.clip(0, 1)))
    wanted = np.linspace(place[0], place[-1], points)
    indices = np.searchsorted(place, wanted[:-1])
    return np.unique(np.append(indices.clip(0, len(place) - 1), len(place) - 1))


def operating_curves(
    task: Task, probabilities: Float[Values, "text output"], labels: Shaped[AnyArray, "..."]
) -> dict[str, OperatingCurve]:
    """The operating curve of each label that has a threshold; empty for a multi-class task.

    Args:
        task: The classes.
        probabilities: Calibrated probabilities of validation texts, never of test texts.
        labels: [text] of class numbers, or [text, label] of 0 and 1 for a multi-label task.

    Raises:
        SidelightError: As `checked_labels`.
    """
    holds = task.targets(checked_labels(task, probabilities, labels))
    outputs = zip(probabilities.T.astype(np.float64), holds.T, strict=True)
    by_label = dict(zip(task.output_labels, outputs, strict=True))
    return {label: OperatingCurve.of(*by_label[label]) for label in task.flaggable}


def choose_thresholds(
    task: Task,
    probabilities: Float[Values, "text output"],
    labels: Shaped[AnyArray, "..."],
    *,
    rule: ThresholdRule = F1,
) -> tuple[float, ...]:
    """Choose the threshold of each label: one for a binary task, none for a multi-class task.

    The arguments are those of ``operating_curves``, and the objective of each threshold.
    """
    curves = operating_curves(task, probabilities, labels)
    return tuple(curve.threshold(rule) for curve in curves.values())


def require_thresholds(task: Task, rule: ThresholdRule) -> None:
    """Refuse a rule for a multi-class task, which has no thresholds.

    Raises:
        SidelightError: The task has no thresholds.
    """
    if not task.flaggable and rule != F1:
        raise SidelightError(
            f"Got the threshold '{rule}', but a task with {len(task.labels)} classes predicts "
            "the most probable one and has no threshold. Leave --threshold out."
        )


def warn_of_few_texts(
    task: Task, positives: Mapping[str, int], texts: int, rule: ThresholdRule
) -> bool:
    """Warn about thresholds that are based on too few texts; return whether it did.

    Args:
        task: The classes.
        positives: Number of texts with each label.
        texts: Number of texts that thresholds are chosen on.
        rule: Objective of the thresholds.
    """
    classified = {label: positives[label] for label in task.flaggable}
    few = {label: count for label, count in classified.items() if count < ENOUGH_POSITIVES}
    if few:
        named = ", ".join(f"{count} of '{label}'" for label, count in few.items())
        warn(
            f"Too few positive validation texts for a reliable threshold: {named} (recommended: "
            f"{ENOUGH_POSITIVES}). Recall on new texts may be much higher or lower. Label more "
            "of these texts first."
        )
    negatives = texts - max(classified.values(), default=0)
    # With fewer negatives, zero flagged texts are no evidence for the rate (rule of three).
    wanted = math.ceil(3 / rule.value) if rule.kind == "fpr" else 0
    if negatives < wanted:
        warn(
            f"{negatives} negative texts are too few to estimate a false-positive rate of "
            f"{rule.value:g}, which needs at least {wanted}. Add negative texts, or choose a "
            "higher rate."
        )
    return bool(few) or negatives < wanted
