"""Background traffic: the thresholds that let it pass, and how much of it a probe flags.

Conversations are divided into folds by source. Each fold is classified by a probe trained on the
other folds, at the threshold that lets those pass. The counts are therefore of conversations, and
sources, that determined neither the probe nor the threshold.
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

# Share of background conversations that may be flagged, unless a rule sets another. On unseen
# sources, more are flagged.
FALSE_ALARMS = 0.03
# Upper limit of a raised threshold.
_HIGHEST = 1 - 1e-9


@dataclass(frozen=True, eq=False)
class Conversations:
    """Background conversations, as a probe classifies them.

    Attributes:
        logits: Out-of-fold logits, not rounded, because a threshold may lie just above one of them.
        folds: Fold of each conversation.
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
        """No conversations, for a probe with this number of outputs."""
        return Conversations(np.empty((0, outputs)), np.empty(0, dtype=np.int64))

    def thresholds_at_fpr(
        self, thresholds: Sequence[float], calibration: Calibration, rule: ThresholdRule
    ) -> tuple[float, ...]:
        """Thresholds that flag little background traffic, unless the rule sets the cost of a miss.

        Each threshold is raised until at most a given share of conversations reaches it: the rate
        of ``fpr``, or else ``FALSE_ALARMS``. Labelled texts alone, half of which may be positive,
        lead to lower thresholds.

        Args:
            thresholds: Thresholds that the rule gives without background.
            calibration: Map from logits to probabilities.
            rule: Objective of the thresholds.
        """
        # A requested rate is respected; with few conversations, it is imprecise in any case.
        is_asked, count = rule.kind == "fpr", len(self.logits)
        allowed = int((rule.value if is_asked else FALSE_ALARMS) * count)
        # Fewer conversations cannot resolve such a rate; if it was requested, none may be flagged.
        is_told = allowed or (is_asked and count)
        if rule.kind in ("recall", "cost") or not is_told or not thresholds:
            return tuple(thresholds)
        # Just above the probability of the first conversation that may not be flagged.
        bounds = np.sort(calibration.apply(self.logits), 0)[::-1][allowed].tolist()
        # A threshold that no score reaches would find nothing, so the highest scores stay flagged.
        return tuple(
            max(threshold, min(math.nextafter(bound, 1.0), _HIGHEST))
            for threshold, bound in zip(thresholds, bounds, strict=True)
        )

    def left_out_thresholds(
        self, thresholds: Sequence[float], calibration: Calibration, rule: ThresholdRule
    ) -> Float[Values, "part label"]:
        """For each fold, the thresholds derived from the conversations of the other folds."""
        inclusions = [self.folds != fold for fold in range(int(self.folds.max(initial=0)) + 1)]
        rests = [
            Conversations(self.logits[is_included], self.folds[is_included])
            for is_included in inclusions
        ]
        return np.array([rest.thresholds_at_fpr(thresholds, calibration, rule) for rest in rests])

    def count_flagged(
        self, task: Task, thresholds: Sequence[float], calibration: Calibration, rule: ThresholdRule
    ) -> int:
        """Number of conversations flagged at the thresholds of the other folds."""
        applied = self.left_out_thresholds(thresholds, calibration, rule)[self.folds]
        return int(task.flagged(calibration.apply(self.logits), applied).sum())


@dataclass(frozen=True)
class Detections:
    """Counts of true and false positives of a probe on some texts.

    Attributes:
        positives: Number of texts that have a label.
        found: Number of these that are flagged.
        negatives: Number of texts without a label.
        flagged: Number of these that are flagged.
    """

    positives: NonNegativeInt
    found: NonNegativeInt
    negatives: NonNegativeInt
    flagged: NonNegativeInt

    @staticmethod
    def count(
        flags: Bool[Flags, " text"], positive: Bool[Flags, " text"], negative: Bool[Flags, " text"]
    ) -> "Detections":
        """Count the flags among positive and other texts."""
        rows = (positive, positive & flags, negative, negative & flags)
        return Detections(*(int(selected.sum()) for selected in rows))


@dataclass(frozen=True)
class Traffic:
    """Metrics of a probe on background traffic.

    Attributes:
        background: The conversations.
        flagged: Number of flagged conversations, at the thresholds of the other folds.
        kinds: The same by length in words or turns, as texts without a label.
        surroundings: By maximum number of surrounding words, the embedded positives, and background
            of that length; empty for multi-class tasks.
        worst: The highest probabilities, with the beginnings of these conversations. Artifacts and
            JSON output omit them, because they may be private or separately licensed.
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
