"""The thresholds to decide by. Knows probabilities and labels, not how they were calibrated."""

import numpy as np
from jaxtyping import Bool, Float, Shaped

from sidelight.metrics import AnyArray, Flags, Values, checked_labels
from sidelight.types import Task

_SATURATED = 1e-9


def choose_thresholds(
    task: Task, probabilities: Float[Values, "row output"], labels: Shaped[AnyArray, "..."]
) -> tuple[float, ...]:
    """The threshold of each label that gives the highest F1 on these rows.

    It lies midway between neighbouring scores; of several equally good cuts the middle one is
    taken. A label that no row has, or whose rows all score 0, gets 0.5.

    Args:
        task: The classes.
        probabilities: Calibrated probabilities of validation rows, never of test rows.
        labels: [row] of class numbers, or [row, label] of 0 and 1 for a multi-label task.

    Returns:
        One threshold within (0, 1) for a binary task, one per label for a multi-label task, and
        none for a multi-class task, whose decision is the most probable class.

    Raises:
        SidelightError: As `checked_labels`.
    """
    integers = checked_labels(task, probabilities, labels)
    if task.kind == "multiclass":
        return ()
    holds = integers.reshape(probabilities.shape) == 1
    return tuple(map(_best_cut, probabilities.T.astype(np.float64), holds.T))


def _best_cut(scores: Float[Values, " row"], holds: Bool[Flags, " row"]) -> float:
    # Saturated scores are one step at either end: no threshold in (0, 1) could part them.
    within = np.clip(scores, _SATURATED, 1 - _SATURATED)
    steps, place = np.unique(-within, return_inverse=True)  # falling scores
    hits = np.bincount(place, weights=holds).cumsum()
    flagged = np.bincount(place).cumsum()
    f1 = np.where(-steps > _SATURATED, 2 * hits / (flagged + holds.sum()), 0)
    if f1.max() == 0:
        return 0.5
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    step = best[len(best) // 2]
    below = np.append(-steps, 0.0)[step + 1]
    return float(below - steps[step]) / 2
