"""Bodies of requests: the types that they share, and OpenAI's own requests.

Unknown fields are ignored; wrong values are errors.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    field_validator,
    model_validator,
)

from sidelight.engines.base import Sampling
from sidelight.errors import did_you_mean
from sidelight.policy.decisions import OverrideMode, PolicyOverride, PolicyOverrides
from sidelight.policy.rules import Side
from sidelight.prompts import Message, PlainText


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
        raise ValueError("this model reads no message without text, such as one of tool calls")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _require_few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > _MAX_NAMED:
        raise ValueError(f"got {len(value)} names, the limit is {_MAX_NAMED}")
    return value


class _FirstError(FailFast):
    """Ends a list at its first wrong item: only that one is reported, and each error costs time."""

    def __hash__(self) -> int:
        # Python 3.11 hashes the members of a union; pydantic's class has no hash.
        return hash(type(self))


T = TypeVar("T")
FIRST_ERROR = _FirstError()
Name = Annotated[str, Field(max_length=_MAX_NAME)]
Listed = Annotated[list[T], FIRST_ERROR]
# Pydantic cannot stop at an object's first wrong value, so its size is checked before.
Named = Annotated[dict[Name, T], Field(max_length=_MAX_NAMED), BeforeValidator(_require_few)]
# One text or several. Not a union: that would blame one member for an error in the other.
Texts = Annotated[
    list[str], FIRST_ERROR, BeforeValidator(_as_list, json_schema_input_type=str | list[str])
]
ProbeNames = Annotated[Listed[Name] | None, Field(description="Only these probes; null: all.")]
Explain = Annotated[
    Literal["matrix"] | bool | None,
    Field(
        description="Whether to say what each token and layer adds to the logits; "
        "`matrix`: also each token in each layer."
    ),
]


class StrictBody(BaseModel):
    """What a client sends: each value of the declared type, nothing converted."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class ContentPart(StrictBody):
    """A piece of a message; only text is read."""

    type: str
    text: str

    @field_validator("type")
    @classmethod
    def _is_text(cls, value: str) -> str:
        if value != "text":
            raise ValueError("this model reads only parts of type 'text'")
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
    include_scores: bool = Field(
        False, description="Whether to send what probes of the response say after each token."
    )


class ClosedBody(StrictBody):
    """A part of a body whose other fields are refused: an ignored safety setting is a hole."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _holds_no_other(cls, value: Any) -> Any:
        # Only the first is reported; pydantic would report each.
        for name in value if isinstance(value, dict) else {}:
            if name not in cls.model_fields:
                hint = did_you_mean(str(name), cls.model_fields)
                raise ValueError(f"there is no '{name}' here.{hint}")
        return value


class ModerationMode(ClosedBody):
    """What follows from a flag; ``score`` adds nothing, and is a 400 where the server blocks."""

    mode: OverrideMode


class ModerationPolicy(ClosedBody):
    """Policies for prompts and responses."""

    input: ModerationMode | None = None
    output: ModerationMode | None = None


class ChatModeration(ClosedBody):
    """Asks for moderation, which every answer carries anyway, and perhaps for blocking.

    ``model`` is ignored: the probes moderate.
    """

    model: str | None = None
    policy: ModerationPolicy | None = None


class ProbePolicy(ClosedBody):
    """What a request asks of one probe: stricter than the server's policy, never looser."""

    mode: OverrideMode | None = None
    threshold: float | None = Field(None, ge=0, le=1)


class PolicyRequest(StrictBody):
    """What a request for text may ask of the policy."""

    moderation: ChatModeration | None = None
    probes: ProbeNames = None
    policies: Named[ProbePolicy] | None = None
    explain: Explain = None

    def overrides(self) -> PolicyOverrides:
        asked = (self.moderation and self.moderation.policy) or ModerationPolicy()
        sides: dict[Side, ModerationMode | None] = {"input": asked.input, "output": asked.output}
        probes = self.policies or {}
        return PolicyOverrides(
            {side: own.mode for side, own in sides.items() if own is not None},
            {name: PolicyOverride(own.mode, own.threshold) for name, own in probes.items()},
        )


class WritingRequest(PolicyRequest):
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

    def sampling(self) -> Sampling:
        """The request's settings, with OpenAI's defaults."""
        return Sampling(
            max_tokens=self.max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            stop=tuple(self.stop or ()),
            seed=self.seed,
        )


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
        return [message.as_message() for message in self.messages]

    def sampling(self) -> Sampling:
        """The request's settings; of the two limits, OpenAI's newer one counts."""
        return replace(
            super().sampling(),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class CompletionRequest(WritingRequest):
    """The body of ``POST /v1/completions``; prompts are texts, not token ids."""

    prompt: Texts = Field(min_length=1, max_length=_MAX_TEXTS)
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: None = None
    logprobs: int | None = Field(None, ge=0, le=_MAX_TEXT_LOGPROBS)

    def texts(self) -> list[PlainText]:
        return [PlainText(text) for text in self.prompt]

    def sampling(self) -> Sampling:
        limit = self.max_tokens or _COMPLETION_TOKENS
        return replace(super().sampling(), max_tokens=limit, logprobs=self.logprobs)


class ModerationRequest(StrictBody):
    """The body of ``POST /v1/moderations``; each text is judged by itself."""

    input: Texts = Field(min_length=1)
    model: Name | None = None
    probes: ProbeNames = None
    explain: Explain = None
