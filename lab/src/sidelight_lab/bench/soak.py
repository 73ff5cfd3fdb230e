"""A long test of one server: does it lose or leak anything over many visits of every kind?

Each visit is one client on its own socket, well-behaved or broken, and says how it must end.
"""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import theilslopes

from sidelight.artifact import save_probe
from sidelight.backbone import TransformersBackbone, load_backbone
from sidelight.calibration import Calibration
from sidelight.data.examples import Example
from sidelight.plots import save_figure
from sidelight.progress import Progress, progress
from sidelight.prompts import Message, Reads
from sidelight.server.process import ServerProcess
from sidelight.training.classifier import judge
from sidelight_lab.bench.measurement import (
    Record,
    Sample,
    conditions,
    count_requests,
    look_at,
    table,
)
from sidelight_lab.bench.subjects import untrained_probe
from sidelight_lab.plots import COLOURS, open_frame

_PROMPT_PROBE, _RESPONSE_PROBE = "prompt", "response"
_CHAT, _MODERATIONS = "/v1/chat/completions", "/v1/moderations"
# More than the server's default limit of 4 MiB.
_LARGE_BYTES = 5 * 2**20
_CHUNK_BYTES = 65536
# The time that the server gives a request.
_TIMEOUT_S = 600.0
_BUSY = "429 too_many_requests"
_QUESTION, _OTHER = "Where is my refund?", "I hate you, you stupid liars."
_PROMPT = (f'"probe":"{_PROMPT_PROBE}"'.encode(),)
_BOTH = (*_PROMPT, f'"probe":"{_RESPONSE_PROBE}"'.encode())
# Answers longer than this many times `max_tokens` are cut: the probe may not judge them.
_CUT_AFTER = 4
_POLICY = """[input.{prompt}]
mode = "block"
threshold = 0.5

[output.{response}]
mode = "block"
threshold = 1.0
max_tokens = {longest}
"""
# Samples of each phase, and the share of the requests that only warm the server up.
_SAMPLES = 200
_WARM_UP = 0.2
_BLOCKS = 20
# How long the server may take to release what its last clients left behind.
_SETTLE_S = 60.0

# What a client does after it has sent everything; "midway" is after the answer's first bytes.
Manner = Literal["reads on", "half-closes", "leaves", "leaves midway"]


@dataclass(frozen=True)
class Visit:
    """One client's connection: what it sends, what it does then, and how that may end.

    An ending is the status and, if there is one, the error code, the finish reason or ``[DONE]``;
    ``closed`` without an answer; or ``left``. A successful answer must contain all of ``needs``.
    """

    name: str
    sent: bytes
    endings: tuple[str, ...]
    manner: Manner = "reads on"
    needs: tuple[bytes, ...] = ()


def connection_visits() -> Sequence[Visit]:
    """The visits of the bursts: most of them send no complete request.

    When there are more at once than the server's limits allow, some end with a 429.
    """
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    half = head + b'Content-Length: 1000\r\n\r\n{"model":'
    models = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    moderation = _post(_MODERATIONS, {"input": _QUESTION})
    return (
        Visit("nothing, leaves", b"", ("left",), "leaves"),
        Visit("half a head, leaves", head, ("left",), "leaves"),
        Visit("half a body, leaves", half, ("left",), "leaves"),
        Visit("half a body, half-closes", half, ("closed", _BUSY), "half-closes"),
        Visit("no HTTP", b"\x16\x03\x01 hello\r\n\r\n", ("400",)),
        Visit("asks and leaves", models, ("left",), "leaves"),
        Visit("asks and reads", models, ("200", _BUSY), needs=(b'"data"',)),
        Visit("moderation", moderation, ("200", _BUSY), needs=_PROMPT),
    )


def request_visits(
    model: str, *, max_tokens: int, answered: str = _QUESTION, blocked: str = _OTHER
) -> Sequence[Visit]:
    """Complete requests: answered, streamed, blocked, cut, refused and given up.

    The server's policy must block the prompt ``blocked`` and pass ``answered``.
    """
    chat: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": answered}],
        "max_tokens": max_tokens,
    }
    refused = {**chat, "messages": [{"role": "user", "content": blocked}]}
    # The most probable text hardly ends so soon; a sampled one may.
    cut = {**chat, "max_tokens": (_CUT_AFTER + 1) * max_tokens, "temperature": 0}
    stream = {**chat, "stream": True}
    long = {"max_tokens": 50 * max_tokens}
    texts = {"input": [_QUESTION, "Hello!", "Thank you."]}
    probes = {**chat, "probes": ["none"]}
    return (
        Visit("chat", _post(_CHAT, chat), ("200",), needs=_BOTH),
        Visit("stream", _post(_CHAT, stream), ("200 [DONE]",), needs=_BOTH),
        Visit("two texts", _post(_CHAT, {**chat, "n": 2}), ("200",), needs=_BOTH),
        Visit("moderations", _post(_MODERATIONS, texts), ("200",), needs=_PROMPT),
        Visit("blocked prompt", _post(_CHAT, refused), ("400 content_filter",)),
        Visit("cut text", _post(_CHAT, cut), ("200 content_filter",), needs=_BOTH),
        Visit("unknown model", _post(_CHAT, {**chat, "model": "none"}), ("404 model_not_found",)),
        Visit("unknown probe", _post(_CHAT, probes), ("400 probe_not_found",)),
        Visit("not JSON", _post(_CHAT, b"{"), ("400",)),
        Visit("large body", _post(_CHAT, b" " * _LARGE_BYTES), ("413 request_too_large",)),
        Visit("chat, left", _post(_CHAT, {**chat, **long}), ("left",), "leaves"),
        Visit("stream, left midway", _post(_CHAT, {**stream, **long}), ("left",), "leaves midway"),
    )


def _post(path: str, body: Mapping[str, Any] | bytes) -> bytes:
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


async def pay(visit: Visit, url: str) -> str:
    """How a visit to the server ended; one of ``visit.endings`` if all went well."""
    server = urlsplit(url)
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(server.hostname, server.port)
            with closing(writer):
                return await _perform(visit, reader, writer)
    except TimeoutError:
        return f"no end within {_TIMEOUT_S:g} s"
    except OSError as error:
        return f"no connection ({type(error).__name__})"


async def _perform(visit: Visit, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
    received = b""
    try:
        writer.write(visit.sent)
        await writer.drain()
        if visit.manner == "half-closes":
            writer.write_eof()
        if visit.manner == "leaves":
            return "left"
        while chunk := await reader.read(_CHUNK_BYTES):
            received += chunk
            if visit.manner == "leaves midway":
                return "left"
    except ConnectionError:
        # A server that refuses a body closes before all of it has been sent; its answer still
        # counts.
        with suppress(ConnectionError):
            received += await reader.read(_CHUNK_BYTES)
    found = ending(received)
    is_complete = not found.startswith("200") or all(text in received for text in visit.needs)
    return found if is_complete else f"{found} incomplete"


def ending(received: bytes) -> str:
    """An answer in a few words, as in ``Visit.endings``."""
    if not received:
        return "closed"
    head, _, body = received.partition(b"\r\n\r\n")
    detail = ""
    if b"text/event-stream" in head:
        detail = "[DONE]" if b"data: [DONE]\n\n" in body else "no [DONE]"
    elif re.search(rb'"finish_reason":\s*"content_filter"', body):
        detail = "content_filter"
    elif body.startswith(b'{"error"'):
        detail = json.loads(body)["error"]["code"] or ""
    return f"{head.split(b' ')[1].decode()} {detail}".strip()


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
    """Starts a server with two untrained probes and a policy, all in the folder, and visits it.

    Connections come in bursts, most of them broken off; then clients send requests of all kinds.
    Memory may grow by ``allowed_growth`` MB per 1,000 requests.

    Raises:
        SidelightError: The server ended.
    """
    backbone = load_backbone(model)
    probes, policy, questions = _prepare(backbone, folder, max_tokens=max_tokens)
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
    kinds = request_visits(backbone.name, max_tokens=max_tokens, **questions)
    del backbone

    async def soak(server: ServerProcess) -> dict[str, Any]:
        # One visit of each kind first: files that the server opens once are not leaks.
        for visit in kinds:
            await pay(visit, server.url)
        await _settle(server)
        before = look_at(server.pid)
        bursts = await _phase("connections", connection_visits(), server, connections, burst)
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

    options = ("--model", model, "--policy", str(policy))
    with ServerProcess(probes, options=options) as server:
        server.wait_until_ready()
        return soak_record(asyncio.run(soak(server)), where)


def _prepare(
    backbone: TransformersBackbone, folder: Path, *, max_tokens: int
) -> tuple[list[Path], Path, dict[str, str]]:
    """The probes' folders, the policy's file, and a question that it passes and one that it blocks.

    The probe of the prompt is calibrated to tell the two apart. That of the response gives every
    text a probability of about .5.
    """
    prompt = untrained_probe(backbone, _PROMPT_PROBE, reads=Reads("prompt"))
    texts = (_QUESTION, _OTHER)
    items = [Example((Message("user", text),)) for text in texts]
    logits = judge(backbone, [prompt], items)[0][:, 0].tolist()
    (low, answered), (high, blocked) = sorted(zip(logits, texts, strict=True))
    # Log-odds of -3 and 3.
    scale = 6 / (high - low)
    shift = -scale * (low + high) / 2
    response = untrained_probe(backbone, _RESPONSE_PROBE, reads=Reads("response"))
    folders = [
        save_probe(replace(probe, calibration=calibration), folder / probe.name)
        for probe, calibration in (
            (prompt, Calibration("platt", "binary", (scale,), (shift,))),
            (response, Calibration("platt", "binary", (1e-3,), (0.0,))),
        )
    ]
    policy = folder / "policy.toml"
    longest = _CUT_AFTER * max_tokens
    rules = _POLICY.format(prompt=prompt.name, response=response.name, longest=longest)
    policy.write_text(rules, "utf-8")
    return folders, policy, {"answered": answered, "blocked": blocked}


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
            endings[visit.name][await pay(visit, server.url)] += 1
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
        held = sum((await asyncio.to_thread(count_requests, server.url)).values())
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
    draw = partial(_plot, results)
    return Record("soak", where, {**results, "faults": found}, sections, draw)


def _table(phase: Mapping[str, Any]) -> str:
    rows: list[list[object]] = []
    for one in phase["outcomes"]:
        said: dict[bool, list[str]] = {True: [], False: []}
        for end, number in one["endings"].items():
            said[end in one["expected"]].append(f"{end}: {number}")
        ends = [", ".join(own) or "none" for own in said.values()]
        rows.append([one["name"], sum(one["endings"].values()), *ends])
    title = f"{phase['title'].capitalize()}, {phase['seconds']:.0f} s"
    return table(title, ["", "number", "ended as they had to", "otherwise"], rows)


def _described(slope: Mapping[str, float]) -> str:
    return (
        f"{slope['value']:+.2f} MB per 1,000 requests after warm-up ({slope['low']:+.2f} to "
        f"{slope['high']:+.2f})"
    )


def _plot(results: Mapping[str, Any], folder: Path) -> None:
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
    save_figure(figure, folder / "soak.png")
