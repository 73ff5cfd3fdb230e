"""What the API's description says of every route: the shape of its refusals."""

from typing import Any

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What went wrong, for people and for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """A refusal or a failure, as OpenAI words it."""

    error: ErrorDetail


REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "Refused; the message says what to do."},
    "5XX": {"model": ErrorResponse, "description": "Failed, loading, or past its deadline."},
}

# What a request with ``stream`` gets: one chunk a line after ``data:``, then ``[DONE]``.
EVENTS: dict[str, Any] = {"text/event-stream": {}}
