"""Names each request, and writes one line about it: by its route, never by its path or query."""

import logging
import time
import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sidelight.server.keys import Caller

REQUEST_ID = "x-request-id"
UNROUTED = "other"
_log = logging.getLogger("sidelight.access")


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
    _log.info("%s %s %d %.3f s", fields["method"], fields["route"], status, seconds, extra=fields)
