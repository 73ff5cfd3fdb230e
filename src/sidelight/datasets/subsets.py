"""Which test rows belong to a named subset, by a column of truth values."""

from collections.abc import Iterable
from enum import Enum

import numpy as np
from jaxtyping import Int

from sidelight.data import Examples
from sidelight.data.label_names import TRUTH, is_missing, label_name
from sidelight.datasets.publication import Subset
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


def find_subsets(test: Examples, subsets: Iterable[Subset]) -> dict[str, Int[np.ndarray, " row"]]:
    """Row positions of each subset; those whose column is absent, or that are empty, are left out.

    Raises:
        SidelightError: A cell of the column is neither empty nor a truth value.
    """
    rows = {subset.name: _rows(test, subset) for subset in subsets}
    return {name: positions for name, positions in rows.items() if len(positions)}


def _rows(test: Examples, subset: Subset) -> Int[np.ndarray, " row"]:
    values = truth_values(test, subset.column) or ()
    return np.flatnonzero([value is Truth(subset.holds) for value in values])


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
