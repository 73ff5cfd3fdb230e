"""``POST /v1/chat/completions`` and ``/v1/completions``: text and verdicts from one forward pass.

The texts of a request are written side by side; all its prompts are judged before the first text
is sent.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from openai.types import Completion
from openai.types.chat import ChatCompletion

from sidelight.engines.base import Sampling
from sidelight.policy.enforcement import Admitted, Enforcement, Passed, require_trusted_turns
from sidelight.policy.overrides import tightened
from sidelight.prompts import Conversation
from sidelight.server.formats import (
    ChatFormat,
    CompletionFormat,
    EventStream,
    Sent,
    TextFormat,
    decisions_of,
    ends_of,
)
from sidelight.server.report import Extension
from sidelight.server.requests import Route, ServerRequest, unless_left
from sidelight.server.schemas import (
    EVENTS,
    ChatRequest,
    CompletionRequest,
    WritingRequest,
)

# What is sent of each choice; choices of one prompt are neighbours.
Streams = Sequence[AsyncGenerator[Passed, None]]
# A seed is a signed number of 64 bits; the first follows the last.
_SEEDS = 2**63
# Most prompts of one request in the engine's queue at once, so that others find room there.
_WAITING = 16

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
    return await _answer(body, request, [body.conversation()], ChatFormat)


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
    rules = tightened(request.registry.rules, chosen, body.overrides())
    # Probes that may block the answer are reported too.
    report = request.report([*chosen, *(bound.name for bound in rules if bound.is_blocking)])
    answer = format_class(
        report,
        has_logprobs=sampling.logprobs is not None,
        includes_usage=body.stream_options is not None and body.stream_options.include_usage,
    )
    observer, timeout_s = request.observer, request.registry.policy.timeout_s
    observer.trace.model = request.engine.model
    streams: list[AsyncGenerator[Passed, None]] = []
    for prompt in prompts:
        for number in range(n):
            # The decisions on a prompt are recorded with the first of its texts.
            observe = partial(observer.text, prompt, is_prompt_known=number > 0)
            enforcement = Enforcement(rules, observe, timeout_s=timeout_s)
            events = request.engine.generate(
                prompt,
                _reseeded(sampling, number),
                watch=enforcement.watch,
                admits=enforcement.admits,
            )
            streams.append(enforcement.guard(events))
    admitted = (await unless_left(request, _admitted(streams)))[::n]
    decisions = decisions_of(admitted)
    if body.stream:
        chunks = answer.chunks(admitted, _side_by_side(streams), per_prompt=n)
        return EventStream(chunks, report.headers(decisions))
    texts = await unless_left(request, _collected(streams))
    decisions += decisions_of(ends_of(texts))
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
