"""Conversion of label cells to a task and an array. Independent of file formats and texts."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from difflib import get_close_matches
from numbers import Real

import numpy as np
from jaxtyping import Int

from sidelight.data.readers import Row, is_list
from sidelight.errors import SidelightError, did_you_mean, warn
from sidelight.models.conversation import require_valid_unicode
from sidelight.types import Numbers, Task, is_label

_PAIRS = (("0", "1"), ("false", "true"), ("no", "yes"))
TRUTH = {name: name == pair[1] for pair in _PAIRS for name in pair}
_MISSING = frozenset({"", "nan", "null"})
_INTEGER = re.compile(r"(-?\d+)(\.0*)?")
_MOST_LABELS = 200


def is_missing(cell: object) -> bool:
    """Whether a cell has no label: None, NaN, or one of the texts "", "nan" and "null"."""
    return cell is None or str(cell).strip().lower() in _MISSING


def truth_value(cell: object, place: str, column: str) -> bool:
    """The truth value of a cell: 0/1, true/false or no/yes, in any spelling."""
    name = label_name(cell, f"{place}, column '{column}'")
    if name not in TRUTH:
        raise SidelightError(
            f"{place}: column '{column}' holds '{name[:60]}'. Write one of {', '.join(TRUTH)}."
        )
    return TRUTH[name]


def encode_labels(
    rows: Sequence[Row], columns: Sequence[str], *, positive: str | None, task: Task | None
) -> tuple[Task, Int[Numbers, "row ..."]]:
    """Encode one column of labels or of lists of labels, or several columns of 0/1.

    Args:
        rows: One or more rows without missing labels.
        columns: Names of the columns.
        positive: The positive class of a binary task.
        task: The label space to map to, for evaluation; None infers one from the labels.

    Returns:
        The task, and the labels as in ``LabelledExamples``.
    """
    is_single = len(columns) == 1 and not is_list(rows[0].cells[columns[0]])
    if positive is not None and (task is not None or not is_single):
        raise SidelightError(
            f"A positive class ('{positive}') can be chosen only if two classes are inferred "
            "from one column. Leave --positive out (positive= in Python)."
        )
    if task is not None and (task.kind == "multilabel") == is_single:
        raise SidelightError(
            f"The task is {task.kind} ({', '.join(task.labels)}), but '{', '.join(columns)}' "
            f"holds {'one label' if is_single else 'several labels'} per text. A multi-label "
            "task needs lists of labels, or one 0/1 column per label; any other task needs one "
            "label per text."
        )
    if not is_single:
        encoded_task, labels = _encode_sets(rows, columns, task)
        if task is None:
            _warn_of_alike(encoded_task.labels)
        return encoded_task, labels
    names = [label_name(row.cells[columns[0]], row.place) for row in rows]
    if task is None:
        task = _infer_classes(rows, names, columns[0], positive)
        _warn_of_alike(task.labels)
    index = _label_index(task)
    numbers = [_lookup(row, name, index) for row, name in zip(rows, names, strict=True)]
    return task, np.array(numbers, dtype=np.int64)


def label_name(cell: object, place: str) -> str:
    """The normalised spelling of a label, independent of the file format.

    1, 1.0, "1" and " 1 " all become "1"; True and "TRUE" become "true", "Yes" becomes "yes". All
    other names keep their case.
    """
    if not isinstance(cell, str | Real | Decimal):
        raise SidelightError(
            f"{place}: expected one label (a text, a number or a truth value), got "
            f"{str(cell)[:60]}. Write one label in every row, or a list of labels in every row. "
            "For a column of spans, use `sidelight train --spans`."
        )
    name = str(cell).strip()
    require_valid_unicode(name, place=f"{place}: the label")
    if name.lower() in TRUTH:
        return name.lower()
    integer = _INTEGER.fullmatch(name)
    return integer.group(1) if integer else name


def _infer_classes(
    rows: Sequence[Row], names: Sequence[str], column: str, positive: str | None
) -> Task:
    """Infer a binary task from two distinct names, a multi-class task from more."""
    if set(names) <= TRUTH.keys():
        # Use a single spelling, or 0 and 1 if the column mixes several.
        pair = next((pair for pair in _PAIRS if set(names) <= set(pair)), _PAIRS[0])
        names = [pair[TRUTH[name]] for name in names]
    counts = Counter(names)
    _require_classes(counts, column)
    labels = _ordered(counts)
    misspelt = _misspelt(rows, names)
    if len(labels) > 2:
        if positive is not None:
            raise SidelightError(
                f"A positive class ('{positive}') can be chosen only between two classes, but "
                f"column '{column}' has {len(labels)}: {', '.join(labels)}. "
                f"{' '.join(misspelt) or 'Leave --positive out (positive= in Python).'}"
            )
        _warn_of_all(misspelt)
        return Task("multiclass", labels)
    if positive is not None:
        index = _label_index(Task("binary", labels))
        name = positive if positive in index else positive.lower()
        if name not in index:
            raise SidelightError(
                f"The positive class '{positive}' is not a label.{did_you_mean(positive, labels)} "
                "Name another with --positive (positive= in Python)."
            )
        _warn_of_all(misspelt)
        return Task("binary", labels if index[name] == 1 else labels[::-1])
    if set(labels) <= TRUTH.keys() or set(labels) == {"-1", "1"}:
        return Task("binary", labels)
    # The sort is stable and labels are in order, so the last label is positive in a tie.
    major, chosen = sorted(labels, key=lambda name: -counts[name])
    warn(
        f"No positive class was named, so '{chosen}' is used: the rarer label, or the last one "
        f"alphabetically in a tie. Use --positive {major} (positive= in Python) for the other "
        "one."
    )
    _warn_of_all(misspelt)
    return Task("binary", (major, chosen))


def _require_classes(counts: Mapping[str, int], column: str) -> None:
    """Refuse a column with a single label, or with too many distinct values to be classes."""
    rows = sum(counts.values())
    if len(counts) == 1:
        raise SidelightError(
            f"Column '{column}' holds only one label, '{next(iter(counts))}', in all {rows} rows. "
            "Add examples of another class."
        )
    if len(counts) > min(_MOST_LABELS, max(2, rows / 2)):
        sample = ", ".join(repr(name[:20]) for name in list(counts)[:3])
        raise SidelightError(
            f"Column '{column}' holds {len(counts)} distinct values in {rows} rows ({sample}, "
            "...), which look like free text or measurements rather than classes. Name the "
            f"column of labels. There can be at most {_MOST_LABELS} labels, and each needs at "
            "least two examples."
        )


def _warn_of_all(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        warn(sentence)


def _misspelt(rows: Sequence[Row], names: Sequence[str]) -> tuple[str, ...]:
    """A sentence for each rare label that resembles a frequent one."""
    counts = Counter(name for name in names if not _INTEGER.fullmatch(name))
    sentences: list[str] = []
    for name, count in counts.items():
        many = [name for name in counts if counts[name] >= 10 * count]
        for meant in get_close_matches(name, many, n=1, cutoff=0.75) if count < 5 else ():
            first = rows[names.index(name)].place
            sentences.append(
                f"Label '{name}' ({count} of {len(names)} rows, first {first}) resembles "
                f"'{meant}' ({counts[meant]} rows). Correct it if it is misspelt."
            )
    return tuple(sentences)


def _warn_of_alike(labels: Sequence[str]) -> None:
    """Warn about labels that look alike."""
    by_form = {unicodedata.normalize("NFKC", name).casefold(): name for name in labels}
    pairs = [
        f"'{name}' and '{another}'"
        for name in labels
        if (another := by_form[unicodedata.normalize("NFKC", name).casefold()]) != name
    ]
    if pairs:
        warn(
            f"Labels that look alike are treated as different classes: {', '.join(pairs[:3])}. "
            "If they mean the same class, use one spelling."
        )


def _ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Sort labels alphabetically, or by value if all are whole numbers; refuse invalid names."""
    labels = sorted(names)
    if all(_INTEGER.fullmatch(name) for name in labels):
        labels.sort(key=int)
    wrong = next((label for label in labels if not is_label(label)), None)
    if wrong is not None:
        raise SidelightError(
            f"The label {wrong[:80]!r} cannot name a class: it has a line break, a tab, another "
            "control character, or more than 1,000 characters. Rename it in the data."
        )
    return tuple(labels)


def _label_index(task: Task) -> dict[str, int]:
    """Index of each label; a task of 0/1, false/true or no/yes accepts all six names."""
    index = {name: number for number, name in enumerate(task.labels)}
    if task.kind == "binary" and index.keys() <= TRUTH.keys():
        number_of = {TRUTH[name]: number for name, number in index.items()}
        return {name: number_of[truth] for name, truth in TRUTH.items()}
    return index


def _lookup(row: Row, name: str, index: Mapping[str, int]) -> int:
    if name not in index:
        suggestion = (
            ""
            if row.is_beside_guard
            else ", name another column with --label, or train a probe on these labels with "
            "`sidelight train`"
        )
        raise SidelightError(
            f"{row.place}: unknown label '{name[:60]}'.{did_you_mean(name[:60], index)} "
            f"Correct the row{suggestion}."
        )
    return index[name]


def _encode_sets(
    rows: Sequence[Row], columns: Sequence[str], task: Task | None
) -> tuple[Task, Int[Numbers, "row label"]]:
    """Each row's set of labels: a list in one column, or several columns of 0/1."""
    if len(columns) > 1:
        if task is not None and set(columns) != set(task.labels):
            raise SidelightError(
                f"The task has the labels {', '.join(task.labels)}, but the columns are "
                f"{', '.join(columns)}. Name one column of 0/1 per label."
            )
        sets = [{n for n in columns if truth_value(row.cells[n], row.place, n)} for row in rows]
    else:
        sets = [_label_set(row, columns[0]) for row in rows]
    if task is None:
        names = tuple(columns) if len(columns) > 1 else _ordered(set[str]().union(*sets))
        if not 2 <= len(names) <= _MOST_LABELS:
            raise SidelightError(
                f"Got {len(names)} distinct labels, but a multi-label task needs 2 to "
                f"{_MOST_LABELS}. For a single label, use one column of 0/1."
            )
        task = Task("multilabel", names)
    index = _label_index(task)
    labels = np.zeros((len(rows), len(index)), dtype=np.int64)
    for row, row_labels, flags in zip(rows, sets, labels, strict=True):
        flags[[_lookup(row, name, index) for name in row_labels]] = 1
    for name, count in zip(task.labels, labels.sum(axis=0), strict=True):
        if count in (0, len(rows)):
            warn(
                f"{count} of {len(rows)} rows have the label '{name}', so nothing can be learned "
                "from it."
            )
    return task, labels


def _label_set(row: Row, column: str) -> set[str]:
    cell = row.cells[column]
    if not is_list(cell):
        raise SidelightError(
            f"{row.place}: expected a list of labels as in the first row, got {str(cell)[:60]}. "
            "Write [] for a text without a label."
        )
    return {label_name(value, row.place) for value in cell}
