"""Tables for people: Markdown, LaTeX, and the terminal. Knows figures, not how they were made."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sidelight.reproduction.figures import SHOWN, RowFigures, Spread, TableFigures
from sidelight.training import score_name

if TYPE_CHECKING:
    from rich.table import Table

_HEADINGS = {
    "auprc": "AUPRC",
    "f1": "F1",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "recall_at_1pct_fpr": "recall at 1 % FPR",
    "ece": "ECE",
}
# Beginnings of the headings for which a terminal has no room.
_FILE_ONLY = ("macro F1", "validation", "single pass", "parameters")
_LATEX = str.maketrans(
    {
        **{special: f"\\{special}" for special in "%&_#${}"},
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
        "\\": r"\textbackslash{}",
        "±": r"$\pm$",
    }
)


@dataclass(frozen=True)
class Grid:
    """A table as text.

    Attributes:
        title: Above it.
        headings: Of the columns.
        lines: Cells of each row.
        bold: The row that is ours; None if there is none.
    """

    title: str
    headings: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    bold: int | None


def grid(figures: TableFigures) -> Grid:
    """The cells of a table: the compared metric comes first, with its interval."""
    others = [name for name in SHOWN if name != figures.metric]
    first = heading(figures.metric)
    headings = (
        "row",
        first,
        "chosen seed [95 % CI]",
        *map(heading, others),
        f"validation {score_name(figures.rows[0].chosen.task)}",
        "parameters",
        "single pass",
    )
    lines = [_line(row, figures.metric, others) for row in figures.rows]
    if any(row.difference for row in figures.rows):
        headings += (f"ours - row, {first}", "p")
        lines = [line + _compared(row) for line, row in zip(lines, figures.rows, strict=True)]
    names = [row.row.name for row in figures.rows]
    bold = names.index(figures.ours) if figures.ours in names else None
    return Grid(f"{figures.title} ({figures.texts:,} texts)", headings, tuple(lines), bold)


def heading(metric: str) -> str:
    """A metric's name for people."""
    return _HEADINGS.get(metric, metric.replace("_", " "))


def markdown(one: Grid) -> str:
    """A Markdown table under its title."""
    lines = [
        tuple(text and f"**{text}**" for text in line) if place == one.bold else line
        for place, line in enumerate([tuple(map(cell, line)) for line in one.lines])
    ]
    rule = ("---",) * len(one.headings)
    rows = (f"| {' | '.join(line)} |" for line in (tuple(map(cell, one.headings)), rule, *lines))
    return f"## {one.title}\n\n" + "\n".join(rows) + "\n"


def cell(text: str) -> str:
    """A text in a cell of a Markdown table, which a bar would end."""
    return " ".join(text.split()).replace("|", r"\|")


def latex(one: Grid) -> str:
    """A LaTeX table for the package booktabs."""
    lines = [
        tuple(text and rf"\textbf{{{text}}}" for text in line) if place == one.bold else line
        for place, line in enumerate([tuple(map(_escaped, line)) for line in one.lines])
    ]
    body = "\n".join(" & ".join(line) + r" \\" for line in lines)
    head = " & ".join(map(_escaped, one.headings)) + r" \\"
    columns = "l" + "r" * (len(one.headings) - 1)
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{_escaped(one.title)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            head,
            r"\midrule",
            body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def terminal(one: Grid) -> "Table":
    """The columns that fit a terminal; print it with ``rich``."""
    from rich.table import Table
    from rich.text import Text

    # What rows are compared by is the second column, whatever it is.
    shown = [n for n, name in enumerate(one.headings) if n < 2 or not name.startswith(_FILE_ONLY)]
    table = Table(title=one.title, title_justify="left")
    for place in shown:
        table.add_column(one.headings[place], justify="right" if place else "left")
    for number, line in enumerate(one.lines):
        style = "bold" if number == one.bold else ""
        table.add_row(*(Text(line[place], style=style) for place in shown))
    return table


def _line(row: RowFigures, metric: str, others: Sequence[str]) -> tuple[str, ...]:
    return (
        row.row.title,
        _spread(row.spread(metric)),
        str(row.chosen.metrics[metric]),
        *(_spread(row.spread(name)) for name in others),
        _spread(row.validation),
        f"{row.parameters:,}",
        "yes" if row.row.is_single_pass else "no",
    )


def _compared(row: RowFigures) -> tuple[str, str]:
    found = row.difference
    if found is None:
        return "", ""
    return str(found.estimate), "" if found.p_value is None else f"{found.p_value:.3f}"


def _spread(one: Spread) -> str:
    if one.mean is None:
        return "-"
    several = len(one.values) > 1
    return f"{one.mean:.3f} ± {one.deviation:.3f}" if several else f"{one.mean:.3f}"


def _escaped(text: str) -> str:
    return text.translate(_LATEX)
