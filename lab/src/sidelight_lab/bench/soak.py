"""A long test of one server: does it lose or leak anything over many visits of every kind?"""

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import theilslopes

from sidelight.artifact import save_probe
from sidelight.backbone import load_backbone
from sidelight.plots import save_figure
from sidelight.progress import Progress, progress
from sidelight.prompts import Reads
from sidelight.server.process import ServerProcess
from sidelight_lab.bench import visits
from sidelight_lab.bench.record import Record, conditions, table
from sidelight_lab.bench.subjects import untrained_probe
from sidelight_lab.bench.timing import Sample, look_at, read_metrics, total
from sidelight_lab.bench.visits import Visit
from sidelight_lab.plots import COLOURS, open_frame

# Samples of each phase, and the share of the requests that only warm the server up.
_SAMPLES = 200
_WARM_UP = 0.2
_BLOCKS = 20
# How long the server may take to release what its last clients left behind.
_SETTLE_S = 60.0


def run_soak(
    folder: Path,
    *,
    model: str,
    connections: int,
    burst: int,
    requests: int,
    clients: int,
    max_tokens: int,
    allowed_growth: float,
) -> Record:
    """Starts a server with two untrained probes, which go to the folder, and visits it.

    Connections come in bursts, most of them broken off; then clients send requests of all kinds.
    Memory may grow by ``allowed_growth`` MB per 1,000 requests.

    Raises:
        SidelightError: The server ended.
    """
    backbone = load_backbone(model)
    sides = {visits.PROMPT_PROBE: Reads("prompt"), visits.RESPONSE_PROBE: Reads("response")}
    probes = [
        save_probe(untrained_probe(backbone, name, reads=reads), folder / name)
        for name, reads in sides.items()
    ]
    where = conditions(
        backbone,
        {
            "connections": connections,
            "at once": burst,
            "requests": requests,
            "clients": clients,
            "tokens of an answer": max_tokens,
        },
    )
    kinds = visits.requests(backbone.name, max_tokens=max_tokens)
    del backbone

    async def soak(server: ServerProcess) -> dict[str, Any]:
        # One visit of each kind first: files that the server opens once are not leaks.
        for visit in kinds:
            await visits.pay(visit, server.url)
        await _settle(server)
        before = look_at(server.pid)
        bursts = await _phase("connections", visits.connections(), server, connections, burst)
        asked = await _phase("requests", kinds, server, requests, clients)
        held = await _settle(server, descriptors=before["descriptors"])
        return {
            "connections": bursts,
            "requests": asked,
            "slope": memory_slope(asked["samples"], warm_up=int(_WARM_UP * requests)),
            "allowed_growth": allowed_growth,
            "before": before,
            "after": look_at(server.pid, visits=requests),
            "held": held,
        }

    with ServerProcess(probes, options=("--model", model)) as server:
        server.wait_until_ready()
        return soak_record(asyncio.run(soak(server)), where)


async def _phase(
    title: str, kinds: Sequence[Visit], server: ServerProcess, number: int, at_once: int
) -> dict[str, Any]:
    """How ``number`` visits end, each kind in turn, and what the server holds meanwhile.

    Connections come in bursts: the next one begins when all visits of a burst have ended. Otherwise
    each client goes on to the next visit at once.
    """
    endings: dict[str, Counter[str]] = {visit.name: Counter() for visit in kinds}
    queue = islice(cycle(kinds), number)
    every = max(1, number // _SAMPLES)
    samples = [look_at(server.pid)]
    start = perf_counter()
    done = 0

    async def visit_all(some: Iterator[Visit], bar: Progress) -> None:
        nonlocal done
        for visit in some:
            endings[visit.name][await visits.pay(visit, server.url)] += 1
            bar.advance(1)
            done += 1
            if done % every == 0:
                samples.append(look_at(server.pid, visits=done, seconds=perf_counter() - start))

    with progress(title.capitalize(), number, unit=title) as bar:
        while title == "connections" and (burst := list(islice(queue, at_once))):
            await asyncio.gather(*(visit_all(iter([visit]), bar) for visit in burst))
        await asyncio.gather(*(visit_all(queue, bar) for _ in range(at_once)))
    outcomes = [
        {"name": one.name, "expected": one.endings, "endings": dict(endings[one.name])}
        for one in kinds
    ]
    seconds = perf_counter() - start
    return {"title": title, "outcomes": outcomes, "samples": samples, "seconds": seconds}


async def _settle(server: ServerProcess, *, descriptors: float = float("inf")) -> int:
    """Waits until the server has no requests and few files; the requests that it still holds."""
    deadline = perf_counter() + _SETTLE_S
    while True:
        text = await asyncio.to_thread(read_metrics, server.url)
        states = ("running", "waiting")
        held = int(sum(total(text, f"sidelight_requests_{state}") for state in states))
        is_settled = held == 0 and look_at(server.pid)["descriptors"] <= descriptors
        if is_settled or perf_counter() > deadline:
            return held
        await asyncio.sleep(0.2)


def memory_slope(samples: Sequence[Sample], *, warm_up: int) -> dict[str, float]:
    """MB per 1,000 visits with a 95 % interval, by Theil and Sen's estimator.

    The line goes through the medians of twenty blocks of neighbouring samples. Neighbours are
    alike, so an interval over all samples would be too narrow, and a median ignores a passing peak.
    Samples of the first ``warm_up`` visits are left out; twenty or more must remain.
    """
    kept = [(one["visits"], one["resident_mb"]) for one in samples if one["visits"] > warm_up]
    blocks = [np.median(block, axis=0) for block in np.array_split(np.array(kept), _BLOCKS)]
    numbers, memory = np.array(blocks).T
    # scipy leaves the type of the outcome open.
    found: Any = theilslopes(memory, numbers, alpha=0.95)
    ends = {"value": found.slope, "low": found.low_slope, "high": found.high_slope}
    return {name: 1000 * float(end) for name, end in ends.items()}


def faults(results: Mapping[str, Any]) -> list[str]:
    """One sentence for each thing that went wrong; none in a sound run."""
    found = [
        f"{number} of '{one['name']}' ended with '{end}', not '{' or '.join(one['expected'])}'."
        for phase in (results["connections"], results["requests"])
        for one in phase["outcomes"]
        for end, number in one["endings"].items()
        if end not in one["expected"]
    ]
    slope = results["slope"]
    if slope["low"] > results["allowed_growth"]:
        found.append(f"Memory grew by {slope['value']:.2f} MB per 1,000 requests.")
    more = results["after"]["descriptors"] - results["before"]["descriptors"]
    if more > 0:
        found.append(f"{more} more files were open at the end than before.")
    if results["held"]:
        found.append(f"{results['held']} requests were still in the engine at the end.")
    return found


def soak_record(results: Mapping[str, Any], where: Mapping[str, Any]) -> Record:
    """How the visits ended, what the server held, and the faults."""
    before, after = results["before"], results["after"]
    most = max(sample["descriptors"] for sample in results["connections"]["samples"])
    found = faults(results)
    sections = [
        _table(results["connections"]),
        _table(results["requests"]),
        f"Memory: {before['resident_mb']:.0f} MB before, {after['resident_mb']:.0f} after; "
        f"{_described(results['slope'])}. "
        f"Open files: {before['descriptors']} before, at most {most} in the bursts, "
        f"{after['descriptors']} after. Requests left in the engine: {results['held']}.",
        "\n".join(["Faults:", *found] if found else ["Faults: none."]),
    ]
    return Record("soak", where, {**results, "faults": found}, sections)


def _table(phase: Mapping[str, Any]) -> str:
    def counted(endings: Mapping[str, int]) -> str:
        return ", ".join(f"{end}: {number}" for end, number in endings.items()) or "none"

    rows = [
        (
            one["name"],
            sum(one["endings"].values()),
            counted({end: n for end, n in one["endings"].items() if end in one["expected"]}),
            counted({end: n for end, n in one["endings"].items() if end not in one["expected"]}),
        )
        for one in phase["outcomes"]
    ]
    title = f"{phase['title'].capitalize()}, {phase['seconds']:.0f} s"
    return table(title, ["", "number", "ended as they had to", "otherwise"], rows)


def _described(slope: Mapping[str, float]) -> str:
    return (
        f"{slope['value']:+.2f} MB per 1,000 requests after warm-up ({slope['low']:+.2f} to "
        f"{slope['high']:+.2f})"
    )


def plot_soak(results: Mapping[str, Any], folder: Path) -> Path:
    """Draws ``soak.png``: the bursts of connections on the left, the requests on the right."""
    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(9.2, 5.2), layout="constrained")
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    lines = {"resident_mb": COLOURS[1], "descriptors": COLOURS[0]}
    for column, phase in zip(grid.T, (results["connections"], results["requests"]), strict=True):
        numbers = [sample["visits"] for sample in phase["samples"]]
        for axes, (name, colour) in zip(column, lines.items(), strict=True):
            held = [sample[name] for sample in phase["samples"]]
            axes.plot(numbers, held, color=colour, linewidth=1.2)
            open_frame(axes)
        column[0].set_title(phase["title"], loc="left")
        column[1].set_xlabel(phase["title"])
    grid[0][0].set(ylabel="Resident memory, MB", ylim=(0, None))
    grid[1][0].set(ylabel="Open files", ylim=(0, None))
    figure.suptitle(_described(results["slope"]), x=0.01, horizontalalignment="left")
    return save_figure(figure, folder / "soak.png")
