"""Metrics of a trained probe on background traffic, and on positives embedded in it."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from sidelight.errors import warn
from sidelight.statistics.background import Conversations, Detections, Traffic
from sidelight.statistics.metrics import wilson
from sidelight.statistics.thresholds import OperatingCurve, ThresholdRule
from sidelight.types import Task

if TYPE_CHECKING:
    from sidelight.training.contexts import Context

# Training warns if background traffic costs more than this share of the positives.
_COSTLY = 0.05
# Limits of the number of words around a text.
_LENGTHS = (0, 50, 150, 600)
_EXAMPLES, _EXAMPLE_CHARACTERS = 3, 160


def conversations_among(
    contexts: "Sequence[Context]", logits: Float[np.ndarray, "context output"]
) -> Conversations:
    """The background conversations among contexts with these logits."""
    rows = conversations_of(contexts)
    return Conversations(logits[rows], np.array([contexts[i].group for i in rows], dtype=np.int64))


def measure_traffic(
    task: Task,
    contexts: "Sequence[Context]",
    background: Conversations,
    probabilities: Float[np.ndarray, "context output"],
    labels: Int[np.ndarray, "context ..."],
    thresholds: Float[np.ndarray, "part label"],
) -> Traffic:
    """Count flagged conversations and texts.

    Args:
        task: The classes.
        contexts: The classified contexts.
        background: Conversations among them.
        probabilities: Out-of-fold probabilities of each.
        labels: Labels of each, as in ``LabelledExamples.labels``.
        thresholds: Result of ``Conversations.left_out_thresholds``.
    """
    groups = np.array([context.group for context in contexts], dtype=int)
    # A fold may have contexts but no conversations.
    applied = thresholds[np.minimum(groups, len(thresholds) - 1)]
    flags = task.flagged(probabilities, applied)
    conversations = conversations_of(contexts)
    highest = probabilities[conversations, task.foreground].max(1)
    background_contexts = [contexts[row] for row in conversations.tolist()]
    order = np.argsort(-highest, kind="stable")[:_EXAMPLES].tolist()
    worst = [(float(highest[i]), excerpt(background_contexts[i].example.text)) for i in order]
    kinds = _by_kind(background_contexts, flags[conversations])
    # Every text of a multi-class task has a class.
    holds = np.asarray(labels.reshape(len(contexts), -1).any(1))
    surroundings = {} if task.abstains else _measure_surroundings(contexts, holds, flags)
    return Traffic(background, int(flags[conversations].sum()), kinds, surroundings, worst)


def _by_kind(
    conversations: "Sequence[Context]", flags: Bool[np.ndarray, " conversation"]
) -> dict[str, Detections]:
    words = np.array([context.words for context in conversations])
    turns = np.array([len(context.example.messages) for context in conversations])
    kinds: dict[str, Bool[np.ndarray, " conversation"]] = {
        "up to 30 words": words <= 30,
        "to 150": (words > 30) & (words <= 150),
        "longer": words > 150,
        "one turn": turns == 1,
        "several turns": turns > 1,
    }
    positive = np.zeros(len(flags), dtype=np.bool_)
    return {name: Detections.count(flags, positive, rows) for name, rows in kinds.items()}


def _measure_surroundings(
    contexts: "Sequence[Context]",
    holds: Bool[np.ndarray, " context"],
    flags: Bool[np.ndarray, " context"],
) -> dict[str, Detections]:
    words = np.array([context.words for context in contexts])
    is_inside = np.array([context.kind != "plain" for context in contexts])
    is_background = np.array([context.text is None for context in contexts])
    surroundings: dict[str, Detections] = {}
    for shorter, longest in pairwise(_LENGTHS):
        is_near = (shorter < words) & (words <= longest)
        positive, negative = is_near & is_inside & holds, is_near & is_background & ~holds
        surroundings[str(longest)] = Detections.count(flags, positive, negative)
    return surroundings


def warn_of_traffic(
    traffic: Traffic,
    curves: Mapping[str, OperatingCurve],
    thresholds: Sequence[float],
    rule: ThresholdRule,
) -> None:
    """Warn if background traffic and the labelled texts require different thresholds.

    Args:
        traffic: Metrics at these thresholds.
        curves: Operating curves of the labelled texts, by label.
        thresholds: Threshold of each label.
        rule: Objective of the thresholds.
    """
    remedy = (
        "Give your own traffic (--background FILE), set the false-positive rate that you accept "
        "(--threshold fpr=0.05), or train without background traffic if the probe will see only "
        "texts like the training data (--background none)."
    )
    # False alarms among labelled texts, then among background conversations; and how many there
    # are.
    alarms: list[int] = []
    sizes: list[int] = []
    for (label, curve), threshold in zip(curves.items(), thresholds, strict=True):
        hits, false_alarms = curve.at(threshold)
        hits_without, _ = curve.at(curve.threshold(rule))
        alarms.append(false_alarms)
        sizes.append(max(1, curve.negatives))
        if hits_without - hits > _COSTLY * curve.positives:
            warn(
                f"The threshold chosen for background traffic finds {hits} of {curve.positives} "
                f"'{label}' texts; a threshold chosen without background traffic would find "
                f"{hits_without}. {remedy}"
            )
    if not alarms:
        return
    counts = np.array([*sizes, max(1, len(traffic.background))])
    rates = np.array([*alarms, traffic.flagged]) / counts
    lowest, highest = wilson(rates, counts)
    # Only if the intervals do not overlap.
    if lowest[-1] > highest[:-1].max():
        warn(
            f"The probe flags {rates[-1]:.1%} of background conversations, but only "
            f"{rates[:-1].max():.1%} of the negative labelled texts. {remedy}"
        )


def conversations_of(contexts: "Sequence[Context]") -> Int[np.ndarray, " conversation"]:
    """Rows of the background conversations."""
    return np.flatnonzero([context.kind == "background" for context in contexts])


def excerpt(text: str) -> str:
    """A text on one line, shortened."""
    words = " ".join(text.split())
    return words if len(words) <= _EXAMPLE_CHARACTERS else f"{words[:_EXAMPLE_CHARACTERS]}..."
