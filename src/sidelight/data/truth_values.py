"""A column of truth values, such as one that says which rows are a subset."""

from enum import Enum

from sidelight.data.examples import Examples
from sidelight.data.label_names import TRUTH, is_missing, label_name
from sidelight.errors import SidelightError


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
