"""How one label is spelled, so that every file format gives the same names.

1, 1.0, "1" and " 1 " are all the label "1". True and "TRUE" are "true", "Yes" is "yes". Upper and
lower case differ in all other names.
"""

import re
from collections.abc import Iterable
from decimal import Decimal
from numbers import Real

from sidelight.data.rows import plain, require_whole_characters
from sidelight.errors import SidelightError
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
