"""Lets requests pass that carry one of the keys."""

import hmac
from collections.abc import Sequence

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from sidelight.server.errors import error_body

_OPEN_PATHS = frozenset({"/health"})


class BearerAuth:
    """Answers 401 unless ``Authorization: Bearer`` holds a key; ``/health`` is open to all.

    Stands before the routing, so that nobody without a key learns which routes exist.

    Args:
        app: What is protected.
        keys: The accepted keys; none: everybody passes.
    """

    def __init__(self, app: ASGIApp, *, keys: Sequence[str]):
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers it."""
        is_open = scope["type"] != "http" or scope["path"] in _OPEN_PATHS or not self._keys
        if is_open or self._is_known(Headers(scope=scope).get("authorization", "")):
            await self._app(scope, receive, send)
        else:
            await _refusal()(scope, receive, send)

    def _is_known(self, header: str) -> bool:
        scheme, _, given = header.partition(" ")
        # All keys are compared, each in constant time: the time taken tells nothing about them.
        matches = [hmac.compare_digest(given.strip().encode("latin-1"), k) for k in self._keys]
        return any(matches) and scheme.lower() == "bearer"


def _refusal() -> JSONResponse:
    body = error_body(
        "Missing or unknown API key. Send it as 'Authorization: Bearer KEY'.",
        type="authentication_error",
        code="invalid_api_key",
    )
    return JSONResponse(body, status_code=401, headers={"WWW-Authenticate": "Bearer"})
