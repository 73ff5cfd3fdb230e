"""The figures with what they were measured on, as files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from sidelight.storage import write_text


@dataclass(frozen=True)
class Round:
    """Seconds until an answer was complete, with probes and without, one after the other."""

    p50_with: float
    p50_without: float
    p99_with: float
    p99_without: float


@dataclass(frozen=True)
class Span:
    """Resident memory at the first round and after the last, MB; None where it is not known."""

    first: float | None
    last: float | None


@dataclass(frozen=True)
class Record:
    """What was measured, and on what. Pairs are of the server with probes, and without.

    Attributes:
        conditions: Of the run.
        rounds: Times.
        answers: Of the server with probes.
        endings: How often each ending came there.
        faults: How many answers of it had each fault.
        waiting: Most requests that stood in line.
        running: Most requests that were written at once.
        memory: Of the servers.
    """

    conditions: Mapping[str, str | int | float]
    rounds: tuple[Round, ...]
    answers: int
    endings: Mapping[str, int]
    faults: Mapping[str, int]
    waiting: tuple[int, ...]
    running: tuple[int, ...]
    memory: tuple[Span, ...]

    @property
    def is_sound(self) -> bool:
        """Whether nothing was lost, duplicated, swapped, or let through."""
        return self.answers > 0 and not any(self.faults.values())

    def to_json(self) -> str:
        """Everything, for programs."""
        return json.dumps({**asdict(self), "is_sound": self.is_sound}, indent=2) + "\n"

    def to_markdown(self) -> str:
        """The conditions in a line, the times, and the faults."""
        line = ", ".join(f"{name} {value}" for name, value in self.conditions.items())
        times = [
            "| seconds of an answer, median over rounds (range) | with probes | without | ratio |",
            "| --- | ---: | ---: | ---: |",
            _times("p50", [(one.p50_with, one.p50_without) for one in self.rounds]),
            _times("p99", [(one.p99_with, one.p99_without) for one in self.rounds]),
        ]
        faults = ["| fault | answers |", "| --- | ---: |"]
        faults += [f"| {name} | {number} |" for name, number in self.faults.items()]
        ends = ", ".join(f"{name} {number}" for name, number in self.endings.items())
        states = [
            f"{self.answers} answers with probes ({ends}).",
            f"Most requests in line {_pair(self.waiting)}, written at once {_pair(self.running)}.",
            f"Memory of the server, MB: {'; without probes '.join(map(_span, self.memory))}.",
        ]
        return "\n\n".join([line, "\n".join(times), "\n".join(faults), " ".join(states)]) + "\n"

    def save(self, directory: Path) -> None:
        """Writes ``load.json`` and ``load.md``; the folder is made if absent."""
        write_text(directory / "load.json", self.to_json())
        write_text(directory / "load.md", self.to_markdown())


def _times(name: str, pairs: Sequence[tuple[float, float]]) -> str:
    judging, plain = zip(*pairs, strict=True)
    ratios = [own / other for own, other in pairs]
    return f"| {name} | {_range(judging)} | {_range(plain)} | {_range(ratios)} |"


def _range(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _pair(values: Sequence[int]) -> str:
    return f"{values[0]} (without probes {values[1]})"


def _span(span: Span) -> str:
    if span.first is None or span.last is None:
        return "not known"
    return f"{span.first:.0f} to {span.last:.0f}"
