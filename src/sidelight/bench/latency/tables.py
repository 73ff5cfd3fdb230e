"""Rows as tables: loads across, subjects down, one set of tables for each batch size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sidelight.bench.latency.measuring import Range, Row

if TYPE_CHECKING:
    from rich.table import Table

_MB = 1e6


@dataclass(frozen=True)
class Grid:
    """A table of text.

    Attributes:
        title: What the cells hold.
        columns: Heads; the first is of the lines' names.
        lines: Cells, a name first.
    """

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The title in bold and a Markdown table."""
        rule = ("---", *("---:" for _ in self.columns[1:]))
        lines = [f"| {' | '.join(cells)} |" for cells in (self.columns, rule, *self.lines)]
        return "\n".join([f"**{self.title}**", "", *lines])

    def table(self) -> "Table":
        """For a terminal."""
        from rich.table import Table

        table = Table(title=self.title, title_justify="left")
        for place, column in enumerate(self.columns):
            table.add_column(column, justify="right" if place else "left")
        for cells in self.lines:
            table.add_row(*cells)
        return table


def grids(rows: Sequence[Row]) -> list[Grid]:
    """Time, time over the first subject's, and memory, for each batch size."""
    made: list[Grid] = []
    for size in dict.fromkeys(row.batch_size for row in rows):
        own = [row for row in rows if row.batch_size == size]
        base = own[0].subject
        made += [
            _grid(f"Batch {size}: ms per text, median (range)", own, _time),
            _grid(f"Batch {size}: time over {base}'s, median (range)", own, _ratio),
            _grid(f"Batch {size}: peak memory, MB (of it weights)", own, _memory),
        ]
    return made


def _grid(title: str, rows: Sequence[Row], show: Callable[[Row], str]) -> Grid:
    cells = {(row.subject, row.load): show(row) for row in rows}
    loads = list(dict.fromkeys(row.load for row in rows))
    subjects = list(dict.fromkeys(row.subject for row in rows))
    lines = tuple((name, *(cells.get((name, load), "-") for load in loads)) for name in subjects)
    return Grid(title, ("", *loads), lines)


def _time(row: Row) -> str:
    return _range(row.ms, digits=1)


def _ratio(row: Row) -> str:
    return _range(row.ratio, digits=2)


def _memory(row: Row) -> str:
    if row.working_bytes is None:
        return "-"
    weights = row.weights_bytes / _MB
    return f"{weights + row.working_bytes / _MB:,.0f} ({weights:,.0f})"


def _range(values: Range, *, digits: int) -> str:
    return f"{values.median:.{digits}f} ({values.low:.{digits}f} to {values.high:.{digits}f})"
