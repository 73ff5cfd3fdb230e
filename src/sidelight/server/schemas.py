"""Bodies of requests: the types that they share, and OpenAI's own requests.

Unknown fields are ignored, unless they would change the answer or resemble a field of ours; wrong
values are errors.
"""

from collections.abc import Iterable, Mapping
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
from sidelight.errors import closest, did_you_mean
from sidelight.policy.decisions import OverrideMode, PolicyOverride, PolicyOverrides
from sidelight.policy.rules import Side
from sidelight.prompts import Message, PlainText
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


# The path of a folder may be a model's name.
_MAX_NAME = 4096
_MAX_NAMED = 400
# Unknown fields, each of which is compared with all known ones.
_MAX_UNKNOWN = 64
_MAX_STOPS = 16
_MAX_TEXTS = 16
# OpenAI's default of this older endpoint, and its limits.
_COMPLETION_TOKENS = 16
_MAX_TOP_LOGPROBS = 20
_MAX_TEXT_LOGPROBS = 5

# Fields of OpenAI's API and of vLLM's that would change the text or its form, with the values,
# beside null, that ask for what happens anyway.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    # An argument of client libraries, which put what it holds into the body.
    "extra_body": ({},),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "store": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (0, -1),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Fields of theirs that change no answer.
_WITHOUT_EFFECT = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "user",
    }
)
# Of 0 to 1, as difflib counts.
_LIKENESS = 0.8
_SINGULARS = {"policy": "policies"}


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


class RequestBody(StrictBody):
    """A whole body. No field of it that matters is ignored in silence."""

    @model_validator(mode="before")
    @classmethod
    def _ignores_nothing_that_matters(cls, value: Any) -> Any:
        if isinstance(value, dict):
            names: list[str] = [name for name in value if name not in cls.model_fields]
            _refuse_near_misses(names, cls.model_fields)
        return value


def _refuse_near_misses(names: Iterable[str], known: Iterable[str]) -> None:
    """A misspelt field would be ignored, and with it perhaps what makes a request safe."""
    plain = {name: name.lower().replace("-", "_") for name in names}
    others = _UNSUPPORTED.keys() | _WITHOUT_EFFECT
    unknown = {name: own for name, own in plain.items() if own not in others}
    if len(unknown) > _MAX_UNKNOWN:
        raise RequestError(
            f"Too many unknown fields: got {len(unknown)}, the limit is {_MAX_UNKNOWN}.",
            code="too_many_values",
        )
    for name, own in unknown.items():
        close = closest(_SINGULARS.get(own, own), known, cutoff=_LIKENESS)
        if close:
            raise RequestError(
                f"Unknown field '{name}'. Did you mean '{close}'?",
                code="unknown_parameter",
                param=name,
            )


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


class CalledFunction(StrictBody):
    """A tool's name and arguments."""

    name: str | None = None
    arguments: str


class ToolCall(StrictBody):
    """A function that the model calls; calls of another kind cannot be judged."""

    function: CalledFunction


# What a message may hold beside text, and that nobody would read.
_UNREAD = ("audio", "function_call", "refusal")


class ChatMessage(StrictBody):
    """One turn: text, the tools that the assistant calls, or what a tool has answered.

    A call is written as JSON at the end of the turn's text, whatever the template makes of calls:
    so the model reads it, and so do the probes. Nobody reads the ids of calls.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        list[ContentPart],
        FIRST_ERROR,
        BeforeValidator(_as_parts, json_schema_input_type=str | list[ContentPart]),
    ]

    tool_calls: Listed[ToolCall] | None = None

    @model_validator(mode="before")
    @classmethod
    def _holds_what_is_read(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name in _UNREAD:
            if value.get(name) is not None:
                raise RequestError(
                    f"A message with '{name}' is not supported: nobody would read it. Send text.",
                    code="unsupported_parameter",
                    param="messages",
                )
        if value.get("tool_calls") and value.get("content") is None:
            return {**value, "content": []}
        return value

    @field_validator("tool_calls")
    @classmethod
    def _are_the_assistants(cls, value: list[ToolCall] | None, info: Any) -> Any:
        if value and info.data.get("role") != "assistant":
            raise ValueError("only the assistant calls tools")
        return value

    def as_message(self) -> Message:
        """The turn as plain text; parts and calls become lines."""
        calls = (call.function for call in self.tool_calls or ())
        lines = [
            *(part.text for part in self.content),
            *(f'{{"name": "{f.name or ""}", "arguments": {f.arguments}}}' for f in calls),
        ]
        return Message(self.role, "\n".join(lines))


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


class StreamOptions(ClosedBody):
    """What a stream carries besides text; nothing is ever obfuscated."""

    include_usage: bool = False
    include_scores: bool = Field(
        False, description="Whether to send what probes of the response say after each token."
    )
    include_obfuscation: bool | None = None


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


class PolicyRequest(RequestBody):
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

    @model_validator(mode="before")
    @classmethod
    def _asks_for_nothing_else(cls, value: Any) -> Any:
        for name in filter(_UNSUPPORTED.__contains__, value if isinstance(value, dict) else ()):
            if value[name] is not None and value[name] not in _UNSUPPORTED[name]:
                raise RequestError(
                    f"'{name}' is not supported here, and an answer that ignores it would not be "
                    "what you ask for. Leave it out.",
                    code="unsupported_parameter",
                    param=name,
                )
        return value

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
    logprobs: int | None = Field(None, ge=0, le=_MAX_TEXT_LOGPROBS)

    def texts(self) -> list[PlainText]:
        return [PlainText(text) for text in self.prompt]

    def sampling(self) -> Sampling:
        limit = self.max_tokens or _COMPLETION_TOKENS
        return replace(super().sampling(), max_tokens=limit, logprobs=self.logprobs)


class ModerationRequest(RequestBody):
    """The body of ``POST /v1/moderations``; each text is judged by itself."""

    input: Texts = Field(min_length=1)
    model: Name | None = None
    probes: ProbeNames = None
    explain: Explain = None
