"""A server process on loopback, and all that comes to it."""

import asyncio
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter
from urllib.parse import urlsplit

from sidelight.artifact import save_probe
from sidelight.backbones import Backbone, load_backbone
from sidelight.bench.soak.record import Outcomes, Phase, Record
from sidelight.bench.soak.sampling import Sampler, requests_held
from sidelight.bench.soak.slope import memory_slope
from sidelight.bench.soak.visiting import Address, pay
from sidelight.bench.soak.visits import (
    PROMPT_PROBE,
    RESPONSE_PROBE,
    Visit,
    connections,
    requests,
)
from sidelight.bench.untrained import untrained_probe
from sidelight.progress import Progress, progress
from sidelight.prompts import Reads
from sidelight.server.process import ServerProcess

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
