"""What a soak found, as files."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sidelight.bench.soak.sampling import Sample
from sidelight.bench.soak.slope import Slope
from sidelight.storage import write_text


@dataclass(frozen=True)
class Outcomes:
    """How the visits of one kind ended.

    Attributes:
        name: The kind.
        expected: The endings that are in order.
        endings: How often each came.
    """

    name: str
    expected: tuple[str, ...]
    endings: Mapping[str, int]

    @property
    def visits(self) -> int:
        """In all."""
        return sum(self.endings.values())

    @property
    def unexpected(self) -> Mapping[str, int]:
        """The other endings."""
        return {end: n for end, n in self.endings.items() if end not in self.expected}


@dataclass(frozen=True)
class Phase:
    """The bursts of connections, or the requests.

    Attributes:
        title: What it is called.
        outcomes: By kind.
        samples: While it ran.
        seconds: How long it ran.
    """

    title: str
    outcomes: Sequence[Outcomes]
    samples: Sequence[Sample]
    seconds: float

    @property
    def most_descriptors(self) -> int:
        """Most files that were open at once."""
        return max(sample.descriptors for sample in self.samples)


@dataclass(frozen=True)
class Record:
    """What was measured, and on what.

    Attributes:
        conditions: Of the run.
        connections: The bursts.
        requests: What followed.
        slope: Of memory over the requests.
        allowed_growth: MB per 1,000 requests; the slope's interval may not lie above it.
        before: The idle server, before anything.
        after: The server at the end.
        held: Requests that its engine still had at the end.
    """

    conditions: Mapping[str, str | int | float]
    connections: Phase
    requests: Phase
    slope: Slope
    allowed_growth: float
    before: Sample
    after: Sample
    held: int

    @property
    def faults(self) -> list[str]:
        """What went wrong, each in a sentence; none in a sound run."""
        odd = [
            f"{number} of '{one.name}' ended with '{end}', not '{' or '.join(one.expected)}'."
            for phase in (self.connections, self.requests)
            for one in phase.outcomes
            for end, number in one.unexpected.items()
        ]
        if self.slope.low > self.allowed_growth:
            odd.append(f"Memory grew by {self.slope.value:.2f} MB per 1,000 requests.")
        if self.after.descriptors > self.before.descriptors:
            more = self.after.descriptors - self.before.descriptors
            odd.append(f"{more} more files were open at the end than before.")
        if self.held:
            odd.append(f"{self.held} requests were still in the engine at the end.")
        return odd

    def to_json(self) -> str:
        """Everything, for programs."""
        return json.dumps({**asdict(self), "faults": self.faults}, indent=2) + "\n"

    def to_markdown(self) -> str:
        """The conditions in a line, what became of the visits, and what the server held."""
        line = ", ".join(f"{name} {value}" for name, value in self.conditions.items())
        tables = [_table(self.connections), _table(self.requests)]
        slope = self.slope
        states = [
            f"Memory: {self.before.resident_mb:.0f} MB before, {self.after.resident_mb:.0f} after; "
            f"{slope.value:+.2f} MB per 1,000 requests after warm-up ({slope.low:+.2f} to "
            f"{slope.high:+.2f}).",
            f"Open files: {self.before.descriptors} before, at most "
            f"{self.connections.most_descriptors} in the bursts, {self.after.descriptors} after.",
            f"Requests left in the engine: {self.held}.",
        ]
        faults = ["Faults: none."] if not self.faults else ["Faults:", *self.faults]
        return "\n\n".join([line, *tables, " ".join(states), "\n".join(faults)]) + "\n"

    def save(self, directory: Path) -> None:
        """Writes ``soak.json`` and ``soak.md``; the folder is made if absent."""
        write_text(directory / "soak.json", self.to_json())
        write_text(directory / "soak.md", self.to_markdown())


def _table(phase: Phase) -> str:
    rows = [
        f"| {phase.title}, {phase.seconds:.0f} s | number | ended as they had to | otherwise |",
        "| --- | ---: | --- | --- |",
    ]
    for one in phase.outcomes:
        ends = [_counted(one.endings, of=one.expected), _counted(one.unexpected, of=one.unexpected)]
        rows.append(f"| {one.name} | {one.visits} | {' | '.join(ends)} |")
    return "\n".join(rows)


def _counted(endings: Mapping[str, int], *, of: Iterable[str]) -> str:
    return ", ".join(f"{end}: {endings[end]}" for end in of if end in endings) or "none"
