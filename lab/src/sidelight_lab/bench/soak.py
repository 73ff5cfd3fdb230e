"""What a soak found, as files.

A server process on loopback, and all that comes to it.

Memory and open files of the server over the visits.
"""

import asyncio
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter
from urllib.parse import urlsplit

from matplotlib.figure import Figure

from sidelight.artifact import save_probe
from sidelight.backbone import Backbone, load_backbone
from sidelight.plots import save_figure
from sidelight.progress import Progress, progress
from sidelight.prompts import Reads
from sidelight.server.process import ServerProcess
from sidelight.storage import write_text
from sidelight_lab.bench.soak_visits import (
    PROMPT_PROBE,
    RESPONSE_PROBE,
    Address,
    Sample,
    Sampler,
    Slope,
    Visit,
    connections,
    memory_slope,
    pay,
    requests,
    requests_held,
)
from sidelight_lab.bench.timing import untrained_probe


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


# Samples of each phase, and the share of the requests that warm the server up.
_SAMPLES = 200
_WARM_UP = 0.2
# How long the server may take to let go of what its last clients left behind.
_SETTLE_S = 60.0


@dataclass(frozen=True)
class Settings:
    """How a soak runs.

    Attributes:
        model: As `load_backbone` takes it.
        connections: In bursts.
        burst: Connections at once.
        requests: Of all kinds, after the bursts.
        clients: Requests at once.
        max_tokens: Of an answer, at least three.
        allowed_growth: Of memory, MB per 1,000 requests.
    """

    model: str = "smollm2"
    connections: int = 10_000
    burst: int = 500
    requests: int = 5_000
    clients: int = 32
    max_tokens: int = 4
    allowed_growth: float = 1.0


def run_soak(settings: Settings, directory: Path) -> Record:
    """Starts a server with two untrained probes and visits it.

    Args:
        settings: How.
        directory: For the probes.

    Raises:
        SidelightError: The server ended, or this is not Linux.
    """
    backbone = load_backbone(settings.model)
    folders = _probes(backbone, directory)
    name = backbone.name
    del backbone
    with ServerProcess(folders, options=("--model", settings.model)) as server:
        server.wait_until_ready()
        return asyncio.run(_run(settings, server, name))


def _probes(backbone: Backbone, directory: Path) -> list[Path]:
    sides = {PROMPT_PROBE: Reads("prompt"), RESPONSE_PROBE: Reads("response")}
    return [
        save_probe(untrained_probe(backbone, name, reads=reads), directory / name)
        for name, reads in sides.items()
    ]


async def _run(settings: Settings, server: ServerProcess, model: str) -> Record:
    where = urlsplit(server.url)
    address = Address(where.hostname or "", where.port or 0)
    sampler = Sampler(server.pid)
    kinds = requests(model, max_tokens=settings.max_tokens)
    # One of each kind first: the descriptors that the server opens once are none that it leaks.
    for visit in kinds:
        await pay(visit, address)
    await _settle(server.url, sampler, descriptors=0)
    before = sampler.look(0)
    bursts = await _phase(
        "connections",
        connections(),
        address,
        sampler=Sampler(server.pid),
        number=settings.connections,
        at_once=settings.burst,
        in_bursts=True,
    )
    asked = await _phase(
        "requests",
        kinds,
        address,
        sampler=Sampler(server.pid),
        number=settings.requests,
        at_once=settings.clients,
        in_bursts=False,
    )
    held = await _settle(server.url, sampler, descriptors=before.descriptors)
    return Record(
        conditions={
            "model": settings.model,
            "connections": settings.connections,
            "at once": settings.burst,
            "requests": settings.requests,
            "clients": settings.clients,
            "tokens of an answer": settings.max_tokens,
            "cores": os.cpu_count() or 0,
        },
        connections=bursts,
        requests=asked,
        slope=memory_slope(asked.samples, warm_up=int(_WARM_UP * settings.requests)),
        allowed_growth=settings.allowed_growth,
        before=before,
        after=sampler.look(settings.requests),
        held=held,
    )


async def _phase(
    title: str,
    kinds: Sequence[Visit],
    address: Address,
    *,
    sampler: Sampler,
    number: int,
    at_once: int,
    in_bursts: bool,
) -> Phase:
    """Pays so many visits, each kind in turn.

    A burst is over when all its visits are; otherwise each client goes on to the next visit.
    """
    endings: dict[str, Counter[str]] = {visit.name: Counter() for visit in kinds}
    queue = islice(cycle(kinds), number)
    every = max(1, number // _SAMPLES)
    start = perf_counter()
    done = 0

    async def work(some: Iterator[Visit], bar: Progress) -> None:
        nonlocal done
        for visit in some:
            endings[visit.name][await pay(visit, address)] += 1
            bar.advance(1)
            done += 1
            if done % every == 0:
                sampler.look(done)

    with progress(f"{title[0].upper()}{title[1:]}", number, unit=title) as bar:
        sampler.look(0)
        while in_bursts and (burst := list(islice(queue, at_once))):
            await asyncio.gather(*(work(iter([visit]), bar) for visit in burst))
        await asyncio.gather(*(work(queue, bar) for _ in range(at_once)))
    outcomes = [Outcomes(v.name, v.endings, dict(endings[v.name])) for v in kinds]
    return Phase(title, outcomes, sampler.samples, perf_counter() - start)


async def _settle(url: str, sampler: Sampler, *, descriptors: int) -> int:
    """Waits until the server holds nothing that it need not; the requests that it still holds."""
    deadline = perf_counter() + _SETTLE_S
    while perf_counter() < deadline:
        held = await asyncio.to_thread(requests_held, url)
        if held == 0 and sampler.look(0).descriptors <= (descriptors or float("inf")):
            return 0
        await asyncio.sleep(0.2)
    return await asyncio.to_thread(requests_held, url)


# matplotlib leaves the types of **kwargs open.
# pyright: reportUnknownMemberType=false


# Of Okabe & Ito's palette, told apart with any colour vision.
_MEMORY, _FILES = "#0072b2", "#d55e00"


def plot_soak(record: Record, directory: Path) -> Path:
    """Draws ``soak.png``: the bursts of connections on the left, the requests on the right.

    Args:
        record: Of a run.
        directory: Where to write; made if absent.
    """
    directory.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(9.2, 5.2), layout="constrained")
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    phases = (record.connections, record.requests)
    for (memory, files), phase in zip(zip(*grid, strict=True), phases, strict=True):
        visits = [sample.visits for sample in phase.samples]
        memory.plot(visits, [s.resident_mb for s in phase.samples], color=_MEMORY, linewidth=1.2)
        files.plot(visits, [s.descriptors for s in phase.samples], color=_FILES, linewidth=1.2)
        memory.set_title(phase.title, loc="left")
        files.set_xlabel(phase.title)
        for axes in (memory, files):
            axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set(ylabel="Resident memory, MB", ylim=(0, None))
    grid[1][0].set(ylabel="Open files", ylim=(0, None))
    slope = record.slope
    figure.suptitle(
        f"{slope.value:+.2f} MB per 1,000 requests after warm-up ({slope.low:+.2f} to "
        f"{slope.high:+.2f})",
        x=0.01,
        horizontalalignment="left",
    )
    return save_figure(figure, directory / "soak.png")
