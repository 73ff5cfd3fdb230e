"""Chat clients that ask one question after the other, each waiting for its answer."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from openai import APIError, APIStatusError, AsyncOpenAI

from sidelight.bench.load.tickets import Ticket

_HEADER = "x-sidelight-verdicts"
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Answer:
    """What one client got.

    Attributes:
        ticket: What it asked.
        id: Of the completion; None where there is none.
        seconds: Until the answer was complete.
        verdicts: Every verdict of the answer's own lane, in order.
        in_header: Those of the header.
        ending: The reason for the end, or the error's code.
    """

    ticket: Ticket
    id: str | None
    seconds: float
    verdicts: tuple[dict[str, Any], ...]
    in_header: tuple[dict[str, Any], ...]
    ending: str


@dataclass(frozen=True)
class Asking:
    """How the clients ask.

    Attributes:
        url: Of the server.
        model: As it names itself.
        max_tokens: Of an answer.
        blocked_tokens: Of the answer to a ticket that a policy would block.
    """

    url: str
    model: str
    max_tokens: int
    blocked_tokens: int


async def ask_for(
    asking: Asking, queue: Iterator[Ticket], *, clients: int, seconds: float
) -> list[Answer]:
    """So many clients ask until the time is over; answers in progress are waited for.

    Every other ticket is asked as a stream.
    """
    deadline = perf_counter() + seconds
    async with AsyncOpenAI(
        base_url=f"{asking.url}/v1", api_key="unused", max_retries=0, timeout=_TIMEOUT_S
    ) as openai:

        async def work() -> list[Answer]:
            found: list[Answer] = []
            while perf_counter() < deadline:
                found.append(await _ask(openai, asking, next(queue)))
            return found

        answers = await asyncio.gather(*(work() for _ in range(clients)))
    return [answer for own in answers for answer in own]


async def _ask(openai: AsyncOpenAI, asking: Asking, ticket: Ticket) -> Answer:
    start = perf_counter()
    write = _streamed if ticket.number // 2 % 2 else _plain
    try:
        id, verdicts, header, ending = await write(openai, asking, ticket)
    except APIStatusError as error:
        return Answer(ticket, None, perf_counter() - start, (), (), str(error.code))
    except APIError as error:
        return Answer(ticket, None, perf_counter() - start, (), (), type(error).__name__)
    return Answer(ticket, id, perf_counter() - start, tuple(verdicts), header, ending)


_Got = tuple[str, list[dict[str, Any]], tuple[dict[str, Any], ...], str]


def _question(asking: Asking, ticket: Ticket) -> dict[str, Any]:
    tokens = asking.blocked_tokens if ticket.is_abuse else asking.max_tokens
    messages = [{"role": "user", "content": ticket.text}]
    return {"model": asking.model, "messages": messages, "max_tokens": tokens, "temperature": 0}


async def _plain(openai: AsyncOpenAI, asking: Asking, ticket: Ticket) -> _Got:
    create = openai.chat.completions.with_raw_response.create
    raw = await create(**_question(asking, ticket))
    answer = raw.parse()
    own = (answer.model_extra or {})["sidelight"]["verdicts"]
    return answer.id, own, _header(raw.headers[_HEADER]), str(answer.choices[0].finish_reason)


async def _streamed(openai: AsyncOpenAI, asking: Asking, ticket: Ticket) -> _Got:
    create = openai.chat.completions.with_raw_response.create
    raw = await create(**_question(asking, ticket), stream=True)
    verdicts: list[dict[str, Any]] = []
    id = ending = ""
    async for chunk in raw.parse():
        id = chunk.id
        for choice in chunk.choices:
            extension = (choice.delta.model_extra or {}).get("sidelight") or {}
            verdicts += extension.get("verdicts", [])
            ending = choice.finish_reason or ending
    return id, verdicts, _header(raw.headers[_HEADER]), ending


def _header(text: str) -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(text))


def endings(answers: Sequence[Answer]) -> dict[str, int]:
    """How often each ending came."""
    kinds = sorted({answer.ending for answer in answers})
    return {kind: sum(answer.ending == kind for answer in answers) for kind in kinds}
