"""The folder of a table: for people, for programs, and for whoever wants to make it again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidelight.reproduction.figures import TableFigures
from sidelight.reproduction.tables import grid, latex, markdown
from sidelight.storage import write_json, write_text

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
