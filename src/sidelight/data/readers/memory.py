"""Rows that the caller already holds."""

from collections.abc import Mapping, Sequence

from sidelight.data.rows import Row, is_list, is_mapping
from sidelight.errors import SidelightError

InMemory = Sequence[Mapping[str, object]] | Sequence[Sequence[object]]

_SOURCE = "Given rows"


def read_memory(source: InMemory, *, text: str, label: str) -> list[Row]:
    """One row per mapping, or per (text, label) pair.

    Args:
        source: Mappings or pairs.
        text: Column that the first half of a pair becomes.
        label: Column that the second half of a pair becomes.

    Raises:
        SidelightError: There are no rows, or one is neither a mapping nor a pair.
    """
    if not source:
        raise SidelightError("There are no rows. Give at least one example.")
    return [
        Row(
            _SOURCE,
            "row",
            number,
            cells if is_mapping(cells) else _pair(cells, text, label, number),
        )
        for number, cells in enumerate(source, start=1)
    ]


def _pair(cells: object, text: str, label: str, number: int) -> dict[str, object]:
    if not is_list(cells) or len(cells) != 2:
        raise SidelightError(
            f"{_SOURCE}, row {number}: expected a mapping or a (text, label) pair, "
            f"got {str(cells)[:60]}."
        )
    return {text: cells[0], label: cells[1]}
