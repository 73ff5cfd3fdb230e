"""Visits of well-behaved and of broken clients, each on its own socket, and how they must end."""

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

PROMPT_PROBE, RESPONSE_PROBE = "prompt", "response"
_CHAT, _MODERATIONS = "/v1/chat/completions", "/v1/moderations"
# More than the server's default limit of 4 MiB.
_LARGE_BYTES = 5 * 2**20
_CHUNK_BYTES = 65536
# The time that the server gives a request.
_TIMEOUT_S = 600.0
_BUSY = "429 too_many_requests"
_QUESTION = "Where is my refund?"
_ALWAYS = {"mode": "block", "threshold": 0.0}
_PROMPT = (f'"probe":"{PROMPT_PROBE}"'.encode(),)
_BOTH = (*_PROMPT, f'"probe":"{RESPONSE_PROBE}"'.encode())

# What a client does after it has sent everything.
Manner = Literal["reads on", "half-closes", "leaves", "leaves midway"]


@dataclass(frozen=True)
class Visit:
    """One client's connection.

    Attributes:
        name: Name of its kind.
        sent: Everything that the client sends.
        endings: How it may end: the status and, if there is one, the error code, the finish reason
            or ``[DONE]``; ``closed`` without an answer; or ``left``.
        manner: What the client does then. ``leaves midway`` waits for the first bytes of the
            answer.
        needs: What a successful answer must contain.
    """

    name: str
    sent: bytes
    endings: tuple[str, ...]
    manner: Manner = "reads on"
    needs: tuple[bytes, ...] = ()


def connections() -> Sequence[Visit]:
    """The visits of the bursts: most of them send no complete request.

    When there are more at once than the server's limits allow, some end with a 429.
    """
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    half = head + b'Content-Length: 1000\r\n\r\n{"model":'
    models = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    moderation = _post(_MODERATIONS, {"input": _QUESTION})
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
        Visit("moderation", moderation, ("200", _BUSY), needs=_PROMPT),
    )


def requests(model: str, *, max_tokens: int) -> Sequence[Visit]:
    """Complete requests: answered, streamed, blocked, cut, refused and given up.

    ``max_tokens`` must be at least three, so that a text can be cut.
    """
    chat: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": _QUESTION}],
        "max_tokens": max_tokens,
    }
    stream = {**chat, "stream": True}
    long = {"max_tokens": 50 * max_tokens}
    blocked = {**chat, "policies": {PROMPT_PROBE: _ALWAYS}}
    # The most probable text is never empty; a sampled one may be, and then nothing can be cut.
    cut = {**chat, "policies": {RESPONSE_PROBE: _ALWAYS}, "temperature": 0}
    texts = {"input": [_QUESTION, "Hello!", "Thank you."]}
    probes = {**chat, "probes": ["none"]}
    return (
        Visit("chat", _post(_CHAT, chat), ("200",), needs=_BOTH),
        Visit("stream", _post(_CHAT, stream), ("200 [DONE]",), needs=_BOTH),
        Visit("two texts", _post(_CHAT, {**chat, "n": 2}), ("200",), needs=_BOTH),
        Visit("moderations", _post(_MODERATIONS, texts), ("200",), needs=_PROMPT),
        Visit("blocked prompt", _post(_CHAT, blocked), ("400 content_filter",)),
        Visit("cut text", _post(_CHAT, cut), ("200 content_filter",), needs=_BOTH),
        Visit("unknown model", _post(_CHAT, {**chat, "model": "none"}), ("404 model_not_found",)),
        Visit("unknown probe", _post(_CHAT, probes), ("400 probe_not_found",)),
        Visit("not JSON", _request(_CHAT, b"{"), ("400",)),
        Visit("large body", _request(_CHAT, b" " * _LARGE_BYTES), ("413 request_too_large",)),
        Visit("chat, left", _post(_CHAT, {**chat, **long}), ("left",), "leaves"),
        Visit("stream, left midway", _post(_CHAT, {**stream, **long}), ("left",), "leaves midway"),
    )


def _post(path: str, body: Mapping[str, Any]) -> bytes:
    return _request(path, json.dumps(body).encode())


def _request(path: str, body: bytes) -> bytes:
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
