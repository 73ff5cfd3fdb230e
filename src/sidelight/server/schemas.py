"""Request bodies: shared types, and OpenAI's requests.

Undeclared fields and invalid values are refused, because a response that ignored them would not be
what the client asked for.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

from openai.types.chat.completion_create_params import (
    CompletionCreateParamsBase as ChatParameters,
)
from openai.types.completion_create_params import (
    CompletionCreateParamsBase as TextParameters,
)
from openai.types.shared import ErrorObject
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from sidelight.engines.base import Sampling
from sidelight.errors import did_you_mean
from sidelight.models.conversation import Message, PlainText


class ErrorResponse(BaseModel):
    """An error in OpenAI's format."""

    error: ErrorObject


class Extension(BaseModel):
    """The ``sidelight`` field of a response: every verdict with all its labels."""

    verdicts: list[dict[str, Any]]


REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "Refused; the message says what to do."},
    "5XX": {"model": ErrorResponse, "description": "Failed, loading, or past its deadline."},
}

# Response to a request with ``stream``: one chunk per line after ``data:``, then ``[DONE]``.
EVENTS: dict[str, Any] = {"text/event-stream": {}}


# A model name may be the path of a folder.
_MAX_NAME = 4096
_MAX_QUOTED = 100
_MAX_STOPS = 16
# Limit of a list, and of messages including their parts and calls, because every object takes time
# in which no other client is served.
MAX_ITEMS = 2048
_MAX_TEXTS = 16
# OpenAI's default of this older endpoint.
_COMPLETION_TOKENS = 16

# Fields that are accepted but ignored, with their allowed values besides the general no-op values;
# None allows any value.
Unread = Mapping[str, tuple[Any, ...] | None]
# Remedies for fields that belong to another route or engine.
_REMEDIES = {
    "prompt": "a chat request has 'messages'. Send them instead, or send the prompt to "
    "/v1/completions.",
    "messages": "a text completion has a 'prompt'. Send it instead, or send the messages to "
    "/v1/chat/completions.",
    **dict.fromkeys(
        ("tools", "tool_choice", "functions", "function_call", "parallel_tool_calls"),
        "this engine does not support tool calling. Leave it out, or serve the model with "
        "--engine vllm. Tool calls and results inside 'messages' are read.",
    ),
}
_NOTHING = (None, False, "", [])
# Clients that always send some of OpenAI's fields send these.
_UNREAD: Unread = {
    **dict.fromkeys([*ChatParameters.__annotations__, *TextParameters.__annotations__], ()),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "metadata": None,
    "modalities": (["text"],),
    "parallel_tool_calls": None,
    "presence_penalty": (0,),
    "prompt_cache_key": None,
    "response_format": ({"type": "text"},),
    "safety_identifier": None,
    "service_tier": ("auto", "default"),
    "tool_choice": ("none", "auto"),
    "top_logprobs": (0,),
    "user": None,
}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_parts(value: Any) -> Any:
    if value is None:
        raise ValueError(
            "this model cannot read a message without text, such as one that contains only tool "
            "calls"
        )
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def few(*lists: str) -> BeforeValidator:
    """A validator that limits the items of a list, including the lists with these names in its
    items.

    Every object takes time in which no other request is served.
    """

    def require_few(items: Any) -> Any:
        if isinstance(items, list):
            count = len(items)
            if count <= MAX_ITEMS:
                objects = [item for item in cast("list[Any]", items) if isinstance(item, dict)]
                lists_found = [item.get(name) for item in objects for name in lists]
                count += sum(len(items) for items in lists_found if isinstance(items, list))
            if count > MAX_ITEMS:
                raise ValueError(
                    f"got {count} items including their parts, expected at most {MAX_ITEMS} items"
                )
        return items

    return BeforeValidator(require_few)


T = TypeVar("T")
# A response field that is omitted if empty.
IfAny = Annotated[T | None, Field(exclude_if=lambda value: value is None)]
Name = Annotated[str, Field(max_length=_MAX_NAME)]
# Validation stops at the first invalid item, because only that one is reported and each error takes
# time.
Listed = Annotated[list[T], Field(fail_fast=True)]
Many = Annotated[Listed[T] | None, Field(max_length=MAX_ITEMS)]
# Counted as a whole before pydantic creates objects.
MessageList = Annotated[Listed[T], few("content", "tool_calls")]
# One text or several. Not a union, which would report errors for the wrong member.
Texts = Annotated[Listed[str], BeforeValidator(_as_list, json_schema_input_type=str | Listed[str])]
ProbeNames = Annotated[
    Listed[Name] | None, Field(description="Names of the probes to use; null uses all.")
]


class StrictBody(BaseModel):
    """A request body with strict types and no undeclared fields."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")

    unread: ClassVar[Unread] = {}
    # The remedy for another value of a field in ``unread``.
    unsupported: ClassVar[str] = "Leave it out, or serve the model with --engine vllm."
    # Remedies that replace it, by field.
    remedies: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown_fields(cls, value: Any) -> Any:
        """Report only the first unknown field; pydantic would report all."""
        if not isinstance(value, dict) or cls.model_config.get("extra") != "forbid":
            return value
        fields: dict[Any, Any] = {}
        for name, content in value.items():
            if name in cls.model_fields:
                fields[name] = content
            elif name not in cls.unread:
                quoted = str(name)[:_MAX_QUOTED]
                why = f"unknown field.{did_you_mean(quoted, cls.model_fields)}"
                raise _field_error("unknown_parameter", quoted, why)
            elif not _is_default(content, cls.unread[name]):
                why = cls.remedies.get(name, f"not supported here. {cls.unsupported}")
                raise _field_error("unsupported_parameter", name, why)
        return fields


def _is_default(content: Any, neutral: tuple[Any, ...] | None) -> bool:
    # For Python, 0 is False; `"logprobs": 0` asks for the log-probability of each token.
    return neutral is None or any(
        content == each and isinstance(content, bool) == isinstance(each, bool)
        for each in (*_NOTHING, *neutral)
    )


def _field_error(
    code: Literal["unknown_parameter", "unsupported_parameter"], field: str, message: str
) -> PydanticCustomError:
    """An error whose code and field ``server.errors`` puts into the response."""
    return PydanticCustomError(code, "{message}", {"field": field, "message": message})


class ContentPart(StrictBody):
    """A part of a message; only text is read."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class CalledFunction(StrictBody):
    """A tool's name and arguments."""

    name: str | None = None
    arguments: str


class ToolCall(StrictBody):
    """A function call; calls of other types cannot be classified."""

    id: str | None = None
    index: int | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class ChatMessage(StrictBody):
    """One turn: text, the assistant's tool calls, or the result of a tool.

    ``name`` and the ids of calls are ignored.
    """

    # Clients set fields to null when they send a response back.
    unread: ClassVar[Unread] = dict.fromkeys(
        ("annotations", "audio", "function_call", "reasoning", "reasoning_content", "refusal"), ()
    )

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        Listed[ContentPart],
        Field(max_length=MAX_ITEMS),
        BeforeValidator(_as_parts, json_schema_input_type=str | list[ContentPart]),
    ]

    tool_calls: Many[ToolCall] = None
    name: str | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _calls_need_no_content(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("tool_calls") and value.get("content") is None:
            return {**value, "content": []}
        return value

    @field_validator("tool_calls")
    @classmethod
    def _require_assistant_role(cls, value: list[ToolCall] | None, info: Any) -> Any:
        if value and info.data.get("role") != "assistant":
            raise ValueError("only assistant messages can have tool calls")
        return value

    def as_message(self) -> Message:
        """The turn as plain text; parts and calls become lines."""
        functions = [call.function for call in self.tool_calls or ()]
        calls = [(function.name or "", function.arguments) for function in functions]
        return Message.of_lines(self.role, [block.text for block in self.content], calls)


class StreamOptions(StrictBody):
    """Options for the content of a stream besides text; nothing is ever obfuscated."""

    include_usage: bool = False
    include_scores: bool = Field(
        default=False,
        description="Whether to stream each response probe's scores after each token.",
    )
    include_obfuscation: bool | None = None


class ChatModeration(StrictBody):
    """Requests moderation, which every response includes anyway, with the probes as its model."""

    model: str | None = None


class ReportRequest(StrictBody):
    """The fields with which a generation request chooses its report."""

    moderation: ChatModeration | None = None
    probes: ProbeNames = None


class WritingRequest(ReportRequest):
    """The common fields of generation requests."""

    unread: ClassVar[Unread] = _UNREAD
    remedies: ClassVar[Mapping[str, str]] = _REMEDIES

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
        """The sampling settings, with OpenAI's defaults."""
        return Sampling(
            max_tokens=self.max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            stop=tuple(self.stop or ()),
            seed=self.seed,
        )


class ChatRequest(WritingRequest):
    """The body of ``POST /v1/chat/completions``."""

    messages: MessageList[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def conversation(self) -> list[Message]:
        return [message.as_message() for message in self.messages]

    def sampling(self) -> Sampling:
        """The sampling settings; of the two token limits, OpenAI's newer one takes precedence."""
        limit = self.max_completion_tokens or self.max_tokens
        return replace(super().sampling(), max_tokens=limit)


class CompletionRequest(WritingRequest):
    """The body of ``POST /v1/completions``; prompts are texts, not token ids."""

    prompt: Texts = Field(min_length=1, max_length=_MAX_TEXTS)

    def texts(self) -> list[PlainText]:
        return [PlainText(text) for text in self.prompt]

    def sampling(self) -> Sampling:
        return replace(super().sampling(), max_tokens=self.max_tokens or _COMPLETION_TOKENS)


class TextsRequest(StrictBody):
    """Texts to classify independently."""

    input: Texts = Field(min_length=1, max_length=MAX_ITEMS)
    model: Name | None = Field(None, description="The served model's name.")
    probes: ProbeNames = None
