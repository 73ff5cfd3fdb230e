"""Output of a finished table, for people and programs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from sidelight.storage import write_json, write_text
from sidelight_lab.search import score_name
from sidelight_lab.tables.metrics import RowMetrics, TableMetrics

_HEADINGS = {
    "auprc": "AUPRC",
    "f1": "F1",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "recall_at_1pct_fpr": "recall at 1 % FPR",
    "ece": "ECE",
}


def markdown_table(title: str, headings: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """A Markdown table under its title."""
    cells = [list(map(_cell, line)) for line in lines]
    return f"## {title}\n\n{_tabulated(list(map(_cell, headings)), cells, 'pipe')}\n"


def _cell(content: object) -> str:
    """Format a cell on one line, escaping bars, which would end it."""
    return " ".join(str(content).split()).replace("|", r"\|")


def latex_table(title: str, headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A LaTeX table for the package booktabs; its caption is a comment."""
    return f"% {title}\n{_tabulated(headings, lines, 'latex_booktabs')}\n"


def _tabulated(headings: Sequence[str], lines: Sequence[Sequence[str]], style: str) -> str:
    align = ("left", *["right"] * (len(headings) - 1))
    # Cells are texts: "0.860" must not become 0.86.
    return tabulate(lines, headings, style, disable_numparse=True, colalign=align)


def cells(metrics: TableMetrics) -> tuple[list[str], list[list[str]]]:
    """Headings and lines; the metric that rows are compared by comes first, with its interval."""
    further = [name for name in _HEADINGS if name != metrics.metric]
    metric = _heading(metrics.metric)
    task = metrics.rows[0].reports[0].task
    headings = [
        "row",
        metric,
        "chosen seed [95 % CI]",
        *map(_heading, further),
        f"validation {score_name(task)}",
        "parameters",
        "single pass",
    ]
    is_compared = any(row.difference for row in metrics.rows)
    if is_compared:
        headings += [f"ours - row, {metric}", "p"]
    lines: list[list[str]] = []
    for row in metrics.rows:
        line = [
            row.row.title,
            str(row.metrics[metrics.metric]),
            str(row.reports[row.chosen].metrics[metrics.metric]),
            *(str(row.metrics[name]) for name in further),
            str(row.validation),
            f"{row.runs[row.chosen].parameters:,}",
            "yes" if row.row.is_single_pass else "no",
        ]
        lines.append(line + _compared(row) if is_compared else line)
    return headings, lines


def _heading(metric: str) -> str:
    return _HEADINGS.get(metric, metric.replace("_", " "))


def _compared(row: RowMetrics) -> list[str]:
    compared = row.difference
    if compared is None:
        return ["", ""]
    return [str(compared.estimate), "" if compared.p_value is None else f"{compared.p_value:.3f}"]


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
    tables: tuple[TableMetrics, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "tables": [table.to_dict() for table in self.tables]}

    def write(self, directory: Path) -> None:
        tables = [
            (f"{table.title} ({table.texts:,} texts)", *cells(table)) for table in self.tables
        ]
        notes = "\n".join(f"- {note}" for note in self.notes)
        sections = (
            f"# {self.title}",
            self.how,
            notes,
            *(markdown_table(*table) for table in tables),
        )
        write_text(
            directory / "table.md", "\n\n".join(section.strip() for section in sections) + "\n"
        )
        write_text(directory / "table.tex", "\n".join(latex_table(*table) for table in tables))
        write_json(directory / "table.json", self.to_dict())
