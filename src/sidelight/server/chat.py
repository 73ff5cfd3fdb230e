"""``POST /v1/chat/completions`` and ``/v1/completions``: text and verdicts from one forward pass.

The texts of a request are written side by side; all its prompts are classified before the first
text is sent. The answer has OpenAI's formats: one JSON object, or server-sent events.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any, ClassVar

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response, StreamingResponse
from openai.types import Completion
from openai.types.chat import ChatCompletion
from starlette.types import Receive, Scope, Send

from sidelight.engines.base import Sampling, TextDelta
from sidelight.errors import SidelightError
from sidelight.models.conversation import Conversation, with_invisible
from sidelight.policy.enforcement import Classified, Passed
from sidelight.policy.hold_back import Ended
from sidelight.policy.request import Json, RequestResult
from sidelight.server.errors import as_request_error
from sidelight.server.requests import Route, ServerRequest, unless_left
from sidelight.server.schemas import (
    EVENTS,
    ChatRequest,
    CompletionRequest,
    Extension,
    StreamOptions,
    WritingRequest,
)

# What is sent of each choice; choices of one prompt are neighbours.
Streams = Sequence[AsyncGenerator[Passed, None]]
# A seed is a signed number of 64 bits; the first follows the last.
_SEEDS = 2**63
# Most prompts of one request in the engine's queue at once, so that others find room there.
_WAITING = 16


class CompletionFormat:
    """Formats one answer as a completion: each text stands in its choice.

    Args:
        result: What comes of the request.
        includes_usage: Whether a stream ends with a usage chunk.

    Attributes:
        prefix: Beginning of the answer's id.
        kind: Type of the object that is the whole answer.
        chunk_kind: Type of the objects of a stream.
        opening: More fields of the first delta of each choice.
    """

    prefix = "cmpl"
    kind = chunk_kind = "text_completion"
    opening: ClassVar[Json] = {}

    def __init__(self, result: RequestResult, *, includes_usage: bool):
        self._result, self._context = result, result.context
        self._includes_usage = includes_usage
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    @staticmethod
    def text(text: str) -> Json:
        """A whole text, as a field of its choice."""
        return {"text": text}

    @staticmethod
    def delta(text: str | None, end: Json, extra: Json) -> Json:
        """More of a text, as fields of its choice.

        Args:
            text: What was added; None at the end.
            end: Fields of every choice.
            extra: Our own fields, which go where clients keep them.
        """
        return {"text": text or "", **end, **extra}

    def completion(self, texts: Sequence[str]) -> Json:
        """The body of a plain answer, once all texts have ended."""
        choices = [
            {
                "index": index,
                **self.text(text),
                "logprobs": None,
                "finish_reason": choice.ended and choice.ended.reason,
            }
            for index, (text, choice) in enumerate(zip(texts, self._result.choices, strict=True))
        ]
        return {
            **self._fields(self.kind),
            "choices": choices,
            "usage": self._usage(),
            **self._verdicts(),
        }

    async def chunks(self, events: AsyncGenerator[tuple[int, Passed], None]) -> AsyncGenerator[str]:
        """Verdicts, moderation, text, the reasons for the end, usage, ``[DONE]``.

        A failure midway is the last event; no ``[DONE]`` follows, so that no client takes the text
        for complete.

        Args:
            events: With the index of their choice; each prompt has been admitted.
        """
        context = self._context
        openings: list[list[Json]] = []
        for choice in self._result.choices:
            assert choice.admitted is not None
            openings.append(context.entries(choice.admitted.decisions))
        async with aclosing(events):
            try:
                for index, verdicts in enumerate(openings):
                    opening = {**self.opening, **_numbered(verdicts)}
                    yield self._chunk([self.choice(index, "", opening)])
                if context.chosen:
                    yield self._chunk([], **self._verdicts())
                async for index, event in events:
                    match event:
                        case TextDelta(text):
                            # Of a placeholder, the pieces after the first are empty.
                            if text:
                                yield self._chunk([self.choice(index, text)])
                        case Classified():
                            yield self._chunk([], sidelight=self._running(index, event))
                        case Ended(reason):
                            entries = context.entries(event.decisions)
                            first = len(openings[index])
                            extra = (
                                _numbered(entries, first=first) if context.reads_response else {}
                            )
                            yield self._chunk([self.choice(index, None, extra, reason)])
                if context.reads_response:
                    yield self._chunk([], **self._verdicts())
                if self._includes_usage:
                    yield self._chunk([], usage=self._usage())
                yield "data: [DONE]\n\n"
            except SidelightError as error:
                yield _sse(as_request_error(error).body)

    @classmethod
    def choice(
        cls,
        index: int,
        text: str | None,
        extra: Json | None = None,
        reason: str | None = None,
    ) -> Json:
        """A chunk's choice; arguments as for ``delta``."""
        end = {"logprobs": None, "finish_reason": reason}
        return {"index": index, **cls.delta(text, end, extra or {})}

    def _verdicts(self) -> Json:
        return {
            "moderation": self._result.moderation(),
            "sidelight": self._result.extension(),
        }

    def _running(self, index: int, running: Classified) -> Json:
        """The ``sidelight`` field while text ``index`` is written: verdicts with scores alone.

        A label would tell ordinary keys more of what blocks them than the cut does.
        """
        entries = self._context.entries(running.decisions)
        verdicts = [entry for entry in entries if "probabilities" in entry]
        return {"running": {"index": index, "tokens": running.tokens, "verdicts": verdicts}}

    def _usage(self) -> dict[str, int]:
        """Tokens read and written; a prompt counts once, however many texts follow it."""
        ends = [choice.ended for choice in self._result.choices]
        prompt = sum(admitted.tokens for admitted in self._result.prompts)
        written = sum(end.completion_tokens for end in ends if end)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
        }

    def _chunk(self, choices: list[Json], **extra: Any) -> str:
        # With include_usage every chunk has the field, null until the last (OpenAI's API).
        blank = {"usage": None} if self._includes_usage else {}
        return _sse({**self._fields(self.chunk_kind), "choices": choices, **blank, **extra})

    def _fields(self, kind: str) -> Json:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._context.model,
        }


class ChatCompletionFormat(CompletionFormat):
    """Formats one answer as a chat completion: each text is a message of its choice."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    opening: ClassVar[Json] = {"role": "assistant"}

    @staticmethod
    def text(text: str) -> Json:
        return {"message": {**ChatCompletionFormat.opening, "content": text}}

    @staticmethod
    def delta(text: str | None, end: Json, extra: Json) -> Json:
        content = {} if text is None else {"content": text}
        return {"delta": {**content, **extra}, **end}


class EventStream(StreamingResponse):
    """Sends events, and closes them when the answer is over, so that their end is recorded.

    Starlette leaves them to the garbage collector if sending fails.
    """

    def __init__(self, events: AsyncGenerator[str, None], headers: Mapping[str, str]):
        headers = {**headers, "Cache-Control": "no-cache"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


def _numbered(verdicts: Sequence[Json], *, first: int = 0) -> Json:
    """The field of a delta; OpenAI's stream helper merges lists by ``index``.

    Without one it raises as soon as a second delta has verdicts.
    """
    numbered = enumerate(verdicts, start=first)
    return {"sidelight": {"verdicts": [{"index": i, **verdict} for i, verdict in numbered]}}


def _sse(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'), allow_nan=False)}\n\n"


router = APIRouter(route_class=Route)


class ChatAnswer(ChatCompletion):
    """OpenAI's chat completion, with every verdict in a field of its own."""

    sidelight: Extension


class CompletionAnswer(Completion):
    """OpenAI's completion, with every verdict in a field of its own."""

    sidelight: Extension


def _writing(path: str, answer: type[Completion | ChatCompletion]) -> Callable[..., Any]:
    """A route whose answer is one object of this type, or a stream."""
    responses: dict[int | str, dict[str, Any]] = {200: {"model": answer, "content": EVENTS}}
    return router.post(path, name="create", response_class=Response, responses=responses)


@_writing("/v1/chat/completions", ChatAnswer)
async def complete_chat(body: ChatRequest, request: ServerRequest) -> Response:
    """The text, plain or streamed; either begins once the prompt has been classified."""
    return await _answer(body, request, [body.conversation()], ChatCompletionFormat)


@_writing("/v1/completions", CompletionAnswer)
async def complete_text(body: CompletionRequest, request: ServerRequest) -> Response:
    """The texts, plain or streamed; prompts get no chat template."""
    return await _answer(body, request, body.texts(), CompletionFormat)


async def _answer(
    body: WritingRequest,
    request: ServerRequest,
    prompts: Sequence[Conversation],
    answer_format: type[CompletionFormat],
) -> Response:
    request.require_model(body.model)
    sampling, n, options = body.sampling(), body.n or 1, body.stream_options or StreamOptions()
    context = await request.begin(prompts, body.probes, n=n, max_tokens=sampling.max_tokens)
    # Nothing is awaited until the engine has all texts, so that it uses these very probes.
    result = RequestResult(context)
    answer = answer_format(result, includes_usage=options.include_usage)
    stream_scores = bool(body.stream and options.include_scores)
    streams: list[AsyncGenerator[Passed, None]] = []
    for prompt in prompts:
        read = with_invisible(prompt, context.policy.invisible_characters)
        for number, text in enumerate(result.begin(n, stream_scores=stream_scores)):
            events = request.engine.generate(
                read, _reseeded(sampling, number), monitored=text.monitored, admits=text.admits
            )
            streams.append(text.guard(prompt, events))
    await unless_left(request, _wait_for_admission(streams))
    if body.stream:
        headers = result.headers(is_stream=True)
        return EventStream(answer.chunks(_side_by_side(streams)), headers)
    texts = await unless_left(request, _collected(streams))
    return JSONResponse(answer.completion(texts), headers=result.headers(is_stream=False))


async def _wait_for_admission(streams: Streams) -> None:
    """Wait until the prompt of each choice is classified; a blocked one refuses all."""
    places = asyncio.Semaphore(_WAITING)

    async def first(stream: AsyncGenerator[Passed, None]) -> None:
        async with places:
            await anext(stream)

    try:
        async with asyncio.TaskGroup() as group:
            for stream in streams:
                group.create_task(first(stream))
    except (ExceptionGroup, asyncio.CancelledError) as failure:
        await _close(streams)
        if isinstance(failure, ExceptionGroup):
            raise failure.exceptions[0] from None
        raise


async def _side_by_side(streams: Streams) -> AsyncGenerator[tuple[int, Passed], None]:
    """The events of all admitted choices, one of each in turn.

    The next event of each is awaited at once, since each text may wait for a judge.
    """
    alive = {index: _next(stream) for index, stream in enumerate(streams)}
    try:
        while alive:
            for index, upcoming in list(alive.items()):
                try:
                    event = await upcoming
                except StopAsyncIteration:
                    del alive[index]
                else:
                    alive[index] = _next(streams[index])
                    yield index, event
    finally:
        for upcoming in alive.values():
            upcoming.cancel()
        await asyncio.gather(*alive.values(), return_exceptions=True)
        await _close(streams)


def _next(stream: AsyncGenerator[Passed, None]) -> asyncio.Future[Passed]:
    return asyncio.ensure_future(anext(stream))


async def _collected(streams: Streams) -> list[str]:
    texts = [""] * len(streams)
    async for index, event in _side_by_side(streams):
        if isinstance(event, TextDelta):
            texts[index] += event.text
    return texts


async def _close(streams: Streams) -> None:
    for stream in streams:
        # A stream may still be running for a task that was cancelled.
        with suppress(RuntimeError):
            await stream.aclose()


def _reseeded(sampling: Sampling, number: int) -> Sampling:
    """The sampling of one more text of a prompt, which has the next seed."""
    if sampling.seed is None:
        return sampling
    return replace(sampling, seed=(sampling.seed + number + _SEEDS) % (2 * _SEEDS) - _SEEDS)
