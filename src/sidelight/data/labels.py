"""How one label is spelled, so that every file format gives the same names.

1, 1.0, "1" and " 1 " are all the label "1". True and "TRUE" are "true", "Yes" is "yes". Upper and
lower case differ in all other names.

A column of truth values, such as one that says which rows are a subset.

The task that a column of label names makes. Knows no rows and no files.

Label cells as a task and an array of numbers. Knows no file format and no texts.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from numbers import Real

import numpy as np
from jaxtyping import Int

from sidelight.data.examples import Examples
from sidelight.data.readers import Row, is_list, plain, require_whole_characters
from sidelight.data.splitting import Numbers
from sidelight.errors import SidelightError, did_you_mean
from sidelight.types import Task

TRUTH = {"0": False, "1": True, "false": False, "true": True, "no": False, "yes": True}

_MISSING = frozenset({"", "nan", "null"})
_WHOLE_NUMBER = re.compile(r"(-?\d+)(\.0*)?")
_NUMBER = re.compile(r"-?\d*\.?\d+(e[+-]?\d+)?", re.IGNORECASE)


def is_missing(cell: object) -> bool:
    """Whether a cell holds no label: None, NaN, or the texts "", "nan" and "null"."""
    return cell is None or str(cell).strip().lower() in _MISSING


def label_name(cell: object, *, place: str) -> str:
    """The one spelling of a label.

    Args:
        cell: A text, number or truth value.
        place: Where the cell stands, for the error message.

    Raises:
        SidelightError: The cell is of another kind, such as a list or bytes; a number that is not
            whole; or a text that is not valid Unicode.
    """
    value = plain(cell)
    if not isinstance(value, str | Real | Decimal):
        raise SidelightError(
            f"{place}: expected one label (a text, a number or a truth value), got "
            f"{str(value)[:60]}. Write one, or a list of labels in every row."
        )
    name = str(value).strip()
    require_whole_characters(name, place=place)
    if name.lower() in TRUTH:
        return name.lower()
    whole = _WHOLE_NUMBER.fullmatch(name)
    if whole is None and _NUMBER.fullmatch(name):
        raise SidelightError(
            f"{place}: the label {name} is a measurement, not a class. "
            "Turn it into classes first, for example by a threshold."
        )
    return whole.group(1) if whole else name


def sorted_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Names in alphabetical order, or by value where all are whole numbers."""
    ordered = sorted(names)
    if all(_WHOLE_NUMBER.fullmatch(name) for name in ordered):
        ordered.sort(key=int)
    return tuple(ordered)


def label_index(task: Task) -> dict[str, int]:
    """Number of each label's name; a task of 0/1, true/false or no/yes knows all six names."""
    index = {name: number for number, name in enumerate(task.labels)}
    if task.kind == "binary" and index.keys() <= TRUTH.keys():
        number_of = {TRUTH[name]: number for name, number in index.items()}
        return {name: number_of[truth] for name, truth in TRUTH.items()}
    return index


class Truth(Enum):
    """What a cell of a column of truth values says; an empty one leaves it open."""

    HOLDS = True
    FAILS = False
    OPEN = None


def truth_values(examples: Examples, column: str) -> tuple[Truth, ...] | None:
    """What each row says in a column; None where no row has the column.

    Raises:
        SidelightError: A cell is neither empty nor a truth value.
    """
    if not any(column in row for row in examples.rows):
        return None
    return tuple(
        _truth(cell, f"example {number}, column '{column}'")
        for number, cell in enumerate(examples.column(column), start=1)
    )


def _truth(cell: object, place: str) -> Truth:
    if is_missing(cell):
        return Truth.OPEN
    name = label_name(cell, place=place)
    if name not in TRUTH:
        raise SidelightError(
            f"{place}: '{name[:60]}' is no truth value. A column that chooses a subset holds one "
            f"of {', '.join(TRUTH)}, or nothing."
        )
    return Truth(TRUTH[name])


MOST_LABELS = 200
_SIGNS = {"-1", "1"}


def infer_task(names: Sequence[str], *, column: str, positive: str | None) -> Task:
    """A binary task from two distinct names, a multi-class one from more.

    Args:
        names: The label of each row.
        column: Where they stood, for error messages.
        positive: The positive class; None means 1 (of 0/1 or -1/1), true or yes, else the rarer
            name, else the last in the alphabet.

    Raises:
        SidelightError: There is one name only, there are too many to be classes, or `positive` is
            none of two.
    """
    if set(names) <= TRUTH.keys():
        pair = _truth_pair(set(names))
        names = [pair[TRUTH[name]] for name in names]
    counts = Counter(names)
    _require_classes(counts, column)
    labels = sorted_labels(counts)
    if len(labels) == 2:
        return Task("binary", _ordered_pair(labels, counts, positive))
    if positive is not None:
        raise SidelightError(
            f"positive='{positive}' is for two classes, but column '{column}' has {len(labels)}: "
            f"{', '.join(labels)}. Leave it out."
        )
    return Task("multiclass", labels)


def guess_warning(task: Task) -> tuple[str, ...]:
    """What to tell the user whose positive class was chosen by count; nothing otherwise."""
    if task.kind != "binary" or _says_truth(task.labels):
        return ()
    negative, positive = task.labels
    return (
        f"No positive class was named: '{positive}' is taken (the rarer label; of two equal ones "
        f"the last in the alphabet). --positive {negative} (positive= in Python) chooses the "
        "other.",
    )


def _says_truth(labels: tuple[str, ...]) -> bool:
    """Whether two names say by themselves which is positive; -1 does so beside 1 only."""
    return set(labels) <= TRUTH.keys() or set(labels) == _SIGNS


def _truth_pair(names: Iterable[str]) -> tuple[str, str]:
    """The pair of names that the column spells; 0 and 1 where it mixes spellings."""
    pairs = (("0", "1"), ("false", "true"), ("no", "yes"))
    return next((pair for pair in pairs if set(names) <= set(pair)), pairs[0])


def _ordered_pair(
    labels: tuple[str, ...], counts: Counter[str], positive: str | None
) -> tuple[str, ...]:
    if positive is not None:
        return _with_positive(labels, positive)
    if _says_truth(labels):
        return labels
    # The sort is stable and labels are in order: of two equal counts the last one is positive.
    return tuple(sorted(labels, key=lambda name: -counts[name]))


def _with_positive(labels: tuple[str, ...], positive: str) -> tuple[str, ...]:
    index = label_index(Task("binary", labels))
    name = positive if positive in index else positive.lower()
    if name not in index:
        raise SidelightError(f"positive='{positive}' is no label.{did_you_mean(positive, labels)}")
    return labels if index[name] == 1 else labels[::-1]


def _require_classes(counts: Counter[str], column: str) -> None:
    rows = counts.total()
    if len(counts) == 1:
        raise SidelightError(
            f"Column '{column}' holds one label only, '{next(iter(counts))}', in all {rows} rows. "
            "Add examples of another class."
        )
    if len(counts) > min(MOST_LABELS, max(2, rows / 2)):
        shown = ", ".join(repr(name[:20]) for name in list(counts)[:3])
        raise SidelightError(
            f"Column '{column}' holds {len(counts)} distinct values in {rows} rows ({shown}, ...): "
            "that looks like free text or a measurement, not classes. Name the column of labels, "
            f"and give at least two examples of each, at most {MOST_LABELS} labels."
        )


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
