"""One row of a source, and the kinds of cell it may hold. Knows no file format."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard

import numpy as np

from sidelight.errors import SidelightError, did_you_mean

Unit = Literal["line", "row"]

_LONGEST_NAME = 40


@dataclass(frozen=True, slots=True)
class Row:
    """The cells of one row, and where they stood.

    Attributes:
        source: Name of the file or data set, for messages.
        unit: What `number` counts.
        number: Position in the source, from 1.
        cells: Value of each column.
    """

    source: str
    unit: Unit
    number: int
    cells: Mapping[str, object]

    @property
    def place(self) -> str:
        """Where the row stands, as the start of an error message."""
        return f"{self.source}, {self.unit} {self.number}"


def column_names(rows: Iterable[Row]) -> tuple[str, ...]:
    """The columns that at least one row has, in the order in which they appear."""
    return tuple(dict.fromkeys(name for row in rows for name in row.cells))


def require_column(name: str, *, rows: Sequence[Row], known: Iterable[str], remedy: str) -> None:
    """Checks that a column exists.

    Raises:
        SidelightError: No row has the column; the message ends with the remedy.
    """
    known = tuple(known)
    if name in known:
        return
    shown = [column[:_LONGEST_NAME] for column in known]
    raise SidelightError(
        f"{rows[0].source}: no column '{name}'.{did_you_mean(name, shown)} {remedy}"
    )


def plain(value: object) -> object:
    """A NumPy array as a list and a NumPy scalar as Python's own; all else as it is."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def require_whole_characters(text: str, *, place: str) -> None:
    """Checks that a text can be written as UTF-8.

    Raises:
        SidelightError: It holds half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SidelightError(
            f"{place}: the text holds half a character (a lone surrogate) at position "
            f"{error.start}. Remove it, or write the file again from the original."
        ) from error


def is_mapping(value: object) -> TypeGuard[Mapping[str, object]]:
    """Whether a cell is an object with named fields."""
    return isinstance(value, Mapping)


def is_list(value: object) -> TypeGuard[Sequence[object]]:
    """Whether a cell is a list; a string is not."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
