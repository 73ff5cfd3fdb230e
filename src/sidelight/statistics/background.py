"""Background traffic: which thresholds let it pass, and what a probe flags of it.

Conversations lie in parts, and those of one source in one part. Each part is judged by a probe of
the other parts, at the threshold that lets these pass, so what is counted is of conversations, and
of sources, that set neither.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import Field, NonNegativeInt

from sidelight.statistics.calibration import Calibration
from sidelight.statistics.thresholds import ThresholdRule
from sidelight.types import Flags, Numbers, Task, Values, as_json

# The share of background conversations that may be flagged, unless a rule says otherwise. Of
# sources that it has never seen it flags more.
FALSE_ALARMS = 0.03
# No threshold is raised further.
_HIGHEST = 1 - 1e-9


@dataclass(frozen=True, eq=False)
class Conversations:
    """Background conversations, as a probe judges them.

    Attributes:
        logits: Out-of-fold, not rounded: a threshold may lie just above one of them.
        folds: The part of each.
    """

    logits: Annotated[Float[Values, "conversation output"], *as_json(np.float64, axes=2)]
    folds: Annotated[Int[Numbers, " conversation"], *as_json(np.int64, axes=1)]

    def __post_init__(self) -> None:
        if len(self.logits) != len(self.folds) or not np.isfinite(self.logits).all():
            raise ValueError("each conversation needs finite logits and a fold")

    def __len__(self) -> int:
        return len(self.folds)

    @staticmethod
    def none(outputs: int) -> "Conversations":
        """No conversation, where a probe has so many outputs."""
        return Conversations(np.empty((0, outputs)), np.empty(0, dtype=np.int64))

    def thresholds_at_fpr(
        self, thresholds: Sequence[float], calibration: Calibration, rule: ThresholdRule
    ) -> tuple[float, ...]:
        """Thresholds that flag little background traffic, unless the rule sets the cost of a miss.

        Each is raised until at most so many conversations reach it: the rate of ``fpr``, or else
        ``FALSE_ALARMS``. Labelled texts alone, of which half may be positive, ask for less.

        Args:
            thresholds: What the rule gives on texts alone.
            calibration: Makes logits probabilities.
            rule: What the thresholds are chosen for.
        """
        # A rate that was asked for holds; that of few conversations is rough in any case.
        is_asked, count = rule.kind == "fpr", len(self.logits)
        allowed = int((rule.value if is_asked else FALSE_ALARMS) * count)
        # Fewer conversations cannot tell such a rate; at one that was asked for, none may be
        # flagged.
        is_told = allowed or (is_asked and count)
        if rule.kind in ("recall", "cost") or not is_told or not thresholds:
            return tuple(thresholds)
        # Just above the probability of the first conversation that may not be flagged.
        bounds = np.sort(calibration.apply(self.logits), 0)[::-1][allowed].tolist()
        # A threshold that no score reaches would find nothing: what is as sure as that is flagged.
        return tuple(
            max(threshold, min(math.nextafter(bound, 1.0), _HIGHEST))
            for threshold, bound in zip(thresholds, bounds, strict=True)
        )

    def left_out_thresholds(
        self, thresholds: Sequence[float], calibration: Calibration, rule: ThresholdRule
    ) -> Float[Values, "part label"]:
        """For each part the thresholds that the conversations of the other parts ask for."""
        inclusions = [self.folds != fold for fold in range(int(self.folds.max(initial=0)) + 1)]
        rests = [
            Conversations(self.logits[is_included], self.folds[is_included])
            for is_included in inclusions
        ]
        return np.array([rest.thresholds_at_fpr(thresholds, calibration, rule) for rest in rests])

    def count_flagged(
        self, task: Task, thresholds: Sequence[float], calibration: Calibration, rule: ThresholdRule
    ) -> int:
        """How many are flagged at the thresholds of the other parts."""
        applied = self.left_out_thresholds(thresholds, calibration, rule)[self.folds]
        return int(flags_of(task, calibration.apply(self.logits), applied).sum())


def flags_of(
    task: Task,
    probabilities: Float[Values, "text output"],
    thresholds: Sequence[float] | Float[Values, "text label"],
) -> Bool[Flags, " text"]:
    """Which texts are flagged, or given a class other than ``none``."""
    if task.abstains:
        return probabilities.argmax(1) < task.outputs - 1
    return np.asarray((probabilities >= np.array(thresholds)).any(1))


@dataclass(frozen=True)
class Detections:
    """What a probe finds and flags of some texts.

    Attributes:
        positives: Texts that have a label.
        found: How many of these are flagged.
        negatives: Texts without a label.
        flagged: How many of these are flagged.
    """

    positives: NonNegativeInt
    found: NonNegativeInt
    negatives: NonNegativeInt
    flagged: NonNegativeInt

    @staticmethod
    def count(
        flags: Bool[Flags, " text"], positive: Bool[Flags, " text"], negative: Bool[Flags, " text"]
    ) -> "Detections":
        """Counts the flags of positive texts and of others."""
        rows = (positive, positive & flags, negative, negative & flags)
        return Detections(*(int(selected.sum()) for selected in rows))


@dataclass(frozen=True)
class Traffic:
    """A probe in front of background traffic.

    Attributes:
        background: The conversations.
        flagged: How many of them are flagged, at thresholds that the other parts gave.
        kinds: The same of those of some words or turns, as texts without a label.
        surroundings: By the most words of other text, the positives inside it, and the background
            of that length alone; none of several classes.
        worst: The highest probabilities, with the beginnings of these conversations. They may be
            private or under a licence of their own: no artifact and no JSON has them.
    """

    background: Conversations
    flagged: NonNegativeInt
    kinds: Mapping[str, Detections] = field(default_factory=dict[str, Detections])
    surroundings: Mapping[str, Detections] = field(default_factory=dict[str, Detections])
    worst: Annotated[Sequence[tuple[float, str]], Field(exclude=True)] = ()

    def to_dict(self) -> dict[str, object]:
        """JSON values, without texts."""
        groups = {"kinds": self.kinds, "surroundings": self.surroundings}
        return {
            "conversations": len(self.background),
            "flagged": self.flagged,
            **{
                name: {key: vars(detections) for key, detections in group.items()}
                for name, group in groups.items()
            },
        }
