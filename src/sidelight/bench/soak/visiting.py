"""One visit on a socket of its own, and how it ended."""

import asyncio
import json
import re
from dataclasses import dataclass

from sidelight.bench.soak.visits import Visit

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
