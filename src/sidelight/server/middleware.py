"""What every request passes before a route: its scope, the gate, and the deadline."""

import asyncio
import json
import logging
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sidelight.server.config import Access, Caller
from sidelight.server.connections import Drain
from sidelight.server.errors import RequestError
from sidelight.server.metrics import Metrics
from sidelight.server.observe import Sink, Trace

REQUEST_ID = "x-request-id"
# Operators have to see a busy server too, and they ask every few seconds.
_OPERATORS = frozenset({"/health", "/ready", "/metrics"})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_RETRY_S = 1
_access_log = logging.getLogger("sidelight.access")
_log = logging.getLogger(__name__)


class RequestScope:
    """Gives each request an id, answers its crash, and counts, traces and logs its end.

    The id is in the answer's ``x-request-id``. One that the client sends is ignored: it would be
    the client's text in our logs. For the same reason, requests are counted and logged by the
    template of their route, never by path or query. Crashes are answered here, since Starlette's
    own handler is outside all middleware: its answer would have no id.

    Args:
        app: What answers.
        metrics: Where answers are counted.
        sink: Takes the trace of each request; None: there are no traces.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, sink: Sink | None):
        self._app = app
        self._metrics = metrics
        self._sink = sink

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        trace = Trace(
            start_ns=time.time_ns(),
            traceparent=Headers(scope=scope).get("traceparent"),
            method=scope["method"] if scope["method"] in _METHODS else "_OTHER",
            request_id=f"req_{uuid.uuid4().hex}",
        )
        scope.setdefault("state", {})["trace"] = trace
        has_begun = False

        def begin(status: int) -> None:
            nonlocal has_begun
            has_begun = True
            trace.status = status
            # The template of the route; all unknown routes share one.
            trace.route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(trace.route, str(status)).inc()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = trace.request_id
                begin(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, named)
        except Exception:
            extra = {"request_id": trace.request_id}
            _log.exception("Request %s failed.", trace.request_id, extra=extra)
            # An answer that has begun is cut off.
            if has_begun:
                raise
            message = f"The server failed. Look for {trace.request_id} in its log."
            error = RequestError(message, status=500, type="server_error")
            await error.answer()(scope, receive, named)
        finally:
            if not has_begun:
                begin(500)
            self._end(scope, trace, time.perf_counter() - start)

    def _end(self, scope: Scope, trace: Trace, seconds: float) -> None:
        caller: Caller = scope["state"].get("caller", Caller())
        fields = {
            "request_id": trace.request_id,
            "key_id": caller.key_id,
            "method": trace.method,
            "route": trace.route,
            "status": trace.status,
            "seconds": round(seconds, 4),
        }
        _access_log.info(
            "%s %s %d %.3f s", trace.method, trace.route, trace.status, seconds, extra=fields
        )
        if self._sink is not None and scope["path"] not in _OPERATORS:
            self._sink(trace)


class Gatekeeper:
    """Answers 401 to requests without a key, and 429 while ``limit`` requests are being answered.

    ``/health`` is open to all; ``/ready`` and ``/metrics`` need a key but are not limited. The gate
    is before the routing, so that nobody without a key learns which routes exist. A request that
    passes carries its ``Caller`` in its state.

    Args:
        app: What is protected.
        access: Who may pass.
        limit: Most requests at a time.
    """

    def __init__(self, app: ASGIApp, *, access: Access, limit: int):
        self._app = app
        self._access = access
        self._limit = limit
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health":
            await self._app(scope, receive, send)
            return
        caller = self._access.caller(Headers(scope=scope).get("authorization", ""))
        if caller is None:
            error = RequestError(
                "Missing or unknown API key. Send it as 'Authorization: Bearer KEY'.",
                status=401,
                type="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.answer()(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        if scope["path"] in _OPERATORS:
            await self._app(scope, receive, send)
            return
        if self._running >= self._limit:
            error = RequestError(
                f"The server is answering {self._limit} requests, its limit (--max-concurrent). "
                "Try again in a moment.",
                status=429,
                type="rate_limit_error",
                code="too_many_requests",
                headers={"Retry-After": str(_RETRY_S)},
            )
            await error.answer()(scope, receive, send)
            return
        self._running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running -= 1


class Deadline:
    """Cancels a request after ``seconds``, which frees its place in the engine.

    An answer that has not begun becomes a 504, or a 503 if the server is stopping. A stream of
    events ends with an error event and no ``[DONE]``; any other answer that has begun is cut off.

    Args:
        app: What answers.
        seconds: From the end of the request's head to the last byte of the answer.
        drain: Its end is the deadline of every request.
    """

    def __init__(self, app: ASGIApp, *, seconds: float, drain: Drain):
        self._app = app
        self._seconds = seconds
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
            error = self._refusal()
            if content_type is None:
                await error.answer()(scope, receive, send)
            elif content_type.startswith("text/event-stream"):
                event = f"data: {json.dumps(error.body)}\n\n".encode()
                await send({"type": "http.response.body", "body": event})
            else:
                raise

    def _refusal(self) -> RequestError:
        if self._drain.is_over:
            return RequestError(
                "The server is stopping and cancelled the request. Send it to another server, or "
                "again once this one is back.",
                status=503,
                type="server_error",
                code="shutting_down",
            )
        return RequestError(
            f"The request took longer than {self._seconds:g} seconds (--deadline) and was "
            "cancelled. Ask for less at a time, or try again when the server is less busy.",
            status=504,
            type="server_error",
            code="deadline_exceeded",
        )
