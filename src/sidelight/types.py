"""What a probe decides, its verdict on one text, and the outcome of several probes."""

from collections.abc import Collection, Mapping
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

    def decide(
        self, probe: str, probabilities: Mapping[str, float], thresholds: Mapping[str, float]
    ) -> "Verdict":
        """The verdict of a probe at some thresholds.

        Args:
            probe: Name of the probe.
            probabilities: Calibrated probability of every label, in the order of ``labels``.
            thresholds: Probability from which a label holds; labels that are absent never do.
        """
        best = max(probabilities, key=probabilities.__getitem__)
        held = tuple(name for name, least in thresholds.items() if probabilities[name] >= least)
        if self.kind == "binary":
            best = held[0] if held else self.labels[0]
        labels = held if held or self.kind == "multilabel" else (best,)
        return Verdict(probe, best, labels, dict(probabilities), flagged=bool(held))


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


@dataclass(frozen=True)
class Judgement:
    """What several probes say of one text, or of one part of it.

    Attributes:
        verdicts: One for each probe that gave one.
        failed: Names of the probes that gave none; never to be read as a harmless verdict.
    """

    verdicts: tuple[Verdict, ...] = ()
    failed: tuple[str, ...] = ()

    def __or__(self, newer: "Judgement") -> "Judgement":
        """Both; where a probe is in both, what it said last."""
        said = {*(verdict.probe for verdict in newer.verdicts), *newer.failed}
        return Judgement(
            tuple(verdict for verdict in self.verdicts if verdict.probe not in said)
            + newer.verdicts,
            tuple(name for name in self.failed if name not in said) + newer.failed,
        )

    def of(self, names: Collection[str]) -> "Judgement":
        """What these probes say."""
        return Judgement(
            tuple(verdict for verdict in self.verdicts if verdict.probe in names),
            tuple(name for name in self.failed if name in names),
        )
