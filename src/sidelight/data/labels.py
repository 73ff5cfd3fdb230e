"""Label cells as a task and an array of numbers. Knows no file format and no texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from sidelight.data.inference import MOST_LABELS, guess_warning, infer_task
from sidelight.data.label_names import TRUTH, is_missing, label_index, label_name, sorted_labels
from sidelight.data.rows import Row, is_list, plain
from sidelight.data.splitting import Numbers
from sidelight.errors import SidelightError, did_you_mean
from sidelight.types import Task


@dataclass(frozen=True, eq=False)
class EncodedLabels:
    """The labels of all rows.

    Attributes:
        task: The label space.
        labels: `[row]` class index, or `[row, label]` of 0/1 for a multi-label task.
        warnings: What the user should know of the labels, one sentence each.
    """

    task: Task
    labels: Int[Numbers, "row ..."]
    warnings: tuple[str, ...] = ()


def encode_labels(
    rows: Sequence[Row], columns: Sequence[str], *, positive: str | None, task: Task | None
) -> EncodedLabels:
    """Encodes one column of labels or lists of labels, or several columns of 0/1.

    Args:
        rows: At least one row, none with a missing label.
        columns: Names of the columns.
        positive: The positive class of a binary task.
        task: A label space to map to, at evaluation; None infers one from the labels.

    Raises:
        SidelightError: A value is no label of the task, or the labels make no task.
    """
    several = len(columns) > 1
    if not several and not is_list(plain(rows[0].cells[columns[0]])):
        return _encode_names(rows, columns[0], positive=positive, task=task)
    if positive is not None:
        raise SidelightError(
            f"positive='{positive}' is for two classes, but several labels may hold at once here. "
            "Leave it out."
        )
    return _encode_flags(rows, columns, task) if several else _encode_lists(rows, columns[0], task)


def _encode_names(
    rows: Sequence[Row], column: str, *, positive: str | None, task: Task | None
) -> EncodedLabels:
    names = [label_name(row.cells[column], place=row.place) for row in rows]
    if task is None:
        task = infer_task(names, column=column, positive=positive)
        warnings = guess_warning(task) if positive is None else ()
        return EncodedLabels(task, _class_indices(rows, names, task), warnings)
    if task.kind == "multilabel":
        raise SidelightError(
            f"Column '{column}' holds one label a row, but the task is multi-label "
            f"({', '.join(task.labels)}). Give lists of labels, or one column of 0/1 per label."
        )
    if positive is not None:
        raise SidelightError(
            f"positive='{positive}' cannot be chosen here: the task has the labels "
            f"{', '.join(task.labels)} already. Leave it out."
        )
    return EncodedLabels(task, _class_indices(rows, names, task))


def _class_indices(rows: Sequence[Row], names: Sequence[str], task: Task) -> Int[Numbers, " row"]:
    index = label_index(task)
    numbers = [_lookup(row, name, index) for row, name in zip(rows, names, strict=True)]
    return np.array(numbers, dtype=np.int64)


def _lookup(row: Row, name: str, index: Mapping[str, int]) -> int:
    if name not in index:
        raise SidelightError(
            f"{row.place}: unknown label '{name[:60]}'.{did_you_mean(name[:60], index)} "
            "Correct the row, or train a probe on these labels: with `sidelight train`, or on what "
            "is loaded without task= in Python."
        )
    return index[name]


def _encode_lists(rows: Sequence[Row], column: str, task: Task | None) -> EncodedLabels:
    sets = [_label_set(row, column) for row in rows]
    task = _multilabel_task(sorted_labels(set[str]().union(*sets)), task)
    index = label_index(task)
    labels = np.zeros((len(rows), len(task.labels)), dtype=np.int64)
    for number, (row, names) in enumerate(zip(rows, sets, strict=True)):
        labels[number, [_lookup(row, name, index) for name in names]] = 1
    return EncodedLabels(task, labels, _constant_labels(task, labels))


def _label_set(row: Row, column: str) -> set[str]:
    cell = plain(row.cells[column])
    if not is_list(cell):
        raise SidelightError(
            f"{row.place}: expected a list of labels as in the first row, got {str(cell)[:60]}. "
            "Write [] where no label holds."
        )
    if any(map(is_missing, cell)):
        raise SidelightError(
            f"{row.place}: the list of labels {str(cell)[:60]} holds an empty one. Remove it."
        )
    return {label_name(value, place=row.place) for value in cell}


def _encode_flags(rows: Sequence[Row], columns: Sequence[str], task: Task | None) -> EncodedLabels:
    task = _multilabel_task(columns, task)
    if set(columns) != set(task.labels):
        raise SidelightError(
            f"The task has the labels {', '.join(task.labels)}, but the columns are "
            f"{', '.join(columns)}. Name one column of 0/1 per label."
        )
    flags = [[_flag(row, name) for name in task.labels] for row in rows]
    labels = np.array(flags, dtype=np.int64)
    return EncodedLabels(task, labels, _constant_labels(task, labels))


def _flag(row: Row, column: str) -> bool:
    name = label_name(row.cells[column], place=f"{row.place}, column '{column}'")
    if name not in TRUTH:
        raise SidelightError(
            f"{row.place}: column '{column}' holds '{name[:60]}'. Where each label has its own "
            f"column, it holds one of {', '.join(TRUTH)}."
        )
    return TRUTH[name]


def _multilabel_task(labels: Sequence[str], task: Task | None) -> Task:
    if task is not None and task.kind != "multilabel":
        raise SidelightError(
            f"The task is {task.kind} ({', '.join(task.labels)}), but several labels may hold at "
            "once here. Name one column with one label a row."
        )
    if task is None and not 2 <= len(labels) <= MOST_LABELS:
        raise SidelightError(
            f"Got {len(labels)} distinct labels where several may hold at once; 2 to {MOST_LABELS} "
            "make a task. For a single label, use one column of 0/1."
        )
    return task or Task("multilabel", tuple(labels))


def _constant_labels(task: Task, labels: Int[Numbers, "row label"]) -> tuple[str, ...]:
    counts = labels.sum(axis=0)
    return tuple(
        f"Label '{name}' holds in {count} of {len(labels)} rows: nothing can be learned from it."
        for name, count in zip(task.labels, counts, strict=True)
        if count in (0, len(labels))
    )
