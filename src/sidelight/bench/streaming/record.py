"""The figures with what they were measured on, as files."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from sidelight.bench.streaming.outcomes import FIGURES, Estimate
from sidelight.storage import write_text
from sidelight.streaming_rule import StreamingRule


@dataclass(frozen=True)
class Row:
    """One detector on the test responses.

    Attributes:
        title: Its name.
        rules: The chosen rule of each training seed.
        figures: With intervals.
        recalls: Share that is caught of each positive label of the data.
        caught: Share of the positive responses that are caught after each token.
        alarmed: Share of the others on which it fired after each token.
    """

    title: str
    rules: tuple[StreamingRule, ...]
    figures: Mapping[str, Estimate]
    recalls: Mapping[str, float]
    caught: tuple[float, ...]
    alarmed: tuple[float, ...]


@dataclass(frozen=True)
class Record:
    """What was measured, and on what.

    Attributes:
        conditions: Of the run.
        rows: The detectors.
    """

    conditions: Mapping[str, str | int]
    rows: tuple[Row, ...]

    def to_json(self) -> str:
        """Everything, for programs."""
        rows = [asdict(row) for row in self.rows]
        content = {"conditions": dict(self.conditions), "rows": rows}
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """The conditions in a line, the figures, and the rules."""
        line = ", ".join(f"{name} {value}" for name, value in self.conditions.items())
        figures = [["detector", *FIGURES]]
        figures += [
            [row.title, *(_cell(row.figures[name]) for name in FIGURES)] for row in self.rows
        ]
        labels = list(self.rows[0].recalls)
        details = [["detector", "rule of each seed", *(f"recall of {label}" for label in labels)]]
        details += [
            [row.title, _rules(row), *(f"{row.recalls[label]:.3f}" for label in labels)]
            for row in self.rows
        ]
        return "\n\n".join([line, _table(figures), _table(details)]) + "\n"

    def save(self, directory: Path) -> None:
        """Writes ``streaming.json`` and ``streaming.md``; the folder is made if absent."""
        write_text(directory / "streaming.json", self.to_json())
        write_text(directory / "streaming.md", self.to_markdown())


def _cell(estimate: Estimate) -> str:
    return " ".join(
        [_number(estimate.value), f"[{_number(estimate.low)}, {_number(estimate.high)}]"]
    )


def _number(value: float | None) -> str:
    """Shares with three digits, counts of tokens with one."""
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 2 else f"{value:.1f}"


def _rules(row: Row) -> str:
    said = [
        f"{rule.consecutive} at {rule.threshold:g}, warm-up {rule.warm_up}" for rule in row.rules
    ]
    return "; ".join(said)


def _table(lines: list[list[str]]) -> str:
    rule = ["---", *("---:" for _ in lines[0][1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:]))
