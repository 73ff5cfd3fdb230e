"""Ordinary traffic: which thresholds let it pass, and what a probe flags of it.

Conversations lie in parts, and those of one source in one part. Each part is judged by a probe of
the other parts, at the threshold that lets these pass, so what is counted is of conversations, and
of sources, that set neither.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from sidelight.statistics.calibration import Calibration
from sidelight.statistics.metrics import wilson
from sidelight.statistics.thresholds import OperatingCurve, ThresholdRule
from sidelight.types import Task

if TYPE_CHECKING:
    from sidelight.probes.probe import Probe
    from sidelight.training.contexts import Context

# The share of ordinary conversations that may be flagged, unless a rule says otherwise. Of sources
# that nobody has seen it flags more.
FALSE_ALARMS = 0.03
# Share of the recall: where ordinary traffic costs more, training warns.
_COSTLY = 0.05
# No threshold is raised further.
_HIGHEST = 1 - 1e-9
# Words around a text, from one limit to the next.
_LENGTHS = (0, 50, 150, 600)
_SHOWN, _SHOWN_CHARACTERS = 3, 160


@dataclass(frozen=True)
class Traffic:
    """A probe in front of ordinary traffic.

    Attributes:
        conversations: How many ordinary conversations were judged.
        flagged: How many of them were flagged.
        kinds: The same of those of some ``words`` or ``turns``.
        surroundings: Of up to so many ``words`` of other text, the ``positives`` inside it, how
            many are ``found``, the ``ordinary`` texts of that length alone, and how many of these
            are ``flagged``; none of several classes.
        worst: The highest probabilities, with the beginnings of these conversations.
    """

    conversations: int
    flagged: int
    kinds: tuple[dict[str, Any], ...]
    surroundings: tuple[dict[str, int], ...]
    worst: tuple[tuple[float, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without texts, which may be private or under a licence of their own."""
        values = asdict(self)
        del values["worst"]
        return values

    def record(self, ordinary: "Conversations") -> dict[str, Any]:
        """The record in an artifact, which holds no text of the background."""
        return {
            **self.to_dict(),
            "logits": ordinary.logits.tolist(),
            "parts": ordinary.parts.tolist(),
        }


@dataclass(frozen=True)
class Conversations:
    """Ordinary conversations, as a probe judges them.

    Attributes:
        logits: Out-of-fold, not rounded: a threshold may lie just above one of them.
        parts: The part of each.
    """

    logits: Float[np.ndarray, "conversation output"]
    parts: Int[np.ndarray, " conversation"]

    @staticmethod
    def of(
        contexts: "Sequence[Context]", logits: Float[np.ndarray, "context output"]
    ) -> "Conversations":
        """The conversations among contexts that have these logits."""
        rows = conversations_of(contexts)
        return Conversations(logits[rows], np.array([contexts[i].group for i in rows], dtype=int))

    @staticmethod
    def kept(probe: "Probe") -> "Conversations":
        """The conversations that training has kept with a probe."""
        kept = probe.history.traffic
        logits = np.array(kept.logits, dtype=float).reshape(-1, probe.task.outputs)
        # Without parts, each conversation is one.
        names = kept.parts if len(kept.parts) == len(logits) else range(len(logits))
        return Conversations(logits, np.unique(names, return_inverse=True)[1])

    def quiet_thresholds(
        self, alone: Sequence[float], calibration: Calibration, rule: ThresholdRule
    ) -> tuple[float, ...]:
        """Thresholds that flag little ordinary traffic, if the rule does not say what a miss costs.

        Each is raised until at most so many conversations reach it: the rate of ``fpr``, or else
        ``FALSE_ALARMS``. Labelled texts alone, of which half may be positive, ask for less.

        Args:
            alone: What the rule gives on texts alone.
            calibration: Makes logits probabilities.
            rule: What the thresholds are chosen for.
        """
        # A rate that was asked for holds; that of few conversations is rough in any case.
        is_asked, count = rule.kind == "fpr", len(self.logits)
        allowed = int((rule.value if is_asked else FALSE_ALARMS) * count)
        # Fewer conversations cannot tell such a rate; at one that was asked for, none may be
        # flagged.
        is_told = allowed or (is_asked and count)
        if rule.kind in ("recall", "cost") or not is_told or not alone:
            return tuple(alone)
        # Just above the probability of the first conversation that may not be flagged.
        bounds = np.sort(calibration.apply(self.logits), 0)[::-1][allowed].tolist()
        # A threshold that no score reaches would find nothing: what is as sure as that is flagged.
        return tuple(
            max(threshold, min(math.nextafter(bound, 1.0), _HIGHEST))
            for threshold, bound in zip(alone, bounds, strict=True)
        )

    def left_out_thresholds(
        self, alone: Sequence[float], calibration: Calibration, rule: ThresholdRule
    ) -> Float[np.ndarray, "part label"]:
        """For each part the thresholds that the conversations of the other parts ask for."""
        others = [self.parts != part for part in range(int(self.parts.max(initial=0)) + 1)]
        rests = [Conversations(self.logits[kept], self.parts[kept]) for kept in others]
        return np.array([rest.quiet_thresholds(alone, calibration, rule) for rest in rests])

    def count_flagged(
        self, task: Task, alone: Sequence[float], calibration: Calibration, rule: ThresholdRule
    ) -> int:
        """How many are flagged at the thresholds of the other parts."""
        applied = self.left_out_thresholds(alone, calibration, rule)[self.parts]
        return int(flags_of(task, calibration.apply(self.logits), applied).sum())


def flags_of(
    task: Task,
    probabilities: Float[np.ndarray, "text output"],
    thresholds: Sequence[float] | Float[np.ndarray, "text label"],
) -> Bool[np.ndarray, " text"]:
    """Which texts are flagged, or given a class other than ``none``."""
    if task.abstains:
        return probabilities.argmax(1) < task.outputs - 1
    return np.asarray((probabilities >= np.array(thresholds)).any(1))


def measure_traffic(
    task: Task,
    contexts: "Sequence[Context]",
    probabilities: Float[np.ndarray, "context output"],
    labels: Int[np.ndarray, "context ..."],
    thresholds: Float[np.ndarray, "part label"],
) -> Traffic:
    """Counts what is flagged.

    Args:
        task: The classes.
        contexts: What was judged.
        probabilities: Out-of-fold, of each.
        labels: Of each, as in ``LabelledExamples.labels``.
        thresholds: As from ``Conversations.left_out_thresholds``.
    """
    parts = np.array([context.group for context in contexts], dtype=int)
    # A part may have contexts and no conversation.
    applied = thresholds[np.minimum(parts, len(thresholds) - 1)]
    flags = flags_of(task, probabilities, applied)
    judged = probabilities[:, :-1] if task.abstains else probabilities
    conversations = conversations_of(contexts)
    highest = judged[conversations].max(1)
    ordinary = [contexts[row] for row in conversations.tolist()]
    order = np.argsort(-highest, kind="stable")[:_SHOWN].tolist()
    worst = [(float(highest[i]), beginning(ordinary[i].example.text)) for i in order]
    kinds = _by_kind(ordinary, flags[conversations])
    # Every text of several classes is one of them.
    holds = np.asarray(labels.reshape(len(contexts), -1).any(1))
    surroundings = () if task.abstains else _measure_surroundings(contexts, holds, flags)
    flagged = int(flags[conversations].sum())
    return Traffic(len(conversations), flagged, kinds, surroundings, tuple(worst))


def _by_kind(
    conversations: "Sequence[Context]", is_flagged: Bool[np.ndarray, " conversation"]
) -> tuple[dict[str, Any], ...]:
    words = np.array([context.words for context in conversations])
    turns = np.array([len(context.example.messages) for context in conversations])
    kinds: dict[str, Bool[np.ndarray, " conversation"]] = {
        "up to 30 words": words <= 30,
        "to 150": (words > 30) & (words <= 150),
        "longer": words > 150,
        "one turn": turns == 1,
        "several turns": turns > 1,
    }
    return tuple(
        {"name": name, "conversations": int(rows.sum()), "flagged": int(is_flagged[rows].sum())}
        for name, rows in kinds.items()
    )


def _measure_surroundings(
    contexts: "Sequence[Context]",
    holds: Bool[np.ndarray, " context"],
    flags: Bool[np.ndarray, " context"],
) -> tuple[dict[str, int], ...]:
    words = np.array([context.words for context in contexts])
    is_inside = np.array([context.kind != "plain" for context in contexts])
    is_other = np.array([context.text is None for context in contexts])
    surroundings: list[dict[str, int]] = []
    for shorter, longest in pairwise(_LENGTHS):
        is_near = (shorter < words) & (words <= longest)
        positive, ordinary = is_near & is_inside & holds, is_near & is_other & ~holds
        counted = {"positives": positive, "found": positive & flags}
        counted |= {"ordinary": ordinary, "flagged": ordinary & flags}
        counts = {name: int(rows.sum()) for name, rows in counted.items()}
        surroundings.append({"words": longest, **counts})
    return tuple(surroundings)


def traffic_warnings(
    traffic: Traffic,
    curves: Mapping[str, OperatingCurve],
    thresholds: Sequence[float],
    rule: ThresholdRule,
) -> list[str]:
    """Warnings where ordinary traffic and the labelled texts ask for different thresholds.

    Args:
        traffic: Figures at these thresholds.
        curves: Of the labelled texts, by label.
        thresholds: Of each label.
        rule: What they were chosen for.
    """
    remedy = (
        "Give ordinary traffic of your own (--background FILE), name the rate of false alarms that "
        "you accept (--threshold fpr=0.05), or train without it if no other texts will come "
        "(--background none)."
    )
    doubts: list[str] = []
    # False alarms among labelled texts, then among ordinary conversations; and how many there are.
    alarms: list[int] = []
    sizes: list[int] = []
    for (label, curve), threshold in zip(curves.items(), thresholds, strict=True):
        hits, false_alarms = curve.at(threshold)
        hits_alone, _ = curve.at(curve.threshold(rule))
        alarms.append(false_alarms)
        sizes.append(max(1, curve.negatives))
        if hits_alone - hits > _COSTLY * curve.positives:
            doubts.append(
                f"The threshold that lets ordinary traffic pass finds {hits} of {curve.positives} "
                f"texts that are '{label}', that of the texts alone {hits_alone}. {remedy}"
            )
    if not alarms:
        return doubts
    counts = np.array([*sizes, max(1, traffic.conversations)])
    rates = np.array([*alarms, traffic.flagged]) / counts
    lowest, highest = wilson(rates, counts)
    # Beyond what chance explains on either side.
    if lowest[-1] > highest[:-1].max():
        doubts.append(
            f"It flags {rates[-1]:.1%} of ordinary conversations, but {rates[:-1].max():.1%} of "
            f"the labelled texts that it should let pass. {remedy}"
        )
    return doubts


def kept_rate(probe: "Probe") -> tuple[int, int]:
    """How many ordinary conversations were flagged when thresholds were chosen, and of how many."""
    return probe.history.traffic.flagged, probe.history.traffic.conversations


def conversations_of(contexts: "Sequence[Context]") -> Int[np.ndarray, " conversation"]:
    """The rows of ordinary conversations."""
    return np.flatnonzero([context.kind == "background" for context in contexts])


def beginning(text: str) -> str:
    """A text on one line, shortened."""
    words = " ".join(text.split())
    return words if len(words) <= _SHOWN_CHARACTERS else f"{words[:_SHOWN_CHARACTERS]}..."
