"""A server with probes and policies, and one without, asked in turn by as many clients."""

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sidelight.backbones import load_backbone
from sidelight.bench.load.checking import faults
from sidelight.bench.load.clients import Answer, Asking, ask_for, endings
from sidelight.bench.load.preparing import PROMPT_PROBES, Prepared, prepare
from sidelight.bench.load.record import Record, Round, Span
from sidelight.bench.load.tickets import Ticket, tickets
from sidelight.bench.load.watching import Watcher, read_metrics, resident_mb, total
from sidelight.progress import progress
from sidelight.server.process import ServerProcess

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
