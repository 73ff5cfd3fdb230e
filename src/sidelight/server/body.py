"""Reads a request's body: no more than the limit, and nothing but strict JSON."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from sidelight.server.errors import RequestError
from sidelight.server.limits import ServerLimits

_Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class JsonRoute(APIRoute):
    """A route whose body is strict JSON, within the server's limits of size and time.

    Refused with 400: ``NaN``, ``Infinity``, half surrogate pairs, invalid UTF-8, endless nesting.
    The standard library's parser lets the first three pass. ``1e999`` arrives as an infinity, which
    the field that reads it has to refuse: ``StrictBody`` does for fields of numbers.
    """

    def get_route_handler(self) -> _Handler:
        """FastAPI's hook for requests of another class."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            # Before FastAPI's own reading, which would turn every error into a bare 400.
            limits: ServerLimits = request.app.state.context.limits
            body = await _read_in_time(request, limits)
            return await handle(_JsonRequest(request, body))

        return handle_strictly


class _JsonRequest(Request):
    """A request whose body has been read and checked."""

    def __init__(self, request: Request, body: bytes):
        super().__init__(request.scope, request.receive)
        self._bytes = body
        self._value = _parse(body)

    async def body(self) -> bytes:
        return self._bytes

    async def json(self) -> Any:
        return self._value


async def _read_in_time(request: Request, limits: ServerLimits) -> bytes:
    try:
        async with asyncio.timeout(limits.body_s):
            return await _read(request, limit=limits.body_bytes)
    except TimeoutError as error:
        raise RequestError(
            f"The body did not arrive within {limits.body_s:g} seconds. Send it faster, or less.",
            status=408,
            code="body_timeout",
        ) from error


async def _read(request: Request, *, limit: int) -> bytes:
    received, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        # The rest is read and dropped: closing on a client that still sends resets the connection,
        # and the reason may be lost on its way.
        if size <= limit:
            received += chunk
    if size > limit:
        raise RequestError(
            f"The body is larger than {limit:,} bytes. Send less at a time.",
            status=413,
            code="request_too_large",
        )
    return bytes(received)


def _parse(body: bytes) -> Any:
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"The body is not valid JSON: {error}.") from error
