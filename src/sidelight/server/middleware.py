"""What stands between the socket and the routes: connections, requests, and the end of both.

No client can hold a connection, no request is lost at the end, and each is counted.
"""

import asyncio
import json
import logging
import resource
import signal
import socket
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Collection, Generator
from contextlib import contextmanager
from math import ceil
from types import FrameType

import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from sidelight.errors import SidelightError
from sidelight.server.config import ServerConfig
from sidelight.server.errors import RequestError
from sidelight.server.keys import Access, Caller, WatchedAccess
from sidelight.server.metrics import Metrics
from sidelight.server.observe import Sink, Trace
from sidelight.server.quotas import Usage

# Connections accepted in one turn of the event loop. All are open for some turns before those
# beyond the limit are closed.
ACCEPTED_AT_ONCE = 16
# Connections that the system queues until they are accepted.
QUEUED = 2048
# File descriptors for these, the listening socket, logs, and probes being loaded.
_SPARE = 128
# For the answers to requests that are cancelled, before uvicorn cuts what is left.
_LAST_WORDS_S = 2


REQUEST_ID = "x-request-id"
# Probes of Kubernetes and load balancers cannot send a secret.
_OPEN = frozenset({"/health", "/ready"})
# Operators have to see a busy server too, and they ask every few seconds.
_OPERATORS = _OPEN | {"/metrics"}
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_RETRY_S = 1
_access_log = logging.getLogger("sidelight.access")
_log = logging.getLogger("sidelight.server")


class BoundedProtocol(H11Protocol):
    """uvicorn's connection with limits: on its own it waits forever for a head and for a reader."""

    limits: ServerConfig

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        if len(self.connections) > self.limits.connections:
            transport.abort()
        else:
            self._start("head", self.limits.header_s)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_answering:
            self._stop("head")
        else:
            # One timer for the whole head, however slowly it comes.
            self._start("head", self.limits.header_s)

    def pause_writing(self) -> None:
        """The buffer is full: the client has to read."""
        super().pause_writing()
        self._start("reader", self.limits.write_s)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("reader")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop("head")
        self._stop("reader")

    def send_400_response(self, msg: str) -> None:
        """Refuses what is not HTTP, in the shape of every other error."""
        body = json.dumps(RequestError(msg).body).encode()
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        # An answer that has begun must not get a second head.
        if not self._is_answering or not self.cycle.response_started:
            self.transport.write(head.encode() + body)
        self.transport.close()

    @property
    def _is_answering(self) -> bool:
        # uvicorn types the cycle as never None; before the first request it is.
        return bool(self.cycle) and not self.cycle.response_complete

    def _start(self, name: str, seconds: float) -> None:
        if name not in self._timers:
            self._timers[name] = self.loop.call_later(seconds, self.transport.abort)

    def _stop(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()


def within_system(config: ServerConfig) -> ServerConfig:
    """The configuration with no more connections than this process may open files.

    Raises the process's own limit as far as the system allows. If that is not enough, fewer
    connections are accepted, and the log says so: running out of files would hit whatever opens
    the next one, such as a log or a probe.

    Raises:
        SidelightError: Not even one connection would be left.
    """
    wanted = config.connections + _SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return config
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    room = allowed - _SPARE
    if room < 1:
        raise SidelightError(
            f"This process may open {allowed} files, which is too few to serve. Raise the limit "
            f"(ulimit -n) to {wanted}."
        )
    if room < config.connections:
        _log.warning(
            "This process may open %d files, so it takes at most %d connections, not %d. Raise the "
            "limit (ulimit -n).",
            allowed,
            room,
            config.connections,
        )
    return config.model_copy(update={"connections": room})


class Drain:
    """How far the server has stopped.

    Attributes:
        is_draining: Whether it is about to stop; ``/ready`` then answers 503.
        is_over: Whether requests that still run are cancelled.
    """

    def __init__(self) -> None:
        self.is_draining = False
        self.is_over = False
        self._timeouts: set[asyncio.Timeout] = set()

    @contextmanager
    def ending(self, timeout: asyncio.Timeout) -> Generator[None]:
        """Makes a timeout that has been entered pass at the end of the drain too."""
        self._timeouts.add(timeout)
        try:
            yield
        finally:
            self._timeouts.discard(timeout)

    def end(self) -> None:
        """Gives up what still runs."""
        self.is_over = True
        for timeout in self._timeouts:
            if not timeout.expired():
                timeout.reschedule(asyncio.get_running_loop().time())


# Seconds that a body may take although others wait for a place.
_PATIENCE_S = 1.0


class SlowBodies:
    """The bodies that are being received, which must not hold all places against others."""

    def __init__(self) -> None:
        # With the time at which each began; the oldest first.
        self._timeouts: dict[asyncio.Timeout, float] = {}

    @contextmanager
    def receiving(self, timeout: asyncio.Timeout) -> Generator[None]:
        """Makes a timeout that has been entered pass early if its place is needed."""
        self._timeouts[timeout] = time.monotonic()
        try:
            yield
        finally:
            self._timeouts.pop(timeout, None)

    def give_up_one(self) -> bool:
        """Gives up the body that has taken longest; whether there was a slow one."""
        oldest = next(iter(self._timeouts), None)
        if oldest is None or time.monotonic() - self._timeouts[oldest] < _PATIENCE_S:
            return False
        del self._timeouts[oldest]
        oldest.reschedule(asyncio.get_running_loop().time())
        return True


class DrainingServer(uvicorn.Server):
    """Serves on for a while after SIGTERM, so that a load balancer can see ``/ready`` turn 503.

    After SIGINT, or a second signal, it stops listening at once. Either way, running requests may
    finish.

    Args:
        config: uvicorn's settings.
        drain: Notes the signal, and the end of the wait.
        drain_s: Seconds that running requests have once the server has stopped listening.
        notice_s: Seconds from SIGTERM to the end of listening.
    """

    def __init__(self, config: uvicorn.Config, *, drain: Drain, drain_s: float, notice_s: float):
        super().__init__(config)
        config.timeout_graceful_shutdown = ceil(drain_s) + _LAST_WORDS_S
        self._drain_s = drain_s
        self._drain = drain
        self._notice_s = notice_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens with a long queue; asyncio's holds only what it accepts in one turn."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(QUEUED)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops listening and waits for running requests; those that take too long get an error."""
        asyncio.get_running_loop().call_later(self._drain_s, self._drain.end)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Uvicorn's signal handler."""
        is_first = not self._drain.is_draining
        self._drain.is_draining = True
        if is_first and sig == signal.SIGTERM and self._notice_s > 0:
            timer = threading.Timer(self._notice_s, super().handle_exit, (sig, frame))
            timer.daemon = True
            timer.start()
        else:
            super().handle_exit(sig, frame)


class RequestScope:
    """Gives each request an id and a deadline, answers its crash, and records its end.

    The id is in the answer's ``x-request-id``. One that the client sends is ignored: it would be
    the client's text in our logs. For the same reason, requests are counted and logged by the
    template of their route, never by path or query. Crashes are answered here, since Starlette's
    own handler is outside all middleware: its answer would have no id.

    The deadline cancels the request, which frees its place in the engine. An answer that has not
    begun becomes a 504, or a 503 if the server is stopping. A stream of events ends with an error
    event and no ``[DONE]``; any other answer that has begun is cut off.

    Args:
        app: What answers.
        metrics: Where answers are counted.
        sink: Takes the trace of each request; None: there are no traces.
        deadline: Seconds from the end of the request's head to the last byte of the answer.
        drain: Its end is the deadline of every request.
    """

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, sink: Sink | None, deadline: float, drain: Drain
    ):
        self._app = app
        self._metrics = metrics
        self._sink = sink
        self._deadline = deadline
        self._drain = drain

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
        # Of the answer, once it has begun.
        content_type: str | None = None

        async def named(message: Message) -> None:
            nonlocal content_type
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = trace.request_id
                content_type = headers.get("content-type", "")
                self._count(scope, trace, message["status"])
            await send(message)

        timeout = asyncio.timeout(self._deadline)
        try:
            async with timeout:
                with self._drain.ending(timeout):
                    await self._app(scope, receive, named)
        except Exception as failure:
            is_late = isinstance(failure, TimeoutError) and timeout.expired()
            if content_type is None:
                error = self._lateness() if is_late else self._crash(trace)
                await error.answer()(scope, receive, named)
            elif is_late and content_type.startswith("text/event-stream"):
                event = f"data: {json.dumps(self._lateness().body)}\n\n".encode()
                await send({"type": "http.response.body", "body": event})
            else:
                self._crash(trace)
                raise
        finally:
            if content_type is None:
                self._count(scope, trace, 500)
            self._end(scope, trace, time.perf_counter() - start)

    def _count(self, scope: Scope, trace: Trace, status: int) -> None:
        trace.status = status
        # The template of the route; all unknown routes share one.
        trace.route = getattr(scope.get("route"), "path", "other")
        self._metrics.requests.labels(trace.route, str(status)).inc()

    def _crash(self, trace: Trace) -> RequestError:
        """Logs the exception in flight; returns what the client gets."""
        extra = {"request_id": trace.request_id}
        _log.exception("Request %s failed.", trace.request_id, extra=extra)
        message = f"The server failed. Look for {trace.request_id} in its log."
        return RequestError(message, status=500)

    def _lateness(self) -> RequestError:
        if self._drain.is_over:
            return RequestError(
                "The server is stopping and cancelled the request. Send it to another server, or "
                "again once this one is back.",
                status=503,
                code="shutting_down",
            )
        return RequestError(
            f"The request took longer than {self._deadline:g} seconds (--deadline) and was "
            "cancelled. Ask for less at a time, or try again when the server is less busy.",
            status=504,
            code="deadline_exceeded",
        )

    def _end(self, scope: Scope, trace: Trace, seconds: float) -> None:
        self._metrics.request_duration.labels(trace.route).observe(seconds)
        caller: Caller = scope["state"].get("caller", Caller())
        fields = {
            "request_id": trace.request_id,
            "key_id": caller.key_id,
            "method": trace.method,
            "route": trace.route,
            "status": trace.status,
            "seconds": round(seconds, 4),
        }
        # Probes ask every other second, and are told nothing else while the model loads or drains.
        is_routine = scope["path"] in _OPERATORS and trace.status in (200, 503)
        level = logging.DEBUG if is_routine else logging.INFO
        what = (trace.method, trace.route, trace.status, seconds)
        _access_log.log(level, "%s %s %d %.3f s", *what, extra=fields)
        if self._sink is not None and scope["path"] not in _OPERATORS:
            self._sink(trace)


class Gatekeeper:
    """Answers 401 to requests without a key, and 429 while ``limit`` requests are being answered.

    A key that has used its quota gets a 429 too. ``/health``, ``/ready`` and ``open_paths`` are
    open to all; ``/metrics`` needs a key, but none of a user, and is not limited. The gate is
    before the routing, so that nobody without a key learns which routes exist. A request that
    passes carries its ``Caller`` in its state. Where all places are taken, the body that has been
    coming for longest gives its own up.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        access: Access | WatchedAccess,
        limit: int,
        open_paths: Collection[str] = (),
        bodies: SlowBodies | None = None,
    ):
        self._app = app
        self._access = access
        self._open_paths = _OPEN | frozenset(open_paths)
        self._bodies = bodies or SlowBodies()
        self._usages: defaultdict[tuple[str | None, bool], Usage] = defaultdict(Usage)
        self._limit = limit
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = "" if scope["type"] == "lifespan" else _routed(scope)
        if scope["type"] == "lifespan" or path in self._open_paths:
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).getlist("authorization")
        if len(sent) > 1:
            # A proxy might have checked the other one.
            error = RequestError(
                "The header Authorization was sent twice. Send it once.", code="duplicate_header"
            )
            await error.answer()(scope, receive, send)
            return
        caller = self._access.caller("".join(sent))
        if caller is None:
            error = RequestError(
                "Missing or unknown API key. Send it as 'Authorization: Bearer KEY'.",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.answer()(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        if (refusal := self._wrong_key(path, caller)) is not None:
            await refusal.answer()(scope, receive, send)
            return
        if path in _OPERATORS:
            await self._app(scope, receive, send)
            return
        usage = self._usages[caller.key_id, caller.is_admin]
        usage.limit(caller.quota)
        try:
            if self._running >= self._limit and not self._bodies.give_up_one():
                raise RequestError(
                    f"The server is answering {self._limit} requests, its limit "
                    "(--max-concurrent). Try again in a moment.",
                    status=429,
                    code="too_many_requests",
                    headers={"Retry-After": str(_RETRY_S)},
                )
            usage.begin()
        except RequestError as error:
            await error.answer()(scope, receive, send)
            return
        self._running += 1
        try:
            await self._app(scope, receive, usage.announced(send))
        finally:
            self._running -= 1
            trace: Trace | None = scope["state"].get("trace")
            usage.end(trace.prompt_tokens + trace.completion_tokens if trace else 0)

    def _wrong_key(self, path: str, caller: Caller) -> RequestError | None:
        """Refuses keys of users what is for metrics, and keys for metrics everything else."""
        # vLLM answers all that begins so with its metrics, and routers the path and a line break.
        if path.startswith("/metrics") and not self._access.opens_metrics(caller):
            return RequestError(
                "/metrics needs a metrics key (--metrics-key) or an admin key.",
                status=403,
                code="metrics_key_required",
            )
        if caller.is_scraper and path != "/metrics":
            return RequestError(
                "A metrics key opens /metrics only. Send another key.",
                status=403,
                code="metrics_key_only",
            )
        return None


def _routed(scope: Scope) -> str:
    """The path that routes are found by: without the prefix that an application is served under."""
    path, prefix = scope["path"], scope.get("root_path", "")
    return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else path
