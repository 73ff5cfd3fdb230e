"""Lets requests pass that carry one of the keys."""

from fastapi import Depends, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from sidelight.server.errors import RequestError, error_body
from sidelight.server.keys import Access, Caller

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
