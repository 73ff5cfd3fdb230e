"""Names each request, and writes one line about it: by its route, never by its path or query.

The answer to an exception that nothing else takes.

Lets requests pass that carry one of the keys.

Bounds the requests that are answered at the same time.

Stops work for a client that has left.

Gives a request up when it takes too long, or when the server ends.
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Depends, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sidelight.server.config import Access, Caller
from sidelight.server.connections import Drain
from sidelight.server.errors import RequestError, error_body

REQUEST_ID = "x-request-id"
UNROUTED = "other"
_access_log_log = logging.getLogger("sidelight.access")


class LogRequests:
    """Gives each request an id of its own, in its state and in the answer's ``x-request-id``.

    An id that the client sends is not taken over: it would be the client's text in our logs.

    Args:
        app: What answers.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, and logs its route, status and duration."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        state = scope.setdefault("state", {})
        state["request_id"] = request_id = f"req_{uuid.uuid4().hex}"
        status = 500

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            await self._app(scope, receive, named)
        finally:
            _write(scope, request_id, status, time.perf_counter() - start)


def route_of(scope: Scope) -> str:
    """The template of the request's route; all unknown routes are one."""
    return getattr(scope.get("route"), "path", UNROUTED)


def _write(scope: Scope, request_id: str, status: int, seconds: float) -> None:
    caller: Caller = scope["state"].get("caller", Caller())
    fields = {
        "request_id": request_id,
        "key_id": caller.key_id,
        "method": scope["method"],
        "route": route_of(scope),
        "status": status,
        "seconds": round(seconds, 4),
    }
    _access_log_log.info(
        "%s %s %d %.3f s", fields["method"], fields["route"], status, seconds, extra=fields
    )


_crash_log = logging.getLogger(__name__)


class AnswerCrashes:
    """Answers 500, and logs where the exception happened, by the request's id.

    Starlette's own handler stands outside of all middleware: its answer would have no id, and the
    log would not say whose request it was. An answer that has begun is cut off.

    Args:
        app: What answers.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            request_id = scope["state"]["request_id"]
            _crash_log.exception("Request %s failed.", request_id, extra={"request_id": request_id})
            if has_begun:
                raise
            await _answer(request_id)(scope, receive, send)


def _answer(request_id: str) -> JSONResponse:
    body = error_body(
        f"The server failed. Its log says where: look for {request_id}.", type="server_error"
    )
    return JSONResponse(body, status_code=500)


_OPEN_PATHS = frozenset({"/health"})


class BearerAuth:
    """Answers 401 unless ``Authorization: Bearer`` holds a key; ``/health`` is open to all.

    Stands before the routing, so that nobody without a key learns which routes exist. What passes
    carries its ``Caller`` in the request's state.

    Args:
        app: What is protected.
        access: Who may pass.
    """

    def __init__(self, app: ASGIApp, *, access: Access):
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers it."""
        if scope["type"] != "http" or scope["path"] in _OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        caller = self._access.caller(Headers(scope=scope).get("authorization", ""))
        if caller is None:
            await _refusal()(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send)


def require_admin(request: Request) -> None:
    """A dependency of the routes that only an admin key opens.

    Raises:
        RequestError: 403; the request carries another key, or none.
    """
    caller: Caller = request.state.caller
    if not caller.is_admin:
        raise RequestError(
            "This route needs an admin key. Start the server with --admin-key or "
            "--admin-keys-file, and send one of these.",
            status=403,
            type="permission_error",
            code="admin_key_required",
        )


AdminOnly = Depends(require_admin)


def _refusal() -> JSONResponse:
    body = error_body(
        "Missing or unknown API key. Send it as 'Authorization: Bearer KEY'.",
        type="authentication_error",
        code="invalid_api_key",
    )
    return JSONResponse(body, status_code=401, headers={"WWW-Authenticate": "Bearer"})


# Operators have to see a busy server too.
_EXEMPT = frozenset({"/health", "/ready", "/metrics"})
_RETRY_S = 1


class BoundRequests:
    """Answers 429 with ``Retry-After`` while ``limit`` requests are being answered.

    Args:
        app: What answers.
        limit: Requests at a time; those of ``/health``, ``/ready`` and ``/metrics`` do not count.
    """

    def __init__(self, app: ASGIApp, *, limit: int):
        self._app = app
        self._limit = limit
        self._answered_now = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers it."""
        if scope["type"] != "http" or scope["path"] in _EXEMPT:
            await self._app(scope, receive, send)
            return
        if self._answered_now >= self._limit:
            await self._refusal()(scope, receive, send)
            return
        self._answered_now += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._answered_now -= 1

    def _refusal(self) -> JSONResponse:
        body = error_body(
            f"{self._limit} requests are being answered, as many as may be. Try again in a moment.",
            type="rate_limit_error",
            code="too_many_requests",
        )
        return JSONResponse(body, status_code=429, headers={"Retry-After": str(_RETRY_S)})


T = TypeVar("T")


async def unless_left(request: Request, work: Awaitable[T]) -> T:
    """The outcome of ``work``, which is cancelled as soon as the client leaves.

    Raises:
        ClientDisconnect: It left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        # What fails now is of no interest, but has to be fetched: asyncio would log it.
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    # The body has been read: the only message that can follow is the disconnect.
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Deadline:
    """Cancels a request after ``seconds``, which frees its place in the engine.

    An answer that has not begun becomes a 504, or a 503 where the server ends. A stream of events
    ends with an error event and no ``[DONE]``; any other answer that has begun is cut off.

    Args:
        app: What answers.
        seconds: From the end of the request's head to the last byte of the answer.
        drain: Its end is everybody's deadline.
    """

    def __init__(self, app: ASGIApp, *, seconds: float, drain: Drain):
        self._app = app
        self._seconds = seconds
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on for as long as it may take."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        content_type: str | None = None

        async def noted(message: Message) -> None:
            nonlocal content_type
            if message["type"] == "http.response.start":
                content_type = Headers(raw=message["headers"]).get("content-type", "")
            await send(message)

        timeout = asyncio.timeout(self._seconds)
        try:
            async with timeout:
                with self._drain.ending(timeout):
                    await self._app(scope, receive, noted)
        except TimeoutError:
            if not timeout.expired():
                raise
            status, body = self._refusal()
            if content_type is None:
                await JSONResponse(body, status_code=status)(scope, receive, send)
            elif content_type.startswith("text/event-stream"):
                event = f"data: {json.dumps(body)}\n\n".encode()
                await send({"type": "http.response.body", "body": event})
            else:
                raise

    def _refusal(self) -> tuple[int, dict[str, object]]:
        if self._drain.is_over:
            return 503, error_body(
                "The server stops and gave the request up. Send it again, to another server or "
                "once this one is back.",
                type="server_error",
                code="shutting_down",
            )
        return 504, error_body(
            f"The request took longer than {self._seconds:g} seconds and was given up. Ask for "
            "less at a time, or try again when the server is less busy.",
            type="server_error",
            code="deadline_exceeded",
        )
