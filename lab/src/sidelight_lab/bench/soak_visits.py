"""What clients do, good and bad, and how each visit has to end. Knows no sockets.

One visit on a socket of its own, and how it ended.

What a server process holds while it is asked: memory and open files.

How fast memory grows: a line through samples that jump rather than scatter.
"""

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
from scipy.stats import theilslopes

from sidelight.errors import SidelightError
from sidelight_lab.bench.load import read_metrics, resident_mb, total

PROMPT_PROBE, RESPONSE_PROBE = "prompt", "response"
_CHAT, _MODERATIONS = "/v1/chat/completions", "/v1/moderations"
# Over the server's default limit of 4 MiB.
_LARGE_BYTES = 5 * 2**20
_BUSY = "429 too_many_requests"
_QUESTION = "Where is my refund?"

# What a client does once it has sent what it sends.
Manner = Literal["reads on", "half-closes", "leaves", "leaves midway"]


@dataclass(frozen=True)
class Visit:
    """One client's connection.

    Attributes:
        name: Of its kind.
        sent: All that it sends.
        endings: How it may end: the status and, where there is one, the error's code, the reason
            for the end or ``[DONE]``; ``closed`` without an answer; or ``left``.
        manner: What it does then. ``leaves midway`` waits for the first bytes of the answer.
        needs: What an answer with a verdict or a list contains.
    """

    name: str
    sent: bytes
    endings: tuple[str, ...]
    manner: Manner = "reads on"
    needs: tuple[bytes, ...] = ()


def connections() -> Sequence[Visit]:
    """Those of the bursts: most of them send nothing that is whole.

    More at once than the server answers at a time are a 429, as its limits say.
    """
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    half = head + b'Content-Length: 1000\r\n\r\n{"model":'
    models = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    return (
        Visit("nothing, leaves", b"", ("left",), "leaves"),
        Visit("nothing, stays", b"", ("closed",)),
        Visit("half a head, leaves", head, ("left",), "leaves"),
        Visit("half a head, stays", head, ("closed",)),
        Visit("half a body, leaves", half, ("left",), "leaves"),
        Visit("half a body, half-closes", half, ("closed", _BUSY), "half-closes"),
        Visit("no HTTP", b"\x16\x03\x01 hello\r\n\r\n", ("400",)),
        Visit("asks and leaves", models, ("left",), "leaves"),
        Visit("asks and reads", models, ("200", _BUSY), needs=(b'"data"',)),
        Visit(
            "moderation", _post(_MODERATIONS, {"input": _QUESTION}), ("200", _BUSY), needs=_PROMPT
        ),
    )


def requests(model: str, *, max_tokens: int) -> Sequence[Visit]:
    """Whole requests: answered, streamed, blocked, cut, refused and given up.

    Args:
        model: As the server names it.
        max_tokens: Of an answer; at least three, so that a text can be cut.
    """
    chat: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": _QUESTION}],
        "max_tokens": max_tokens,
    }
    stream = {**chat, "stream": True}
    long = {"max_tokens": 50 * max_tokens}
    blocked = {"policies": {PROMPT_PROBE: _ALWAYS}}
    # The most probable text is never empty; one that is drawn may be, and has nothing to cut.
    cut = {"policies": {RESPONSE_PROBE: _ALWAYS}, "temperature": 0}
    texts = {"input": [_QUESTION, "Hello!", "Thank you."]}
    return (
        Visit("chat", _post(_CHAT, chat), ("200",), needs=_BOTH),
        Visit("stream", _post(_CHAT, stream), ("200 [DONE]",), needs=_BOTH),
        Visit("two texts", _post(_CHAT, {**chat, "n": 2}), ("200",), needs=_BOTH),
        Visit("moderations", _post(_MODERATIONS, texts), ("200",), needs=_PROMPT),
        Visit("blocked prompt", _post(_CHAT, {**chat, **blocked}), ("400 content_filter",)),
        Visit("cut text", _post(_CHAT, {**chat, **cut}), ("200 content_filter",), needs=_BOTH),
        Visit("unknown model", _post(_CHAT, {**chat, "model": "none"}), ("404 model_not_found",)),
        Visit(
            "unknown probe", _post(_CHAT, {**chat, "probes": ["none"]}), ("400 probe_not_found",)
        ),
        Visit("not JSON", _request(_CHAT, b"{"), ("400",)),
        Visit("large body", _request(_CHAT, b" " * _LARGE_BYTES), ("413 request_too_large",)),
        Visit("chat, left", _post(_CHAT, {**chat, **long}), ("left",), "leaves"),
        Visit("stream, left midway", _post(_CHAT, {**stream, **long}), ("left",), "leaves midway"),
    )


_ALWAYS = {"mode": "block", "threshold": 0.0}
_PROMPT = (f'"probe":"{PROMPT_PROBE}"'.encode(),)
_BOTH = (*_PROMPT, f'"probe":"{RESPONSE_PROBE}"'.encode())


def _post(path: str, body: Mapping[str, Any]) -> bytes:
    return _request(path, json.dumps(body).encode())


def _request(path: str, body: bytes) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


# As long as the server gives a request.
_TIMEOUT_S = 600.0
_CHUNK_BYTES = 65536


@dataclass(frozen=True)
class Address:
    """Where the server listens."""

    host: str
    port: int


async def pay(visit: Visit, address: Address) -> str:
    """How the visit ended; one of ``visit.endings`` if all went well."""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(address.host, address.port)
            try:
                return await _perform(visit, reader, writer)
            finally:
                writer.close()
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
        # A server that refuses a body closes before all of it has been sent: what it said counts.
        received += await _rest(reader)
    found = ending(received)
    is_complete = not found.startswith("200") or all(text in received for text in visit.needs)
    return found if is_complete else f"{found} incomplete"


async def _rest(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(_CHUNK_BYTES)
    except ConnectionError:
        return b""


def ending(received: bytes) -> str:
    """An answer in few words, as ``Visit.endings`` puts it."""
    if not received:
        return "closed"
    head, _, body = received.partition(b"\r\n\r\n")
    status = head.split(b" ")[1].decode()
    detail = _of_stream(body) if b"text/event-stream" in head else _of_json(body)
    return f"{status} {detail}".strip()


def _of_stream(body: bytes) -> str:
    return "[DONE]" if b"data: [DONE]\n\n" in body else "no [DONE]"


def _of_json(body: bytes) -> str:
    if re.search(rb'"finish_reason":\s*"content_filter"', body):
        return "content_filter"
    if not body.startswith(b'{"error"'):
        return ""
    return json.loads(body)["error"]["code"] or ""


@dataclass(frozen=True)
class Sample:
    """A look at the process.

    Attributes:
        visits: Done so far, of the phase.
        seconds: Since the sampler was made.
        resident_mb: Memory, MB.
        descriptors: Open files, connections among them.
    """

    visits: int
    seconds: float
    resident_mb: float
    descriptors: int


class Sampler:
    """Looks at a process.

    Args:
        pid: Of the process.

    Attributes:
        samples: In order.
    """

    def __init__(self, pid: int):
        self._pid = pid
        self._start = perf_counter()
        self.samples: list[Sample] = []

    def look(self, visits: int) -> Sample:
        """Adds a sample.

        Raises:
            SidelightError: The process has ended, or the system does not tell (it is not Linux).
        """
        resident = resident_mb(self._pid)
        if resident is None:
            raise SidelightError(
                f"Nothing is told of process {self._pid}: it has ended, or this is not Linux."
            )
        descriptors = sum(1 for _ in Path(f"/proc/{self._pid}/fd").iterdir())
        sample = Sample(visits, perf_counter() - self._start, resident, descriptors)
        self.samples.append(sample)
        return sample


def requests_held(url: str) -> int:
    """Requests that the server's engine runs or keeps in line."""
    text = read_metrics(url)
    series = ("sidelight_requests_running", "sidelight_requests_waiting")
    return int(sum(total(text, name) for name in series))


_BLOCKS = 20
_PER = 1000


@dataclass(frozen=True)
class Slope:
    """MB per 1,000 requests, with a 95 % interval."""

    value: float
    low: float
    high: float


def memory_slope(samples: Sequence[Sample], *, warm_up: int) -> Slope:
    """Theil and Sen's slope through the medians of twenty neighbouring blocks of samples.

    Neighbouring samples are alike, so an interval over all of them would be too narrow; and a
    median is not moved by a passing peak.

    Args:
        samples: At least twenty after the warm-up.
        warm_up: Samples of the first so many visits are left out.
    """
    kept = [sample for sample in samples if sample.visits > warm_up]
    blocks = [kept[part[0] : part[-1] + 1] for part in np.array_split(range(len(kept)), _BLOCKS)]
    visits = [np.median([sample.visits for sample in block]) for block in blocks]
    memory = [np.median([sample.resident_mb for sample in block]) for block in blocks]
    # scipy leaves the type of the outcome open.
    found: Any = theilslopes(memory, visits, alpha=0.95)
    return Slope(*(float(x) * _PER for x in (found.slope, found.low_slope, found.high_slope)))
