"""What a server says of itself while it is asked: its line, its counts, its memory.

The figures with what they were measured on, as files.

A server with probes and policies, and one without, asked in turn by as many clients.
"""

import asyncio
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from urllib.request import urlopen

import numpy as np

from sidelight.backbone import load_backbone
from sidelight.progress import progress
from sidelight.server.process import ServerProcess
from sidelight.storage import write_text
from sidelight_lab.bench.load_clients import (
    PROMPT_PROBES,
    Answer,
    Asking,
    Prepared,
    Ticket,
    ask_for,
    endings,
    faults,
    prepare,
    tickets,
)

_EVERY_S = 0.5
_TIMEOUT_S = 300.0
_MB = 1e6


@dataclass
class Watcher:
    """Keeps the longest line that it sees.

    Attributes:
        url: Of the server.
        waiting: Most requests in line.
        running: Most requests being written.
    """

    url: str
    waiting: int = 0
    running: int = 0

    async def watch(self) -> None:
        """Looks until it is cancelled."""
        while True:
            text = await asyncio.to_thread(read_metrics, self.url)
            self.waiting = max(self.waiting, int(total(text, "sidelight_requests_waiting")))
            self.running = max(self.running, int(total(text, "sidelight_requests_running")))
            await asyncio.sleep(_EVERY_S)


def read_metrics(url: str) -> str:
    """The server's Prometheus text."""
    with urlopen(f"{url}/metrics", timeout=_TIMEOUT_S) as answer:
        return answer.read().decode()


def total(text: str, series: str, *, containing: str = "") -> float:
    """The sum of a series over its labels, or over those that contain some text."""
    lines = re.findall(rf"^{series}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
    return sum(float(value) for labels, value in lines if containing in labels)


def resident_mb(pid: int) -> float | None:
    """Memory of a process, MB; None where the system does not tell."""
    path = Path(f"/proc/{pid}/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", path.read_text()) if path.exists() else None
    return int(found[1]) * 1024 / _MB if found else None


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


_WARM_UP_S = 5.0


@dataclass(frozen=True)
class Settings:
    """How a load test runs.

    Attributes:
        model: As `load_backbone` takes it.
        clients: At once.
        seconds: With probes, in all.
        round_s: Of one round with probes.
        plain_round_s: Of one without, which follows or precedes it.
        max_tokens: Of an answer.
    """

    model: str = "smollm2"
    clients: int = 64
    seconds: float = 600.0
    round_s: float = 60.0
    plain_round_s: float = 20.0
    max_tokens: int = 16


@dataclass(frozen=True)
class _Side:
    """One of the two servers."""

    server: ServerProcess
    asking: Asking
    watcher: Watcher


def run_load(settings: Settings, directory: Path) -> Record:
    """Trains the probes, starts both servers, and asks them in turn.

    Args:
        settings: How.
        directory: For probes, policy and activations.
    """
    backbone = load_backbone(settings.model)
    prepared = prepare(backbone, directory)
    name = backbone.name
    del backbone
    model = ("--model", settings.model)
    guarded = (*model, "--policy", str(prepared.policy))
    with (
        ServerProcess(prepared.probes, options=guarded) as judging,
        ServerProcess((), options=model) as plain,
    ):
        for server in (judging, plain):
            server.wait_until_ready()
        sides = [_side(server, settings, name) for server in (judging, plain)]
        return asyncio.run(_run(settings, sides, prepared))


def _side(server: ServerProcess, settings: Settings, model: str) -> _Side:
    # Without probes nobody is blocked. Such a ticket is answered with one token there, so that
    # both servers read and write as much.
    asking = Asking(server.url, model, settings.max_tokens, blocked_tokens=1)
    return _Side(server, asking, Watcher(server.url))


async def _run(settings: Settings, sides: Sequence[_Side], prepared: Prepared) -> Record:
    queue = tickets()
    for side in sides:
        await _round(side, queue, settings, seconds=min(_WARM_UP_S, settings.round_s))
    before = [resident_mb(side.server.pid) for side in sides]
    seen = _judged(sides[0])
    rounds = max(1, round(settings.seconds / settings.round_s))
    lengths = (settings.round_s, settings.plain_round_s)
    answers: list[list[list[Answer]]] = [[], []]
    with progress("Asking", rounds * sum(lengths), unit="seconds") as shown:
        for number in range(rounds):
            # Neither goes first in every round.
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                got = await _round(sides[which], queue, settings, seconds=lengths[which])
                answers[which].append(got)
                shown.advance(lengths[which])
    judged = [answer for own in answers[0] for answer in own]
    return Record(
        conditions={
            "model": settings.model,
            "clients": settings.clients,
            "rounds": rounds,
            "round s": settings.round_s,
            "without probes s": settings.plain_round_s,
            "load before": round(os.getloadavg()[0], 1),
            "cores": os.cpu_count() or 0,
            "tokens of an answer": settings.max_tokens,
            "probes": len(prepared.probes),
        },
        rounds=tuple(_compare(*pair) for pair in zip(*answers, strict=True)),
        answers=len(judged),
        endings=endings(judged),
        faults={
            **faults(judged),
            "judged by the server, but not answered, or the reverse": abs(
                _judged(sides[0]) - seen - len(judged)
            ),
        },
        waiting=tuple(side.watcher.waiting for side in sides),
        running=tuple(side.watcher.running for side in sides),
        memory=tuple(
            Span(first, resident_mb(side.server.pid))
            for first, side in zip(before, sides, strict=True)
        ),
    )


def _judged(side: _Side) -> int:
    """Verdicts that the server has counted of one probe of the prompt."""
    text = read_metrics(side.server.url)
    probe = f'probe="{PROMPT_PROBES[0]}"'
    return int(total(text, "sidelight_verdicts_total", containing=probe))


async def _round(
    side: _Side, queue: Iterator[Ticket], settings: Settings, *, seconds: float
) -> list[Answer]:
    watching = asyncio.create_task(side.watcher.watch())
    try:
        return await ask_for(side.asking, queue, clients=settings.clients, seconds=seconds)
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


def _compare(judging: Sequence[Answer], plain: Sequence[Answer]) -> Round:
    return Round(*(_percentile(own, p) for p in (50, 99) for own in (judging, plain)))


def _percentile(answers: Sequence[Answer], percent: int) -> float:
    """Seconds of an answer that is written out: blocked ones are short."""
    seconds = [own.seconds for own in answers if own.id is not None and not own.ticket.is_abuse]
    return float(np.percentile(seconds, percent)) if seconds else float("nan")
