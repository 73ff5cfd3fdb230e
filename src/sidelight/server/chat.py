"""``POST /v1/chat/completions`` and ``/v1/completions``: text and verdicts from one forward pass.

The texts of a request are written side by side; all its prompts are judged before the first text
is sent. The answer has OpenAI's formats: one JSON object, or server-sent events.
"""

import asyncio
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any, ClassVar

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response, StreamingResponse
from openai.types import Completion
from openai.types.chat import ChatCompletion
from starlette.types import Receive, Scope, Send

from sidelight.engines.base import FinishReason, Sampling, TextDelta
from sidelight.errors import SidelightError
from sidelight.policy.enforcement import Admitted, Passed, Running
from sidelight.policy.hold_back import Ended
from sidelight.policy.request import Json, Outcome
from sidelight.prompts import Conversation
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

# What is sent of one choice: text, perhaps with running scores, then its end.
Sent = TextDelta | Running | Ended
# What is sent of each choice; choices of one prompt are neighbours.
Streams = Sequence[AsyncGenerator[Passed, None]]
# A seed is a signed number of 64 bits; the first follows the last.
_SEEDS = 2**63
# Most prompts of one request in the engine's queue at once, so that others find room there.
_WAITING = 16


class CompletionFormat(ABC):
    """Formats one answer; the endpoints differ in where they put a text.

    Args:
        outcome: What comes of the request.
        includes_usage: Whether a stream ends with a usage chunk.

    Attributes:
        prefix: How the answer's id begins.
        whole: ``object`` of a plain answer.
        piece: ``object`` of a chunk.
        opening: Fields of a choice's first chunk besides its verdicts.
    """

    prefix: str
    whole: str
    piece: str
    opening: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, outcome: Outcome, *, includes_usage: bool):
        self._outcome, self._terms = outcome, outcome.terms
        self._includes_usage = includes_usage
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    @abstractmethod
    def _message(self, text: str) -> Json:
        """The text of a plain answer's choice."""

    @abstractmethod
    def _delta(self, text: str | None, extra: Mapping[str, Any], end: Json) -> Json:
        """The text of a chunk's choice, None at its end; ``extra`` goes where clients keep it."""

    def completion(self, texts: Sequence[str]) -> Json:
        """The body of a plain answer, once all texts have ended."""
        choices = [
            {
                "index": index,
                **self._message(text),
                "logprobs": None,
                "finish_reason": choice.ended and choice.ended.reason,
            }
            for index, (text, choice) in enumerate(zip(texts, self._outcome.choices, strict=True))
        ]
        return {
            **self._fields(self.whole),
            "choices": choices,
            "usage": self._usage(),
            **self._verdicts(),
        }

    async def chunks(self, events: AsyncGenerator[tuple[int, Sent], None]) -> AsyncGenerator[str]:
        """Verdicts, moderation, text, the reasons for the end, usage, ``[DONE]``.

        A failure midway is the last event; no ``[DONE]`` follows, so that nobody takes the text
        for complete.

        Args:
            events: With the index of their choice; each prompt has been admitted.
        """
        terms, admitted = self._terms, [choice.admitted for choice in self._outcome.choices]
        openings = [terms.extension(each.decisions)["verdicts"] for each in admitted if each]
        async with aclosing(events):
            try:
                for index, verdicts in enumerate(openings):
                    extra = {**self.opening, **_numbered(verdicts)}
                    yield self._chunk([self._piece(index, "", extra=extra)])
                if terms.chosen:
                    yield self._chunk([], **self._verdicts())
                async for index, event in events:
                    match event:
                        case TextDelta(text):
                            yield self._chunk([self._piece(index, text)])
                        case Running():
                            yield self._chunk([], sidelight=self._running(index, event))
                        case Ended(reason):
                            late = terms.extension(event.decisions)["verdicts"]
                            first = len(openings[index])
                            extra = _numbered(late, first=first) if terms.reads_response else {}
                            yield self._chunk([self._piece(index, None, extra, reason)])
                if terms.reads_response:
                    yield self._chunk([], **self._verdicts())
                if self._includes_usage:
                    yield self._chunk([], usage=self._usage())
                yield "data: [DONE]\n\n"
            except SidelightError as error:
                yield _sse(as_request_error(error).body)

    def _piece(
        self,
        index: int,
        text: str | None,
        extra: Mapping[str, Any] | None = None,
        reason: FinishReason | None = None,
    ) -> Json:
        end = {"logprobs": None, "finish_reason": reason}
        return {"index": index, **self._delta(text, extra or {}, end)}

    def _verdicts(self) -> Json:
        return {
            "moderation": self._outcome.moderation(),
            "sidelight": self._outcome.extension(),
        }

    def _running(self, index: int, running: Running) -> Json:
        """The ``sidelight`` field while text ``index`` is written: verdicts with scores alone.

        A label would tell ordinary keys more of what blocks them than the cut does.
        """
        entries = self._terms.extension(running.decisions)["verdicts"]
        verdicts = [entry for entry in entries if "probabilities" in entry]
        return {"running": {"index": index, "tokens": running.tokens, "verdicts": verdicts}}

    def _usage(self) -> dict[str, int]:
        """Tokens read and written; a prompt counts once, however many texts follow it."""
        ends = [choice.ended for choice in self._outcome.choices]
        prompt = sum(admitted.tokens for admitted in self._outcome.prompts)
        written = sum(end.completion_tokens for end in ends if end)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
        }

    def _chunk(self, choices: list[Json], **extra: Any) -> str:
        # With include_usage every chunk has the field, null until the last (OpenAI's API).
        blank = {"usage": None} if self._includes_usage else {}
        return _sse({**self._fields(self.piece), "choices": choices, **blank, **extra})

    def _fields(self, kind: str) -> Json:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._terms.model,
        }


class ChatCompletionFormat(CompletionFormat):
    """``/v1/chat/completions``."""

    prefix = "chatcmpl"
    whole = "chat.completion"
    piece = "chat.completion.chunk"
    opening: ClassVar[Mapping[str, Any]] = {"role": "assistant"}

    def _message(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text}}

    def _delta(self, text: str | None, extra: Mapping[str, Any], end: Json) -> Json:
        content = {} if text is None else {"content": text}
        return {"delta": {**content, **extra}, **end}


class TextFormat(CompletionFormat):
    """``/v1/completions``."""

    prefix = "cmpl"
    whole = "text_completion"
    piece = "text_completion"

    def _message(self, text: str) -> Json:
        return {"text": text}

    def _delta(self, text: str | None, extra: Mapping[str, Any], end: Json) -> Json:
        return {"text": text or "", **end, **extra}


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


@router.post(
    "/v1/chat/completions",
    name="create",
    response_class=Response,
    responses={200: {"model": ChatAnswer, "content": EVENTS}},
)
async def complete_chat(body: ChatRequest, request: ServerRequest) -> Response:
    """The text, plain or streamed; either begins once the prompt has been judged."""
    return await _answer(body, request, [body.conversation()], ChatCompletionFormat)


@router.post(
    "/v1/completions",
    name="create",
    response_class=Response,
    responses={200: {"model": CompletionAnswer, "content": EVENTS}},
)
async def complete_text(body: CompletionRequest, request: ServerRequest) -> Response:
    """The texts, plain or streamed; prompts get no chat template."""
    return await _answer(body, request, body.texts(), TextFormat)


async def _answer(
    body: WritingRequest,
    request: ServerRequest,
    prompts: Sequence[Conversation],
    format_class: type[CompletionFormat],
) -> Response:
    request.require_model(body.model)
    sampling, n, options = body.sampling(), body.n or 1, body.stream_options or StreamOptions()
    terms = await request.begin(prompts, n=n, max_tokens=sampling.max_tokens)
    # Nothing is awaited until the engine has all texts, so that it judges with these very probes.
    outcome = Outcome(terms.choose(body.probes, for_text=True))
    answer = format_class(outcome, includes_usage=options.include_usage)
    tells_scores = bool(body.stream and options.include_scores)
    streams: list[AsyncGenerator[Passed, None]] = []
    for prompt in prompts:
        for number, text in enumerate(outcome.begin(n, tells_scores=tells_scores)):
            events = request.engine.generate(
                prompt, _reseeded(sampling, number), watch=text.watch, admits=text.admits
            )
            streams.append(text.guard(prompt, events))
    await unless_left(request, _admitted(streams))
    if body.stream:
        headers = outcome.headers(is_stream=True)
        return EventStream(answer.chunks(_side_by_side(streams)), headers)
    texts = await unless_left(request, _collected(streams))
    return JSONResponse(answer.completion(texts), headers=outcome.headers(is_stream=False))


async def _admitted(streams: Streams) -> None:
    """Waits until the prompt of each choice has been judged; one that is blocked refuses all."""
    places = asyncio.Semaphore(_WAITING)

    async def first(stream: AsyncGenerator[Passed, None]) -> None:
        async with places:
            await anext(stream)

    waiting = [asyncio.ensure_future(first(stream)) for stream in streams]
    try:
        for each in waiting:
            await each
    except BaseException:
        for each in waiting:
            each.cancel()
        # Other failures no longer matter, but asyncio would log them if nobody fetched them.
        await asyncio.gather(*waiting, return_exceptions=True)
        await _close(streams)
        raise


async def _side_by_side(streams: Streams) -> AsyncGenerator[tuple[int, Sent], None]:
    """The events of all admitted choices, one of each in turn."""
    alive = dict(enumerate(streams))
    try:
        while alive:
            for index, stream in list(alive.items()):
                try:
                    event = await anext(stream)
                except StopAsyncIteration:
                    del alive[index]
                else:
                    assert not isinstance(event, Admitted)
                    yield index, event
    finally:
        await _close(streams)


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
