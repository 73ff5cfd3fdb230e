"""Error responses in the format of each API, without tracebacks or prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from sidelight.engines.base import (
    EngineBusyError,
    EngineUnavailableError,
    GenerationError,
    NotExplainedError,
)
from sidelight.errors import ContextLengthError, DisguisedTextError, SidelightError, VerdictError
from sidelight.policy.decisions import PolicyError
from sidelight.policy.request import refusal_headers
from sidelight.server.keys import Caller

# Prefix of the routes of the detectors API.
DETECTORS = "/api/v1/text/"
# nginx's status for a client that disconnected; it is never received.
_CLIENT_LEFT = 499
_MAX_QUOTED = 500

# OpenAI's error types; other statuses are server errors from 500 on, else request errors.
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# Status and code by the closest class of an error.
_KINDS: dict[type[SidelightError], tuple[int, str | None]] = {
    SidelightError: (400, None),
    ContextLengthError: (400, "context_length_exceeded"),
    EngineBusyError: (429, "engine_busy"),
    NotExplainedError: (400, "explain_unsupported"),
    EngineUnavailableError: (503, "unavailable"),
    GenerationError: (500, "generation_failed"),
    VerdictError: (500, "verdict_failed"),
}


class RequestError(SidelightError):
    """An HTTP error: ``code`` is machine-readable, and ``param`` is the field that caused it."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = headers

    def answer(self, scope: Scope) -> JSONResponse:
        """The response to this request, in the format of its route."""
        is_detectors = routed_path(scope).startswith(DETECTORS)
        body = {"code": self.status, "message": str(self)} if is_detectors else self.body
        return JSONResponse(body, status_code=self.status, headers=self.headers)


def routed_path(scope: Scope) -> str:
    """The path for routing, without the prefix that the application is mounted under."""
    path, prefix = scope["path"], scope.get("root_path", "")
    return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else path


def as_request_error(error: SidelightError, *, is_admin: bool = False) -> RequestError:
    """Convert an error for a client; ``is_admin`` if its key sees undisclosed verdicts."""
    message, headers = str(error), None
    match error:
        case RequestError():
            return error
        case PolicyError(status=status, code=code, param=param, decisions=decisions):
            headers = refusal_headers(decisions, is_admin=is_admin) if decisions else None
            return RequestError(message, status=status, code=code, param=param, headers=headers)
        case DisguisedTextError(code=code):
            return RequestError(message, code=code)
        case EngineBusyError():
            headers = {"Retry-After": "1"}
        case EngineUnavailableError():
            headers = {"Retry-After": "5"}
        case _:
            pass
    status, code = next(_KINDS[base] for base in type(error).__mro__ if base in _KINDS)
    return RequestError(message, status=status, code=code, headers=headers)


def add_error_handlers(app: FastAPI) -> None:
    """Give every error of ``app`` its API's format; ``RequestScope`` handles crashes."""
    app.exception_handler(SidelightError)(_failed)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_not_served)
    app.exception_handler(ClientDisconnect)(_left)


async def _failed(request: Request, error: SidelightError) -> Response:
    caller: Caller = getattr(request.state, "caller", Caller())
    return as_request_error(error, is_admin=caller.is_admin).answer(request.scope)


async def _invalid(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    return wrong_field(first, first["loc"][1:]).answer(request.scope)


def wrong_field(error: Mapping[str, Any], place: Sequence[int | str]) -> RequestError:
    """One of pydantic's errors, at this place of the body."""
    field = error.get("ctx", {}).get("field")
    param = _shortened(".".join(map(str, [*place, *([field] if field else [])])))
    # A body that is not an object has no field to name; usually, the content type is missing.
    message = (
        f"{param}: {_shortened(error['msg'])}"
        if param
        else "The body must be a JSON object, sent with Content-Type: application/json."
    )
    return RequestError(message, code=error["type"] if field else None, param=param or None)


def _shortened(text: str) -> str:
    """Truncate long client text, such as keys and values of the wrong type."""
    return text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}..."


async def _not_served(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    status, code = error.status_code, None
    if status == 404:
        code = "route_not_found"
        message += ". docs/routes.md lists the routes."
        if request.url.path.startswith("/v1/responses"):
            message += " This server has no Responses API: use /v1/chat/completions."
    error_of_route = RequestError(message, status=status, code=code, headers=error.headers)
    return error_of_route.answer(request.scope)


async def _left(_request: Request, _error: ClientDisconnect) -> Response:
    return Response(status_code=_CLIENT_LEFT)
