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
from functools import partial
from typing import Any, ClassVar

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response, StreamingResponse
from openai.types import Completion
from openai.types.chat import ChatCompletion
from starlette.types import Receive, Scope, Send

from sidelight.engines.base import FinishReason, Sampling, TextDelta
from sidelight.errors import SidelightError
from sidelight.policy.decisions import Decision
from sidelight.policy.enforcement import (
    Admitted,
    Enforcement,
    Passed,
    Running,
    require_trusted_turns,
)
from sidelight.policy.hold_back import Ended
from sidelight.prompts import Conversation
from sidelight.server.errors import as_request_error
from sidelight.server.report import Extension, Report
from sidelight.server.requests import Route, ServerRequest, unless_left
from sidelight.server.schemas import EVENTS, ChatRequest, CompletionRequest, WritingRequest

Json = dict[str, Any]

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
        report: On the chosen probes.
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

    def __init__(self, report: Report, *, includes_usage: bool):
        self._report = report
        self._includes_usage = includes_usage
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    @abstractmethod
    def _message(self, text: str) -> Json:
        """The text of a plain answer's choice."""

    @abstractmethod
    def _delta(self, text: str | None, extra: Mapping[str, Any], end: Json) -> Json:
        """The text of a chunk's choice, None at its end; ``extra`` goes where clients keep it."""

    def completion(self, prompts: Sequence[Admitted], texts: Sequence[Sequence[Sent]]) -> Json:
        """The body of a plain answer."""
        ends, report = _ends(texts), self._report
        prompt, response = _decisions(prompts), _decisions(ends)
        choices: list[Json] = []
        for index, (parts, end) in enumerate(zip(texts, ends, strict=True)):
            text = "".join(part.text for part in parts if isinstance(part, TextDelta))
            choices.append(
                {
                    "index": index,
                    **self._message(text),
                    "logprobs": None,
                    "finish_reason": end.reason,
                }
            )
        return {
            **self._fields(self.whole),
            "choices": choices,
            "usage": _usage(prompts, ends),
            "moderation": report.moderation(prompt, response) if report.probes else None,
            "sidelight": report.extension([*prompt, *response]),
        }

    async def chunks(
        self,
        prompts: Sequence[Admitted],
        events: AsyncGenerator[tuple[int, Sent], None],
        *,
        per_prompt: int,
    ) -> AsyncGenerator[str, None]:
        """Verdicts, moderation, text, the reasons for the end, usage, ``[DONE]``.

        A failure midway is the last event; no ``[DONE]`` follows, so that nobody takes the text
        for complete.

        Args:
            prompts: The prompts, all judged.
            events: With the index of their choice; choices of one prompt are neighbours.
            per_prompt: How many choices each prompt has.
        """
        report = self._report
        openings = [report.extension(p.decisions) for p in prompts for _ in range(per_prompt)]
        ends: dict[int, Ended] = {}
        async with aclosing(events):
            try:
                for index, verdicts in enumerate(openings):
                    extra = {**self.opening, "sidelight": _numbered(verdicts)}
                    yield self._chunk([self._piece(index, "", extra=extra)])
                if report.probes:
                    yield self._moderation(prompts, None)
                async for index, event in events:
                    match event:
                        case TextDelta(text):
                            yield self._chunk([self._piece(index, text)])
                        case Running():
                            yield self._chunk([], sidelight=report.running(index, event))
                        case Ended():
                            ends[index] = event
                            yield self._chunk([self._last_piece(index, event, openings[index])])
                in_order = [ends[index] for index in sorted(ends)]
                if report.reads_response:
                    yield self._moderation(prompts, in_order)
                if self._includes_usage:
                    yield self._chunk([], usage=_usage(prompts, in_order))
                yield "data: [DONE]\n\n"
            except SidelightError as error:
                yield _sse(as_request_error(error).body)

    def _piece(
        self,
        index: int,
        text: str | None,
        *,
        extra: Mapping[str, Any] | None = None,
        reason: FinishReason | None = None,
    ) -> Json:
        end = {"logprobs": None, "finish_reason": reason}
        return {"index": index, **self._delta(text, extra or {}, end)}

    def _last_piece(self, index: int, end: Ended, opening: Json) -> Json:
        extra: Json = {}
        if self._report.reads_response:
            verdicts = self._report.extension(end.decisions)
            extra = {"sidelight": _numbered(verdicts, first=len(opening["verdicts"]))}
        return self._piece(index, None, extra=extra, reason=end.reason)

    def _moderation(self, prompts: Sequence[Admitted], ends: Sequence[Ended] | None) -> str:
        prompt, response = _decisions(prompts), None if ends is None else _decisions(ends)
        moderation = self._report.moderation(prompt, response)
        extension = self._report.extension([*prompt, *(response or ())])
        return self._chunk([], moderation=moderation, sidelight=extension)

    def _chunk(self, choices: list[Json], **extra: Any) -> str:
        # With include_usage every chunk has the field, null until the last (OpenAI's API).
        blank = {"usage": None} if self._includes_usage else {}
        return _sse({**self._fields(self.piece), "choices": choices, **blank, **extra})

    def _fields(self, kind: str) -> Json:
        model = self._report.model
        return {"id": self._id, "object": kind, "created": self._created, "model": model}


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


def _ends(texts: Sequence[Sequence[Sent]]) -> list[Ended]:
    return [part for text in texts for part in text if isinstance(part, Ended)]


def _decisions(parts: Sequence[Admitted] | Sequence[Ended]) -> list[Decision]:
    return [decision for part in parts for decision in part.decisions]


def _usage(prompts: Sequence[Admitted], ends: Sequence[Ended]) -> dict[str, int]:
    """Tokens read and written; a prompt counts once, however many texts follow it."""
    prompt = sum(judged.tokens for judged in prompts)
    written = sum(end.completion_tokens for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
    }


def _numbered(extension: Mapping[str, Any], *, first: int = 0) -> Json:
    """The verdicts of a delta with an ``index``, by which OpenAI's stream helper merges them.

    Without one it raises as soon as a second delta has verdicts.
    """
    verdicts = enumerate(extension["verdicts"], start=first)
    return {**extension, "verdicts": [{"index": index, **verdict} for index, verdict in verdicts]}


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
    require_trusted_turns(request.registry.policy, prompts)
    sampling, n = body.sampling(), body.n or 1
    await request.require_size(prompts, n=n, max_tokens=sampling.max_tokens)
    await unless_left(request, request.engine.settled())
    # Nothing is awaited until the engine has all texts, so that it judges with these very probes.
    chosen = [probe.name for probe in request.report(body.probes).probes]
    rules = request.registry.rules
    # Probes that may block the answer are reported too.
    report = request.report([*chosen, *(bound.name for bound in rules if bound.is_blocking)])
    answer = format_class(
        report,
        includes_usage=body.stream_options is not None and body.stream_options.include_usage,
    )
    observer, timeout_s = request.observer, request.registry.policy.timeout_s
    tells_scores = bool(body.stream and body.stream_options and body.stream_options.include_scores)
    streams: list[AsyncGenerator[Passed, None]] = []
    for prompt in prompts:
        for number in range(n):
            # The decisions on a prompt are recorded with the first of its texts.
            observe = partial(observer.text, prompt, is_prompt_known=number > 0)
            enforcement = Enforcement(
                rules, observe, timeout_s=timeout_s, tells_scores=tells_scores
            )
            events = request.engine.generate(
                prompt,
                _reseeded(sampling, number),
                watch=enforcement.watch,
                admits=enforcement.admits,
            )
            streams.append(enforcement.guard(events))
    admitted = (await unless_left(request, _admitted(streams)))[::n]
    decisions = _decisions(admitted)
    if body.stream:
        chunks = answer.chunks(admitted, _side_by_side(streams), per_prompt=n)
        return EventStream(chunks, report.headers(decisions))
    texts = await unless_left(request, _collected(streams))
    decisions += _decisions(_ends(texts))
    return JSONResponse(answer.completion(admitted, texts), headers=report.headers(decisions))


async def _admitted(streams: Streams) -> list[Admitted]:
    """Waits until the prompt of each choice has been judged; one that is blocked refuses all."""
    places = asyncio.Semaphore(_WAITING)

    async def first(stream: AsyncGenerator[Passed, None]) -> Admitted:
        async with places:
            event = await anext(stream)
        assert isinstance(event, Admitted)
        return event

    waiting = [asyncio.ensure_future(first(stream)) for stream in streams]
    try:
        return [await each for each in waiting]
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


async def _collected(streams: Streams) -> list[list[Sent]]:
    texts: list[list[Sent]] = [[] for _ in streams]
    async for index, event in _side_by_side(streams):
        texts[index].append(event)
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
