"""Prompts whose verdicts are known beforehand, since each carries what decides them.

Chat clients that ask one question after the other, each waiting for its answer.

Trains the probes of a load test and writes the policy that blocks by them.

Whether every client got its own verdicts, each once. Knows what each ticket has to give.
"""

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from openai import APIError, APIStatusError, AsyncOpenAI

from sidelight.artifact import save_probe
from sidelight.backbone import TransformersBackbone
from sidelight.data.examples import Example, Examples
from sidelight.errors import SidelightError
from sidelight.mechanisms.base import mechanism_spec
from sidelight.prompts import Message, Reads
from sidelight.training.classifier import load
from sidelight.training.fit import fit
from sidelight.training.settings import FitOptions
from sidelight.types import Task

# A word that names the ticket: a verdict that went to another request most likely names another.
WORDS = (
    "amber", "basalt", "cedar", "dune", "ember", "fjord", "glacier", "harbor",
    "iris", "juniper", "kelp", "lagoon", "maple", "nectar", "onyx", "pebble",
)  # fmt: skip
_HARMLESS = (
    "the parcel came today, thank you.",
    "please add one more chair to the order.",
    "which colours does the lamp come in?",
    "I will pick it up on Friday.",
)
_HARMFUL = (
    "you are all useless idiots and thieves.",
    "I hate you, you stupid liars.",
)
# One of so many tickets is blocked.
_BLOCKED_EVERY = 8

WORD = Task("multiclass", WORDS)
ABUSE = Task("binary", ("fine", "abuse"))


@dataclass(frozen=True)
class Ticket:
    """One prompt.

    Attributes:
        number: Its nonce; no two tickets of a run share it.
        word: The label that the probe `word` has to give.
        is_abuse: Whether the probe `abuse` has to flag it.
    """

    number: int
    word: str
    is_abuse: bool

    @property
    def text(self) -> str:
        """What is sent."""
        sentences = _HARMFUL if self.is_abuse else _HARMLESS
        round_of_words = self.number // len(WORDS)
        return f"Ticket {self.word} {self.number}: {sentences[round_of_words % len(sentences)]}"


def tickets(first: int = 100_000) -> Iterator[Ticket]:
    """Tickets without end, numbered from ``first``."""
    for number in count(first):
        # 7 and 16 share no factor, so that neighbours differ and every word comes in turn; abuse
        # comes with other words in each turn.
        is_abuse = (number + number // len(WORDS)) % _BLOCKED_EVERY == 0
        yield Ticket(number, WORDS[number * 7 % len(WORDS)], is_abuse)


def word_examples(some: Sequence[Ticket]) -> Examples:
    """For the probe that names a ticket's word."""
    return _examples(some, WORD, [WORDS.index(ticket.word) for ticket in some])


def abuse_examples(some: Sequence[Ticket]) -> Examples:
    """For the probe that flags abuse."""
    return _examples(some, ABUSE, [int(ticket.is_abuse) for ticket in some])


def reply_examples(some: Sequence[Ticket]) -> Examples:
    """The same sentences as answers, for a probe that reads the response."""
    items = [
        Example((Message("user", f"Write to number {ticket.number}."),), ticket.text)
        for ticket in some
    ]
    return _of(items, ABUSE, [int(ticket.is_abuse) for ticket in some])


def _examples(some: Sequence[Ticket], task: Task, labels: Sequence[int]) -> Examples:
    return _of([Example((Message("user", ticket.text),)) for ticket in some], task, labels)


def _of(items: Sequence[Example], task: Task, labels: Sequence[int]) -> Examples:
    return Examples(tuple(items), task, np.array(labels, dtype=np.int64), ({},) * len(items))


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


PROMPT_PROBES = ("word", "abuse")
RESPONSE_PROBES = ("reply",)
# The rule on the output is worked out after every token, but holds for none: answers keep their
# length.
_POLICY = """[input.abuse]
mode = "block"

[output.reply]
mode = "block"
threshold = 1.0
"""
# Enough for words as plain as these; more would only take longer.
_TRAINING_TICKETS = {"word": 320, "abuse": 96, "reply": 96}
_CHECKED_TICKETS = 64


@dataclass(frozen=True)
class Prepared:
    """What a server is started with.

    Attributes:
        probes: Their folders.
        policy: File of the policies.
    """

    probes: tuple[Path, ...]
    policy: Path


def prepare(backbone: TransformersBackbone, directory: Path) -> Prepared:
    """Trains `word`, `abuse` and `reply`, on tickets that are not asked later.

    Args:
        backbone: The served LLM.
        directory: Where probes, policy and activations go.
    """
    # Half of them are abuse, with every word, so that few tickets are enough.
    plain = islice(tickets(first=500_000), max(_TRAINING_TICKETS.values()))
    some = [Ticket(one.number, one.word, one.number // len(WORDS) % 2 == 0) for one in plain]
    makers: dict[str, Callable[[list[Ticket]], Examples]] = {
        "word": word_examples,
        "abuse": abuse_examples,
        "reply": reply_examples,
    }
    folders = [
        _train(backbone, name, make(some[: _TRAINING_TICKETS[name]]), directory=directory)
        for name, make in makers.items()
    ]
    _require_known(backbone, folders)
    policy = directory / "policy.toml"
    policy.write_text(_POLICY, "utf-8")
    return Prepared(tuple(folders), policy)


def _require_known(backbone: TransformersBackbone, folders: Sequence[Path]) -> None:
    """Checks that the probes of the prompt are right on tickets that they have not seen."""
    some = list(islice(tickets(first=900_000), _CHECKED_TICKETS))
    for folder, make in zip(folders, (word_examples, abuse_examples), strict=False):
        report = load(folder, model=backbone).evaluate(make(some))
        if report.metrics["accuracy"].value != 1:
            raise SidelightError(
                f"The probe '{folder.name}' is not always right on this model "
                f"(accuracy {report.metrics['accuracy'].value}), so nothing is known beforehand. "
                "Test another model."
            )


def _train(
    backbone: TransformersBackbone, name: str, examples: Examples, *, directory: Path
) -> Path:
    options = FitOptions(
        mechanisms=(mechanism_spec("readout", {"extremes": "pair"}),),
        reads=Reads("response" if name in RESPONSE_PROBES else "prompt"),
        cache_root=directory / "activations",
    )
    made = fit(backbone, examples, None, name=name, options=options)
    return save_probe(made.best.probe, directory / name)


_PROBES = (*PROMPT_PROBES, *RESPONSE_PROBES)
_BLOCKED = "content_filter"


def faults(answers: Sequence[Answer]) -> Mapping[str, int]:
    """How many answers have each fault; a sound run has none.

    Args:
        answers: Of the server with probes and blocking policies.
    """
    written = [answer for answer in answers if answer.id is not None]
    return {
        "failed requests": sum(_is_failed(answer) for answer in answers),
        "lost verdicts": sum(_count(answer, 0) for answer in written),
        "duplicated verdicts": sum(_count(answer, 2) for answer in written),
        "answers that share an id": len(written) - len({answer.id for answer in written}),
        "verdicts of another request": sum(_is_swapped(answer) for answer in written),
        "header unlike the answer": sum(_is_contradicted(answer) for answer in written),
        "abuse that was answered": sum(answer.ticket.is_abuse for answer in written),
        "others that were blocked": sum(
            answer.ending == _BLOCKED and not answer.ticket.is_abuse
            for answer in answers
            if answer.id is None
        ),
    }


def _is_failed(answer: Answer) -> bool:
    return answer.id is None and answer.ending != _BLOCKED


def _count(answer: Answer, times: int) -> int:
    """How many probes have no verdict (0), or two or more (2)."""
    names = [verdict["probe"] for verdict in answer.verdicts if "error" not in verdict]
    counts = [names.count(probe) for probe in _PROBES]
    return sum(count == 0 if times == 0 else count >= times for count in counts)


def _is_swapped(answer: Answer) -> bool:
    said = [v for v in (*answer.verdicts, *answer.in_header) if v["probe"] == "word"]
    return any(verdict.get("label", answer.ticket.word) != answer.ticket.word for verdict in said)


def _is_contradicted(answer: Answer) -> bool:
    own = {verdict["probe"]: verdict.get("label") for verdict in answer.verdicts}
    return any(own.get(v["probe"]) != v.get("label") for v in answer.in_header)
