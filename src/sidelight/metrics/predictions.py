"""From a task's probabilities and labels, once checked, to one column per label.

Knows tasks, thresholds and what a user can get wrong in them; measures nothing.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from sidelight.errors import SidelightError
from sidelight.metrics.arrays import AnyArray, Flags, Numbers, Values
from sidelight.metrics.ranking import Ranking, rank
from sidelight.types import Task, TaskKind


def checked_labels(
    task: Task, outputs: Shaped[AnyArray, "row output"], labels: Shaped[AnyArray, "..."]
) -> Int[Numbers, "..."]:
    """The labels as integers, once they and the outputs are known to fit the task.

    Args:
        task: The classes that the outputs and labels are about.
        outputs: Logits or probabilities; every number must be finite.
        labels: [row] of class numbers, or [row, label] of 0 and 1 for a multi-label task.

    Returns:
        The same labels as int64.

    Raises:
        SidelightError: A shape does not fit the task or the other array, there are no rows, an
            output is NaN or infinite, or a label is not one of the task's.
    """
    rows = len(outputs)
    if outputs.shape != (rows, task.outputs) or rows == 0:
        raise SidelightError(
            f"Got outputs of shape {outputs.shape}, wanted [row, {task.outputs}] with at least one "
            f"row for a {task.kind} task with labels {', '.join(task.labels)}. "
            "Pass one row per text; a binary task has one column, the positive class."
        )
    if not np.isfinite(outputs.astype(np.float64)).all():
        bad = int(np.flatnonzero(~np.isfinite(outputs.astype(np.float64)).all(axis=1))[0])
        raise SidelightError(
            f"Row {bad} of the outputs holds NaN or infinity. Look for that text's hidden states "
            "overflowing in half precision, or for a learning rate that made training diverge."
        )
    return _integers_within(task, rows, labels)


def _integers_within(task: Task, rows: int, labels: AnyArray) -> Numbers:
    many = task.kind == "multilabel"
    shape = (rows, len(task.labels)) if many else (rows,)
    highest = 1 if many else len(task.labels) - 1
    if labels.shape != shape:
        raise SidelightError(
            f"Got labels of shape {labels.shape}, wanted {shape} for {rows} rows of a {task.kind} "
            "task. Pass the labels of exactly the rows that the outputs are for."
        )
    known = np.isin(labels, np.arange(highest + 1))
    if not known.all():
        raise SidelightError(
            f"Got labels such as {labels[~known][0]}, wanted whole numbers from 0 to {highest} for "
            f"a {task.kind} task. Map label names to their position in the task."
        )
    return labels.astype(np.int64)


@dataclass(frozen=True)
class Predictions:
    """What every metric is computed from: one column per label, whatever the task.

    Attributes:
        kind: The task's kind; decides which labels are headlined and how they are averaged.
        scores: Probability of each label; a binary task has two columns, the negative first.
        targets: Whether the label holds.
        decisions: Whether the label was predicted.
    """

    kind: TaskKind
    scores: Float[Values, "row label"]
    targets: Bool[Flags, "row label"]
    decisions: Bool[Flags, "row label"]

    @property
    def headline(self) -> slice:
        """The columns that the metrics are about: the positive class if binary, else all."""
        return slice(1, 2) if self.kind == "binary" else slice(None)

    @property
    def once(self) -> Float[Values, "row 1"]:
        """The weights that count every row once: the rows as they are, not a resample."""
        return np.ones((len(self.scores), 1))

    @cached_property
    def rankings(self) -> tuple[Ranking, ...]:
        """Each label's rows, sorted once for all resamples."""
        return tuple(map(rank, self.scores.T, self.targets.T))


def decide(
    task: Task,
    probabilities: Float[Values, "row output"],
    labels: Shaped[AnyArray, "..."],
    *,
    thresholds: tuple[float, ...],
) -> Predictions:
    """Probabilities, labels and decisions in the form that the metrics read.

    A label is predicted where its probability reaches its threshold, or, in a multi-class task,
    where it is the most probable one (the first of equals).

    Args:
        task: The classes.
        probabilities: Each in [0, 1].
        labels: [row] of class numbers, or [row, label] of 0 and 1 for a multi-label task.
        thresholds: One for a binary task, one per label if multi-label, none if multi-class.

    Raises:
        SidelightError: As `checked_labels`; or a probability lies outside [0, 1]; or the number of
            thresholds does not fit the task.
    """
    integers = checked_labels(task, probabilities, labels)
    if probabilities.min() < 0 or probabilities.max() > 1:
        raise SidelightError(
            f"Got values from {probabilities.min():.3g} to {probabilities.max():.3g}, wanted "
            "probabilities from 0 to 1. Apply a Calibration to logits first; 'none' will do."
        )
    wanted = 0 if task.kind == "multiclass" else task.outputs
    if len(thresholds) != wanted:
        raise SidelightError(
            f"Got {len(thresholds)} thresholds, wanted {wanted} for this {task.kind} task. "
            "Take them from choose_thresholds on validation rows of the same task."
        )
    return _one_column_per_label(task, probabilities, integers, thresholds)


def _one_column_per_label(
    task: Task, probabilities: Values, labels: Numbers, thresholds: tuple[float, ...]
) -> Predictions:
    if task.kind == "multilabel":
        return Predictions(task.kind, probabilities, labels == 1, probabilities >= thresholds)
    classes = np.arange(len(task.labels))
    targets = labels[:, None] == classes
    if task.kind == "multiclass":
        chosen = probabilities.argmax(axis=1)
        return Predictions(task.kind, probabilities, targets, chosen[:, None] == classes)
    flagged = probabilities >= thresholds  # (row, 1)
    scores = np.hstack([1 - probabilities, probabilities])
    return Predictions(task.kind, scores, targets, np.hstack([~flagged, flagged]))
