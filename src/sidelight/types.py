"""What flows between the parts: the classes to tell apart, and the verdict on one text."""

from dataclasses import dataclass
from typing import Literal

TaskKind = Literal["binary", "multiclass", "multilabel"]


@dataclass(frozen=True)
class Task:
    """What a probe decides.

    Attributes:
        kind: ``binary`` (one positive class), ``multiclass`` (exactly one label holds) or
            ``multilabel`` (each label holds or not).
        labels: Names in the order of the outputs; for a binary task (negative, positive).
    """

    kind: TaskKind
    labels: tuple[str, ...]

    @property
    def outputs(self) -> int:
        """The number of logits: one for a binary task, else one per label."""
        return 1 if self.kind == "binary" else len(self.labels)


@dataclass(frozen=True)
class Verdict:
    """What one probe says of one text.

    Attributes:
        probe: Name of the probe.
        label: The most probable label; for a multi-label task the most probable one even when
            nothing is flagged.
        labels: The labels that hold at the probe's thresholds (multi-label: none to all).
        probabilities: Calibrated probability of every label.
        flagged: Whether the threshold of the positive class (binary) or of any label (multi-label)
            is reached. A multi-class verdict is never flagged: it names a class, not a danger.
    """

    probe: str
    label: str
    labels: tuple[str, ...]
    probabilities: dict[str, float]
    flagged: bool
