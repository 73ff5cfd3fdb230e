"""The texts of one request: each is written for itself, all are judged before the first is sent."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from fastapi import Request

from sidelight.engines.base import (
    Event,
    Finished,
    PromptJudged,
    ResponseScored,
    Sampling,
    TextDelta,
)
from sidelight.engines.logprobs import TokenLogprobs
from sidelight.prompts import Conversation
from sidelight.server.context import Context, RequestContext
from sidelight.server.middleware import unless_left

Events = AsyncGenerator[Event, None]
# A seed is a signed number of 64 bits; the next ones of the last begin anew.
_SEEDS = 2**63
# Of one request, at once: many texts must fit into an engine's line, and leave room for others'.
_WAITING = 16


@dataclass(frozen=True)
class Indexed:
    """An event of one choice."""

    index: int
    event: Event


@dataclass(frozen=True)
class Written:
    """A complete text and how it ended.

    Attributes:
        text: What was sent of it.
        finished: How it ended.
        logprobs: Of its tokens, where they were asked for.
    """

    text: str
    finished: Finished
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class Choices:
    """Texts that are being written.

    Attributes:
        judged: What was said of each prompt, in their order.
        streams: What follows, of each choice; those of a prompt are neighbours.
    """

    judged: tuple[PromptJudged, ...]
    streams: tuple[Events, ...]

    async def events(self) -> AsyncGenerator[Indexed, None]:
        """The events of all choices, one of each in turn: they are written side by side."""
        alive = dict(enumerate(self.streams))
        try:
            while alive:
                for index, stream in list(alive.items()):
                    try:
                        yield Indexed(index, await anext(stream))
                    except StopAsyncIteration:
                        del alive[index]
        finally:
            await _close(self.streams)

    async def collect(self) -> list[Written]:
        """Waits for all texts."""
        deltas: list[list[TextDelta]] = [[] for _ in self.streams]
        ends: dict[int, Finished] = {}
        async for indexed in self.events():
            match indexed.event:
                case TextDelta() as delta:
                    deltas[indexed.index].append(delta)
                case Finished() as finished:
                    ends[indexed.index] = finished
                case PromptJudged() | ResponseScored():
                    pass
        return [_written(own, ends[index]) for index, own in enumerate(deltas)]


async def begin(
    request: Request,
    context: Context,
    asked: RequestContext,
    prompts: Sequence[Conversation],
    sampling: Sampling,
    *,
    n: int,
) -> Choices:
    """Starts ``n`` texts for each prompt, and waits until all prompts have been judged.

    Args:
        request: Its client may leave.
        context: The server.
        asked: Made in the same turn of the event loop.
        prompts: What to go on with.
        sampling: How; each further text of a prompt has the next seed.
        n: Texts per prompt. Only the first is recorded as a judgement of the prompt.

    Raises:
        RequestError: A prompt is blocked, and so the request.
    """
    streams: list[Events] = []
    for prompt in prompts:
        for number in range(n):
            rules = asked if number == 0 else asked.for_another_text()
            streams.append(context.generate(prompt, _reseeded(sampling, number), rules))
    judged = await unless_left(request, _first(streams))
    return Choices(tuple(judged[::n]), tuple(streams))


async def _first(streams: Sequence[Events]) -> list[PromptJudged]:
    places = asyncio.Semaphore(_WAITING)
    waiting = [asyncio.ensure_future(_judged(stream, places)) for stream in streams]
    try:
        return [await each for each in waiting]
    except BaseException:
        for each in waiting:
            each.cancel()
        # What else failed is of no interest, but has to be fetched: asyncio would log it.
        await asyncio.gather(*waiting, return_exceptions=True)
        await _close(streams)
        raise


async def _judged(stream: Events, places: asyncio.Semaphore) -> PromptJudged:
    async with places:
        event = await anext(stream)
    assert isinstance(event, PromptJudged)
    return event


async def _close(streams: Sequence[Events]) -> None:
    for stream in streams:
        # It may be told to end while it is still at work for a task that was cancelled.
        with suppress(RuntimeError):
            await stream.aclose()


def _written(deltas: Sequence[TextDelta], finished: Finished) -> Written:
    text = "".join(delta.text for delta in deltas)
    return Written(
        text, finished, tuple(token for e in (*deltas, finished) for token in e.logprobs)
    )


def _reseeded(sampling: Sampling, number: int) -> Sampling:
    if sampling.seed is None:
        return sampling
    return replace(sampling, seed=(sampling.seed + number + _SEEDS) % (2 * _SEEDS) - _SEEDS)
