"""Middleware: request ids, deadlines, allowed hosts, and keys.

Slow clients and excess connections must be limited by a proxy.
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Callable, Collection
from ipaddress import ip_address

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sidelight.judges.settings import JUDGE_HEADER
from sidelight.server.config import name_of
from sidelight.server.errors import RequestError, routed_path
from sidelight.server.keys import Access, Caller
from sidelight.server.observe import RequestObserver

REQUEST_ID = "x-request-id"
# Health checks of Kubernetes and load balancers cannot send a secret.
_OPEN = frozenset({"/health", "/ready"})
# Operators must be able to monitor a busy server, and they poll every few seconds.
_OPERATORS = _OPEN | {"/metrics"}
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_access_log = logging.getLogger("sidelight.access")
_log = logging.getLogger("sidelight.server")


class RequestScope:
    """Gives each request an id and a deadline, responds to crashes, and records the end.

    The id is in the response header ``x-request-id``. A client's id is ignored, because it would
    put client text into the logs. For the same reason, requests are counted and logged by the
    template of their route, never by path or query. Crashes are handled here, because Starlette's
    own handler is outside all middleware and its response would have no id.

    The deadline and a server shutdown cancel the request, which frees its engine slot. A response
    that has not started becomes 504 (deadline) or 503 (shutdown). An event stream ends with an
    error event and no ``[DONE]``; any other started response is truncated.

    Args:
        app: The wrapped application.
        observer: The server's observer; each request gets its own in its state.
        deadline: Seconds from the end of the request headers to the last byte of the response.
    """

    def __init__(self, app: ASGIApp, *, observer: RequestObserver, deadline: float):
        self._app = app
        self._observer = observer
        self._deadline = deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        observer = self._observer.of(f"req_{uuid.uuid4().hex}")
        scope.setdefault("state", {})["observer"] = observer
        send = observer.annotating(send)
        # Status of the response, once it has started.
        status, content_type = 500, None

        async def named(message: Message) -> None:
            nonlocal status, content_type
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = observer.request_id
                status, content_type = message["status"], headers.get("content-type", "")
                self._count(scope, status)
            await send(message)

        timeout = asyncio.timeout(self._deadline)
        try:
            async with timeout:
                await self._app(scope, receive, named)
        # On any error, because the response to a crash must have the id under which it is logged.
        except (Exception, asyncio.CancelledError) as failure:
            task = asyncio.current_task()
            is_cut = True
            if isinstance(failure, asyncio.CancelledError) and task and task.cancelling():
                # Uvicorn cancels requests that outlast the graceful shutdown.
                error = _stopping()
            elif isinstance(failure, TimeoutError) and timeout.expired():
                error = self._lateness()
            else:
                error, is_cut = _crash(observer.request_id), False
            if content_type is None:
                await error.answer(scope)(scope, receive, named)
            elif is_cut and content_type.startswith("text/event-stream"):
                event = f"data: {json.dumps(error.body)}\n\n".encode()
                await send({"type": "http.response.body", "body": event})
            else:
                raise
            if isinstance(failure, asyncio.CancelledError) and is_cut:
                raise
        finally:
            if content_type is None:
                self._count(scope, status)
            self._end(scope, observer, status, time.perf_counter() - start)

    def _count(self, scope: Scope, status: int) -> None:
        self._observer.metrics.requests.labels(_route(scope), str(status)).inc()

    def _lateness(self) -> RequestError:
        return RequestError(
            f"The request took longer than {self._deadline:g} seconds (--deadline) and was "
            "cancelled. Ask for less at a time, or try again when the server is less busy.",
            status=504,
            code="deadline_exceeded",
        )

    def _end(self, scope: Scope, observer: RequestObserver, status: int, seconds: float) -> None:
        route = _route(scope)
        observer.metrics.request_duration.labels(route).observe(seconds)
        fields = {
            "request_id": observer.request_id,
            "key_id": observer.key_id,
            "method": scope["method"] if scope["method"] in _METHODS else "_OTHER",
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
        }
        # Health checks poll every other second.
        is_routine = scope["path"] in _OPERATORS and status in (200, 503)
        level = logging.DEBUG if is_routine else logging.INFO
        line = "%(method)s %(route)s %(status)d %(seconds).3f s"
        _access_log.log(level, line, fields, extra=fields)
        observer.annotate_span()


def _route(scope: Scope) -> str:
    """The template of the route; all unknown routes share one."""
    return getattr(scope.get("route"), "path", "other")


def _stopping() -> RequestError:
    return RequestError(
        "The server is shutting down and cancelled the request. Try again later.",
        status=503,
        code="shutting_down",
    )


def _crash(request_id: str) -> RequestError:
    """Log the exception in flight; return what the client gets."""
    _log.exception("Request %s failed.", request_id, extra={"request_id": request_id})
    message = f"Internal server error. Look for {request_id} in the server's log."
    return RequestError(message, status=500)


class Gatekeeper:
    """Refuses requests for another host, or without a sufficient key.

    ``/health``, ``/ready`` and ``open_paths`` are open to all. ``/metrics`` needs a metrics or
    admin key if there are keys or the policy ``hides_scores``. The check precedes routing, so that
    clients without a key do not learn which routes exist. A request that passes has its ``Caller``
    in its state.

    A web page can make its own host name resolve to this machine (DNS rebinding), and then read the
    responses of a server without keys. Its requests have that name in ``Host`` and ``Origin``, so
    only ``hosts`` are allowed. Also allowed are addresses and names under ``localhost``, which no
    page can claim, and the server's own origin.

    A server that ``defers`` to judges refuses requests as a judge, because two such servers could
    ask each other endlessly.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        access: Access,
        hides_scores: Callable[[], bool],
        defers: Callable[[], bool] = lambda: False,
        open_paths: Collection[str] = (),
        hosts: Collection[str] | None = None,
    ):
        self._app = app
        self._access = access
        self._hides_scores, self._defers = hides_scores, defers
        self._open_paths = _OPEN | frozenset(open_paths)
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            try:
                self._require_access(scope)
            except RequestError as refusal:
                await refusal.answer(scope)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _require_access(self, scope: Scope) -> None:
        path, headers = routed_path(scope), Headers(scope=scope)
        if "content-length" in headers and "transfer-encoding" in headers:
            # RFC 9112, section 6.1: a proxy may have used the other header for the end of the body.
            raise RequestError(
                "Got both Content-Length and Transfer-Encoding. Send one of them.",
                code="ambiguous_length",
                headers={"Connection": "close"},
            )
        if path in self._open_paths:
            return
        if (foreign := self._foreign_name(headers)) is not None:
            raise RequestError(
                f"Host '{foreign[:100]}' is not allowed. Connect to localhost, or start the server "
                "with --allowed-host.",
                status=403,
                code="host_not_allowed",
            )
        state = scope.setdefault("state", {})
        state["caller"] = caller = self._caller(path, headers)
        if "observer" in state:
            state["observer"].key_id = caller.key_id
        if JUDGE_HEADER in headers and self._defers():
            raise RequestError(
                "This server was asked as a judge by another Sidelight server, but its own "
                "policy defers to judges too. Use another server as the judge, or remove 'defer' "
                "from one of the policies.",
                code="judge_loop",
            )

    def _caller(self, path: str, headers: Headers) -> Caller:
        """Identify the sender of a request, and check that the key opens this path."""
        sent = headers.getlist("authorization")
        if len(sent) > 1:
            # A proxy might have checked the other one.
            raise RequestError(
                "The Authorization header was sent more than once. Send it once.",
                code="duplicate_header",
            )
        caller = self._access.caller("".join(sent))
        if caller is None:
            raise RequestError(
                "Missing or unknown API key. Send it as 'Authorization: Bearer KEY'.",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        # vLLM serves its metrics on all paths with this prefix, and routers match the path followed
        # by a line break.
        if path.startswith("/metrics") and not self._access.opens_metrics(
            caller, hides_scores=self._hides_scores()
        ):
            raise RequestError(
                "/metrics contains the scores and refusals of all clients, so it needs "
                "a metrics key (--metrics-key or SIDELIGHT_METRICS_KEY) or an admin key.",
                status=403,
                code="metrics_key_required",
            )
        if caller.is_scraper and path != "/metrics":
            raise RequestError(
                "A metrics key gives access only to /metrics. Send an API key instead.",
                status=403,
                code="metrics_key_only",
            )
        return caller

    def _foreign_name(self, headers: Headers) -> str | None:
        """A host name in ``Host`` or ``Origin`` that is not allowed; None if all are allowed."""
        if self._hosts is None:
            return None
        asked = {host: name_of(host) for host in headers.getlist("host")}
        for host, name in asked.items():
            if name not in self._hosts and not _is_local(name):
                return host
        # A page may well come from an address.
        known = {*self._hosts, *asked.values()}
        origins = headers.getlist("origin")
        return next((origin for origin in origins if name_of(origin) not in known), None)


def _is_local(name: str) -> bool:
    """Whether no web page can make this name resolve to an address of its choice."""
    # Resolvers do not look up names under localhost (RFC 6761, section 6.3).
    if name.endswith(".localhost"):
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
