"""What the API's description says of every route: the shape of its refusals.

Reads a request's body: no more than the limit, and nothing but strict JSON.

The requests, as OpenAI words them. Unknown fields are ignored; wrong values are errors.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import from_json

from sidelight.engines.base import Sampling
from sidelight.errors import did_you_mean
from sidelight.policy.overrides import OverrideMode, PolicyOverride, PolicyOverrides
from sidelight.prompts import Message, PlainText
from sidelight.server.config import ServerConfig
from sidelight.server.errors import RequestError


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


_Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class JsonRoute(APIRoute):
    """A route whose body is strict JSON, within the server's limits of size and time.

    Refused with 400: ``NaN``, ``Infinity``, half surrogate pairs, invalid UTF-8, endless nesting.
    The standard library's parser lets the first three pass. ``1e999`` arrives as an infinity, which
    the field that reads it has to refuse: ``StrictBody`` does for fields of numbers.
    """

    def get_route_handler(self) -> _Handler:
        """FastAPI's hook for requests of another class."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            # Before FastAPI's own reading, which would turn every error into a bare 400.
            body = await _read_in_time(request, request.app.state.context.config)
            return await handle(_JsonRequest(request, body))

        return handle_strictly


class _JsonRequest(Request):
    """A request whose body has been read and checked."""

    def __init__(self, request: Request, body: bytes):
        super().__init__(request.scope, request.receive)
        self._bytes = body
        self._value = _parse(body)

    async def body(self) -> bytes:
        return self._bytes

    async def json(self) -> Any:
        return self._value


async def _read_in_time(request: Request, config: ServerConfig) -> bytes:
    try:
        async with asyncio.timeout(config.body_s):
            return await _read(request, limit=config.max_body_bytes)
    except TimeoutError as error:
        raise RequestError(
            f"The body did not arrive within {config.body_s:g} seconds. Send it faster, or less.",
            status=408,
            code="body_timeout",
        ) from error


async def _read(request: Request, *, limit: int) -> bytes:
    received, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        # The rest is read and dropped: closing on a client that still sends resets the connection,
        # and the reason may be lost on its way.
        if size <= limit:
            received += chunk
    if size > limit:
        raise RequestError(
            f"The body is larger than {limit:,} bytes. Send less at a time.",
            status=413,
            code="request_too_large",
        )
    return bytes(received)


def _parse(body: bytes) -> Any:
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"The body is not valid JSON: {error}.") from error


# The path of a folder may be a model's name.
_MAX_NAME = 4096
_MAX_NAMED = 400
_MAX_STOPS = 16
_MAX_TEXTS = 16
# OpenAI's default of this older endpoint, and its limits.
_COMPLETION_TOKENS = 16
_MAX_TOP_LOGPROBS = 20
_MAX_TEXT_LOGPROBS = 5


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_parts(value: Any) -> Any:
    if value is None:
        raise ValueError("a message without text, as one of tool calls, is not read by this model")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _require_few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > _MAX_NAMED:
        raise ValueError(f"{len(value)} names, and {_MAX_NAMED} may be")
    return value


class _FirstError(FailFast):
    """Ends a list at its first wrong item: nothing else is told, and each error takes its time."""

    def __hash__(self) -> int:
        # Python 3.11 hashes the members of a union; pydantic's class has no hash.
        return hash(type(self))


T = TypeVar("T")
FIRST_ERROR = _FirstError()
Name = Annotated[str, Field(max_length=_MAX_NAME)]
Listed = Annotated[list[T], FIRST_ERROR]
# Nothing ends an object at its first wrong value, so its size is checked before.
Named = Annotated[dict[Name, T], Field(max_length=_MAX_NAMED), BeforeValidator(_require_few)]
# One text or several. Not a union: that would blame one member for an error in the other.
Texts = Annotated[
    list[str], FIRST_ERROR, BeforeValidator(_as_list, json_schema_input_type=str | list[str])
]
ProbeNames = Annotated[Listed[Name] | None, Field(description="Only these probes; null: all.")]


class StrictBody(BaseModel):
    """What a client sends: each value of its own type, nothing converted."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class ContentPart(StrictBody):
    """A piece of a message; only text is read."""

    type: str
    text: str

    @field_validator("type")
    @classmethod
    def _is_text(cls, value: str) -> str:
        if value != "text":
            raise ValueError("only parts of type 'text' are read by this model")
        return value


class ChatMessage(StrictBody):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[ContentPart],
        FIRST_ERROR,
        BeforeValidator(_as_parts, json_schema_input_type=str | list[ContentPart]),
    ]

    def as_message(self) -> Message:
        """The turn as plain text; several parts become lines."""
        return Message(self.role, "\n".join(part.text for part in self.content))


class StreamOptions(StrictBody):
    """What a stream carries besides text."""

    include_usage: bool = False


class ClosedBody(StrictBody):
    """A part of a body whose other fields are refused: an ignored safety setting is a hole."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _holds_no_other(cls, value: Any) -> Any:
        # Pydantic would tell each of them.
        for name in value if isinstance(value, dict) else {}:
            if name not in cls.model_fields:
                hint = did_you_mean(str(name), cls.model_fields)
                raise ValueError(f"there is no '{name}' here.{hint}")
        return value


class ModerationMode(ClosedBody):
    """What follows from a flag; ``score`` adds nothing, and is a 400 where the server blocks."""

    mode: OverrideMode


class ModerationPolicy(ClosedBody):
    """Policies for both sides."""

    input: ModerationMode | None = None
    output: ModerationMode | None = None


class ChatModeration(ClosedBody):
    """Asks for moderation, which every answer carries anyway, and perhaps for blocking.

    The model is read by nobody: the probes moderate.
    """

    model: str | None = None
    policy: ModerationPolicy | None = None


class ProbePolicy(ClosedBody):
    """What a request asks of one probe: only what is stricter than the server's policy."""

    mode: OverrideMode | None = None
    threshold: float | None = Field(None, ge=0, le=1)


class WritingRequest(StrictBody):
    """What requests for text have in common."""

    model: Name
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    stop: Texts | None = Field(None, max_length=_MAX_STOPS)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=_MAX_TEXTS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    moderation: ChatModeration | None = None
    probes: ProbeNames = None
    policies: Named[ProbePolicy] | None = None

    @property
    def limit(self) -> int | None:
        """Most tokens to write."""
        return self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """How many likeliest tokens are told with each token; None: no log-probabilities are."""
        return None

    def sampling(self) -> Sampling:
        """The request's settings, with OpenAI's defaults."""
        return Sampling(
            max_tokens=self.limit,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            stop=tuple(self.stop or ()),
            seed=self.seed,
            logprobs=self.likeliest,
        )

    def overrides(self) -> PolicyOverrides:
        """What it asks of the policy."""
        policy = self.moderation and self.moderation.policy
        return PolicyOverrides(
            input=policy.input.mode if policy and policy.input else None,
            output=policy.output.mode if policy and policy.output else None,
            probes={
                n: PolicyOverride(p.mode, p.threshold) for n, p in (self.policies or {}).items()
            },
        )

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(WritingRequest):
    """The body of ``POST /v1/chat/completions``."""

    messages: Listed[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=_MAX_TOP_LOGPROBS)

    @field_validator("top_logprobs")
    @classmethod
    def _goes_with_logprobs(cls, value: int | None, info: Any) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise ValueError("only allowed where 'logprobs' is true")
        return value

    def conversation(self) -> list[Message]:
        """The turns as the engine takes them."""
        return [message.as_message() for message in self.messages]

    @property
    def limit(self) -> int | None:
        """Most tokens to write; the newer field counts."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """How many likeliest tokens are told with each token; None: no log-probabilities are."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(WritingRequest):
    """The body of ``POST /v1/completions``; prompts are texts, not token ids."""

    prompt: Texts = Field(min_length=1, max_length=_MAX_TEXTS)
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: None = None
    logprobs: int | None = Field(None, ge=0, le=_MAX_TEXT_LOGPROBS)

    def texts(self) -> list[PlainText]:
        """What is to be gone on with."""
        return [PlainText(text) for text in self.prompt]

    @property
    def limit(self) -> int:
        """Most tokens to write: sixteen, unless told."""
        return self.max_tokens or _COMPLETION_TOKENS

    @property
    def likeliest(self) -> int | None:
        """How many likeliest tokens are told with each token; None: no log-probabilities are."""
        return self.logprobs


class ModerationRequest(StrictBody):
    """The body of ``POST /v1/moderations``; each text is judged by itself."""

    input: Texts = Field(min_length=1)
    model: Name | None = None
    probes: ProbeNames = None
