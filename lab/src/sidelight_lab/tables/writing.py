"""A finished table as files, for people and for programs, in the terminal, and in pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from sidelight.plots import save_figure
from sidelight.storage import write_json, write_text
from sidelight.training.optimisation import score_name
from sidelight_lab.plots import COLOURS, LEGEND, literal, new_axes
from sidelight_lab.tables.figures import RowFigures, Spread, TableFigures
from sidelight_lab.tables.recipes import ProbeConfig, Row

_PLAIN = "#7d9bb5"
_SHOWN = {
    "auprc": "AUPRC",
    "f1": "F1",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "recall_at_1pct_fpr": "recall at 1 % FPR",
    "ece": "ECE",
}
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
    """A table as text."""

    title: str
    headings: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    bold: int | None = None  # the number of the row that is ours

    def markdown(self) -> str:
        return f"## {self.title}\n\n{self._tabulated('pipe', cell, '**{}**')}\n"

    def latex(self) -> str:
        """A LaTeX table for the package booktabs."""
        table = self._tabulated("latex_raw", lambda text: text.translate(_LATEX), r"\textbf{{{}}}")
        for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
            table = table.replace(r"\hline", rule, 1)
        caption = self.title.translate(_LATEX)
        return f"\\begin{{table}}\n\\caption{{{caption}}}\n{table}\n\\end{{table}}\n"

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
    """What ``reproduce`` makes: the figures of all test texts, then those of each subset."""

    title: str
    how: str  # its numbers were computed
    notes: tuple[str, ...]  # on the data, and on when test data was opened
    tables: tuple[TableFigures, ...]

    def to_dict(self) -> dict[str, Any]:
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
        grids = list(map(grid, self.tables))
        notes = "\n".join(f"- {note}" for note in self.notes)
        parts = (f"# {self.title}", self.how, notes, *(one.markdown() for one in grids))
        write_text(directory / "table.md", "\n\n".join(part.strip() for part in parts) + "\n")
        write_text(directory / "table.tex", "\n".join(one.latex() for one in grids))
        write_json(directory / "table.json", self.to_dict())


def draw_bars(figures: TableFigures, path: Path) -> None:
    """The mean of each row, its seeds as dots, and the chosen seed's 95 % interval."""
    height = 0.32 * len(figures.rows) + 1.4
    figure, axes = new_axes(7.2, height, figures.title)
    ends: list[float | None] = []
    for place, row in enumerate(figures.rows):
        spread, chosen = row.spread(figures.metric), row.chosen.metrics[figures.metric]
        ends += [*spread.values, chosen.low]
        if spread.mean is None:
            continue
        colour = COLOURS[0] if row.row.name == figures.ours else _PLAIN
        axes.barh(place, spread.mean, height=0.62, color=colour)
        values = [value for value in spread.values if value is not None]
        axes.plot(values, [place] * len(values), ".", color="black", markersize=4)
        if chosen.low is not None and chosen.high is not None:
            axes.hlines(place, chosen.low, chosen.high, color="black", linewidth=1)
    axes.set_yticks(range(len(figures.rows)), [literal(row.row.title) for row in figures.rows])
    axes.invert_yaxis()
    axes.set_xlabel(heading(figures.metric))
    # Differences between rows are small beside the values.
    lowest = min((value for value in ends if value is not None), default=0.0)
    axes.set_xlim(left=max(0.0, lowest - 0.05))
    save_figure(figure, path)


def draw_sweep(figures: TableFigures, rows: Sequence[Row], parameter: str, path: Path) -> None:
    """The metric on the test (solid) and the validation score (dashed) over the swept values."""
    probes = {row.name: row for row in rows if isinstance(row, ProbeConfig)}
    lines: dict[str, list[RowFigures]] = {}
    for row in figures.rows:
        lines.setdefault(probes[row.row.name].line, []).append(row)
    figure, axes = new_axes(7.2, 4.4, figures.title)
    # Values are usually powers of a number, so they stand at equal distances.
    values = list(dict.fromkeys(str(probe.swept) for probe in probes.values()))
    for number, (name, line) in enumerate(lines.items()):
        # Rows whose runs all diverged are missing.
        places = [values.index(str(probes[row.row.name].swept)) for row in line]
        tested = [row.spread(figures.metric) for row in line]
        spans = [one.deviation for one in tested]
        colour = COLOURS[number % len(COLOURS)]
        axes.errorbar(
            places, _means(tested), yerr=spans, color=colour, marker="o", label=literal(name)
        )
        held_out = _means([row.validation for row in line])
        axes.plot(places, held_out, color=colour, linestyle="--", linewidth=1)
    axes.set_xticks(range(len(values)), values)
    axes.plot([], [], color="black", linestyle="--", linewidth=1, label="validation")
    axes.set(xlabel=parameter.replace("_", " "), ylabel=heading(figures.metric))
    axes.legend(**LEGEND)
    save_figure(figure, path)


def _means(spreads: list[Spread]) -> list[float]:
    return [np.nan if one.mean is None else one.mean for one in spreads]
