"""Bounds the requests that are answered at the same time."""

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from sidelight.server.errors import error_body

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
