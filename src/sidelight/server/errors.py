"""Every failure as an answer in OpenAI's error shape, without tracebacks and without prompts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from sidelight.engines.base import EngineBusyError, EngineUnavailableError, GenerationError
from sidelight.errors import ContextLengthError, SidelightError, VerdictError
from sidelight.policy.decisions import PolicyError
from sidelight.server.report import refusal_headers

_RELOAD_S = 5
# As nginx logs a client that left; nobody receives it.
_CLIENT_LEFT = 499
_MAX_TOLD = 500


@dataclass(frozen=True)
class _Kind:
    status: int
    type: str
    code: str | None = None


_KINDS: dict[type[SidelightError], _Kind] = {
    SidelightError: _Kind(400, "invalid_request_error"),
    ContextLengthError: _Kind(400, "invalid_request_error", "context_length_exceeded"),
    EngineBusyError: _Kind(429, "rate_limit_error", "engine_busy"),
    EngineUnavailableError: _Kind(503, "server_error", "unavailable"),
    GenerationError: _Kind(500, "server_error", "generation_failed"),
    VerdictError: _Kind(500, "server_error", "verdict_failed"),
}

# By whose fault the policy refuses a request.
_POLICY_KINDS = {
    "request": _Kind(400, "invalid_request_error"),
    "failed": _Kind(500, "server_error"),
    "late": _Kind(504, "server_error"),
}


class RequestError(SidelightError):
    """A request that the HTTP layer refuses.

    Args:
        message: What was got, what was wanted, what to do.
        status: The HTTP status.
        type: OpenAI's error type.
        code: A word for programs.
        param: The field of the request at fault.
        headers: Extra headers of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.body = error_body(message, type=type, code=code, param=param)
        self.headers = headers


def error_body(
    message: str, *, type: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """The JSON of an error."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def failure_body(error: SidelightError) -> dict[str, Any]:
    """The JSON of an error in the midst of a stream."""
    if isinstance(error, RequestError):
        return error.body
    kind = _kind(error)
    if isinstance(error, PolicyError):
        return error_body(str(error), type=kind.type, code=error.code, param=error.param)
    return error_body(str(error), type=kind.type, code=kind.code)


def add_error_handlers(app: FastAPI) -> None:
    """Makes every failure of ``app`` answer in OpenAI's shape; ``RequestScope`` answers crashes."""
    app.exception_handler(RequestError)(_refused)
    app.exception_handler(PolicyError)(_refused_by_policy)
    app.exception_handler(EngineBusyError)(_busy)
    app.exception_handler(EngineUnavailableError)(_unavailable)
    app.exception_handler(SidelightError)(_failed)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_not_served)
    app.exception_handler(ClientDisconnect)(_left)


def _kind(error: SidelightError) -> _Kind:
    if isinstance(error, PolicyError):
        return _POLICY_KINDS[error.fault]
    return next(_KINDS[base] for base in type(error).__mro__ if base in _KINDS)


def _answer(error: SidelightError, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(failure_body(error), status_code=_kind(error).status, headers=headers)


async def _refused(_request: Request, error: RequestError) -> Response:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _refused_by_policy(_request: Request, error: PolicyError) -> Response:
    return _answer(error, refusal_headers(error.decisions) if error.decisions else None)


async def _busy(_request: Request, error: EngineBusyError) -> Response:
    return _answer(error, {"Retry-After": str(error.retry_after_s)})


async def _unavailable(_request: Request, error: EngineUnavailableError) -> Response:
    return _answer(error, {"Retry-After": str(_RELOAD_S)})


async def _failed(_request: Request, error: SidelightError) -> Response:
    return _answer(error)


async def _invalid(_request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    param = _shortened(".".join(str(step) for step in first["loc"][1:]))
    # A body that is not an object has no field to blame: most often the content type is missing.
    message = (
        f"{param}: {_shortened(first['msg'])}"
        if param
        else "The body must be a JSON object, sent with Content-Type: application/json."
    )
    body = error_body(message, type="invalid_request_error", param=param or None)
    return JSONResponse(body, status_code=400)


def _shortened(text: str) -> str:
    """The text without what the client has written at length: keys, and values of a wrong kind."""
    return text if len(text) <= _MAX_TOLD else f"{text[:_MAX_TOLD]}..."


async def _not_served(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    body = error_body(message, type="invalid_request_error", code=None)
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def _left(_request: Request, _error: ClientDisconnect) -> Response:
    return Response(status_code=_CLIENT_LEFT)
