"""A finished table as files, for people and for programs, and in the terminal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from sidelight.storage import write_json, write_text
from sidelight.training.optimisation import score_name
from sidelight_lab.tables.figures import RowFigures, Spread, TableFigures

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = {
    "auprc": "AUPRC",
    "f1": "F1",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "recall_at_1pct_fpr": "recall at 1 % FPR",
    "ece": "ECE",
}
# Headings that begin like these are left out in a terminal, for lack of room.
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
        lines: The cells of each row.
        bold: Number of the row that is ours; None if there is none.
    """

    title: str
    headings: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    bold: int | None = None

    def markdown(self) -> str:
        """A Markdown table under its title."""
        return f"## {self.title}\n\n{self._tabulated('pipe', cell, '**{}**')}\n"

    def latex(self) -> str:
        """A LaTeX table for the package booktabs."""
        table = self._tabulated("latex_raw", lambda text: text.translate(_LATEX), r"\textbf{{{}}}")
        for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
            table = table.replace(r"\hline", rule, 1)
        caption = self.title.translate(_LATEX)
        return f"\\begin{{table}}\n\\caption{{{caption}}}\n{table}\n\\end{{table}}\n"

    def terminal(self) -> "Table":
        """The columns that fit a terminal; print it with ``rich``."""
        from rich.table import Table
        from rich.text import Text

        # The second column holds the metric that rows are compared by.
        shown = [
            place
            for place, name in enumerate(self.headings)
            if place < 2 or not name.startswith(_FILE_ONLY)
        ]
        table = Table(title=self.title, title_justify="left")
        for place in shown:
            table.add_column(self.headings[place], justify="right" if place else "left")
        for number, line in enumerate(self.lines):
            style = "bold" if number == self.bold else ""
            table.add_row(*(Text(line[place], style=style) for place in shown))
        return table

    def _tabulated(self, style: str, escape: Callable[[str], str], bold: str) -> str:
        lines = [list(map(escape, line)) for line in self.lines]
        if self.bold is not None:
            lines[self.bold] = [text and bold.format(text) for text in lines[self.bold]]
        headings = list(map(escape, self.headings))
        align = ("left", *["right"] * (len(headings) - 1))
        # Cells are texts: "0.860" must not become 0.86.
        return tabulate(lines, headings, style, disable_numparse=True, colalign=align)


def cell(text: str) -> str:
    """A text in a cell of a Markdown table, which a bar would end."""
    return " ".join(text.split()).replace("|", r"\|")


def heading(metric: str) -> str:
    """A metric's name for people."""
    return _SHOWN.get(metric, metric.replace("_", " "))


def grid(figures: TableFigures) -> Grid:
    """The table as text: the metric that rows are compared by comes first, with its interval."""
    others = [name for name in _SHOWN if name != figures.metric]
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
        lines = [(*line, *_compared(row)) for line, row in zip(lines, figures.rows, strict=True)]
    names = [row.row.name for row in figures.rows]
    bold = names.index(figures.ours) if figures.ours in names else None
    return Grid(f"{figures.title} ({figures.texts:,} texts)", headings, tuple(lines), bold)


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
    return f"{one.mean:.3f} ± {one.deviation:.3f}" if len(one.values) > 1 else f"{one.mean:.3f}"


HOW = (
    "Mean ± standard deviation over seeds. The seed with the best validation score is the chosen "
    "one; its interval is a 95 % bootstrap over test texts. Calibration (Platt) and threshold are "
    "fitted to validation texts. 'ours - row' is the difference of the means over seeds with its "
    "95 % interval, and p its two-sided paired bootstrap: the same resampled texts for both rows. "
    "Interval and p cover the choice of test texts, not that of seeds."
)
HOW_DRAWS = (
    "Mean ± standard deviation over draws of training texts. Each draw has the same number of "
    "texts of every class, and a validation part of the same size, drawn from the validation "
    "split: early stopping, settings, calibration and thresholds see no more than that, and they "
    "see balanced classes. 'ours - row' is the mean difference over the draws that both rows have; "
    "p is a paired permutation test over them, exact up to 13. All draws share the test texts."
)


@dataclass(frozen=True)
class FinishedTable:
    """What ``reproduce`` makes.

    Attributes:
        how: How its numbers were computed.
        notes: Notes on the data and on when test data was opened, one sentence each.
        tables: The table of all test texts, then one for each subset.
    """

    title: str
    how: str
    notes: tuple[str, ...]
    tables: tuple[TableFigures, ...]

    def to_dict(self) -> dict[str, Any]:
        """The tables as JSON-ready values."""
        return {
            "title": self.title,
            "how": self.how,
            "notes": list(self.notes),
            "tables": [
                {
                    "title": one.title,
                    "texts": one.texts,
                    "metric": one.metric,
                    "ours": one.ours,
                    "rows": [row.to_dict() for row in one.rows],
                }
                for one in self.tables
            ],
        }

    def write(self, directory: Path) -> None:
        """Writes ``table.md``, ``table.json`` and ``table.tex``."""
        grids = list(map(grid, self.tables))
        notes = "\n".join(f"- {note}" for note in self.notes)
        parts = (f"# {self.title}", self.how, notes, *(one.markdown() for one in grids))
        write_text(directory / "table.md", "\n\n".join(part.strip() for part in parts) + "\n")
        write_text(directory / "table.tex", "\n".join(one.latex() for one in grids))
        write_json(directory / "table.json", self.to_dict())
