"""Many chat clients at once: does each get its own verdicts, and how long do they wait?

The right verdicts on each prompt (a ticket) are known beforehand. A server with probes and policies
and one without are asked in turn, by the same number of clients of the openai package.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from openai import APIError, APIStatusError, AsyncOpenAI

from sidelight.artifact import save_probe
from sidelight.backbone import TransformersBackbone, load_backbone
from sidelight.data.examples import Example, LabelledExamples
from sidelight.data.spans import SpanExamples, span_text
from sidelight.errors import SidelightError
from sidelight.mechanisms.base import mechanism_spec
from sidelight.progress import progress
from sidelight.prompts import Message, Reads
from sidelight.training.classifier import load
from sidelight.training.fit import fit
from sidelight.training.settings import FitOptions, suggested_settings
from sidelight.types import Span, Task
from sidelight_lab.bench.measurement import (
    Range,
    Record,
    conditions,
    cpu_seconds,
    read_metrics,
    table,
    total,
)
from sidelight_lab.bench.server_process import ServerProcess

# The word of a ticket: a verdict of another request most likely names another word.
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
# One of this many tickets is blocked.
_BLOCKED_EVERY = 8

_ABUSE = Task("binary", ("fine", "abuse"))
# `word` and `abuse` read the prompt, `reply` reads the response.
PROBES = {"word": Task("multiclass", WORDS), "abuse": _ABUSE, "reply": _ABUSE}
# Enough for such plain words; more would only take longer.
_EXTREMES = {"extremes": "pair"}
_TRAINING_TICKETS = {"word": 320, "abuse": 96, "reply": 96}
_CHECKED_TICKETS = 64
# The rule on the output is checked after every token but never fires, so answers keep their length.
_POLICY = """[input.abuse]
mode = "block"

[output.reply]
mode = "block"
threshold = 1.0
"""
_WARM_UP_S = 5.0
_TIMEOUT_S = 600.0

Verdicts = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Ticket:
    """A prompt on which the probe `word` must give the word, and `abuse` must flag abuse."""

    number: int
    word: str
    is_abuse: bool

    @property
    def text(self) -> str:
        sentences = _HARMFUL if self.is_abuse else _HARMLESS
        round_of_words = self.number // len(WORDS)
        return f"Ticket {self.word} {self.number}: {sentences[round_of_words % len(sentences)]}"


def tickets(first: int = 100_000) -> Iterator[Ticket]:
    """Endless tickets, numbered from ``first``."""
    for number in count(first):
        # 7 and 16 share no factor, so every word comes in turn and neighbours differ; in each turn,
        # abuse comes with other words.
        is_abuse = (number + number // len(WORDS)) % _BLOCKED_EVERY == 0
        yield Ticket(number, WORDS[number * 7 % len(WORDS)], is_abuse)


def _prepare(
    backbone: TransformersBackbone, folder: Path, *, spans: bool
) -> tuple[list[Path], Path]:
    """Trains the probes on tickets that are not asked later; with ``spans``, those of abuse on its
    words.

    Returns their folders, and the file of a policy that blocks by them. Fails if a probe of the
    prompt is wrong about an unseen ticket.
    """
    # Half of them are abuse, with every word, so few tickets are enough.
    plain = islice(tickets(first=500_000), max(_TRAINING_TICKETS.values()))
    training = [Ticket(one.number, one.word, one.number // len(WORDS) % 2 == 0) for one in plain]
    checked = list(islice(tickets(first=900_000), _CHECKED_TICKETS))
    folders: list[Path] = []
    for name in PROBES:
        marks = spans and name != "word"
        spec = mechanism_spec("spans" if marks else "readout", None if marks else _EXTREMES)
        options = FitOptions(
            mechanisms=(spec,),
            settings={"readout": suggested_settings("readout").changed(normalise=False)},
            reads=Reads("response" if name == "reply" else "prompt"),
            cache_root=folder / "activations",
        )
        examples = examples_of(name, training[: _TRAINING_TICKETS[name]], spans=marks)
        made = fit(backbone, examples, None, name=name, options=options)
        folders.append(save_probe(made.best.probe, folder / name))
        if name != "reply":
            report = load(folders[-1], model=backbone).evaluate(examples_of(name, checked))
            accuracy = report.metrics["accuracy"].value
            if accuracy != 1:
                raise SidelightError(
                    f"Got a probe '{name}' of accuracy {accuracy} on this model, wanted one that "
                    "is always right, since its verdicts must be known beforehand. Choose another "
                    "--model."
                )
    policy = folder / "policy.toml"
    policy.write_text(_POLICY, "utf-8")
    return folders, policy


def examples_of(probe: str, some: Sequence[Ticket], *, spans: bool = False) -> LabelledExamples:
    """The tickets as prompts, or as responses for the probe `reply`, with the places of abuse."""
    if probe == "reply":
        asked = "Write to number {}."
        items = [Example((Message("user", asked.format(t.number)),), t.text) for t in some]
    else:
        items = [Example((Message("user", ticket.text),)) for ticket in some]
    labels = [
        WORDS.index(ticket.word) if probe == "word" else int(ticket.is_abuse) for ticket in some
    ]
    made = LabelledExamples(
        tuple(items), ({},) * len(items), task=PROBES[probe], labels=np.array(labels)
    )
    if not spans:
        return made
    texts = [span_text(item) for item in items]
    places = [
        (Span(text.index(":") + 2, len(text), _ABUSE.labels[1]),) if label else ()
        for text, label in zip(texts, labels, strict=True)
    ]
    return SpanExamples(**vars(made), spans=tuple(places))


@dataclass(frozen=True)
class Answer:
    """What one client got: verdicts of the body or stream, and of the header."""

    ticket: Ticket
    id: str | None  # None for an error
    seconds: float
    verdicts: Verdicts
    in_header: Verdicts
    ending: str  # the finish reason, or the error's code


@dataclass
class Server:
    """One of the two servers: its answers and CPU time by round."""

    process: ServerProcess
    round_s: float
    answers: list[list[Answer]] = field(default_factory=list[list[Answer]])
    cpu_s: list[float] = field(default_factory=list[float])

    @property
    def spent_s(self) -> float:
        """The CPU time of the server since it started."""
        return cpu_seconds(self.process.pid)

    def judged(self) -> int:
        """How many verdicts of the probe `word` the server has counted."""
        metrics = read_metrics(self.process.url)
        return int(total(metrics, "sidelight_verdicts_total", probe="word"))


def run_load(
    folder: Path,
    *,
    model: str,
    clients: int,
    seconds: float,
    round_s: float,
    plain_round_s: float,
    max_tokens: int,
    spans: bool = False,
) -> Record:
    """Trains the probes into the folder, starts both servers, and asks them in turn.

    Rounds with probes take ``seconds`` in total; each is paired with one without. ``is_sound`` in
    the results says that nothing was lost, duplicated, swapped, or let through.
    """
    backbone = load_backbone(model)
    rounds = max(1, round(seconds / round_s))
    probes, policy = _prepare(backbone, folder, spans=spans)
    where = conditions(
        backbone,
        {
            "clients": clients,
            "rounds": rounds,
            "round s": round_s,
            "without probes s": plain_round_s,
            "tokens of an answer": max_tokens,
            "probes": len(probes),
            "probes of spans": 2 if spans else 0,
        },
    )
    ask = partial(
        _round, queue=tickets(), clients=clients, model=backbone.name, max_tokens=max_tokens
    )
    del backbone
    options = ("--model", model)
    with (
        ServerProcess(probes, options=(*options, "--policy", str(policy))) as judging,
        ServerProcess((), options=options) as plain,
    ):
        servers = [Server(judging, round_s), Server(plain, plain_round_s)]
        for server in servers:
            server.process.wait_until_ready()
        results = asyncio.run(_measure(servers, ask, rounds))
    return Record("load", where, results, _sections(results))


async def _measure(
    servers: Sequence[Server], ask: Callable[..., Awaitable[list[Answer]]], rounds: int
) -> dict[str, Any]:
    for server in servers:
        await ask(server, seconds=min(_WARM_UP_S, servers[0].round_s))
    counted = servers[0].judged()
    with progress("Asking", rounds * sum(one.round_s for one in servers), unit="seconds") as shown:
        for number in range(rounds):
            # The servers take turns in going first.
            for server in servers if number % 2 == 0 else reversed(servers):
                before = server.spent_s
                server.answers.append(await ask(server, seconds=server.round_s))
                server.cpu_s.append(server.spent_s - before)
                shown.advance(server.round_s)
    answers = [answer for own in servers[0].answers for answer in own]
    found = faults(answers)
    unanswered = abs(servers[0].judged() - counted - len(answers))
    found["judged by the server, but not answered, or the reverse"] = unanswered
    return {
        "rounds": [
            {
                f"{name}_{side}": value
                for side, server in zip(("with", "without"), servers, strict=True)
                for name, value in _round_figures(server, number).items()
            }
            for number in range(rounds)
        ],
        "answers": len(answers),
        "endings": dict(sorted(Counter(answer.ending for answer in answers).items())),
        "faults": found,
        "is_sound": bool(answers) and not any(found.values()),
    }


async def _round(
    server: Server,
    *,
    seconds: float,
    queue: Iterator[Ticket],
    clients: int,
    model: str,
    max_tokens: int,
) -> list[Answer]:
    """Clients ask until the time is up; then their last answers are waited for."""
    found: list[Answer] = []
    deadline = perf_counter() + seconds
    url = f"{server.process.url}/v1"
    async with AsyncOpenAI(
        base_url=url, api_key="unused", max_retries=0, timeout=_TIMEOUT_S
    ) as openai:

        async def ask_on() -> None:
            while perf_counter() < deadline:
                found.append(await _ask(openai, next(queue), model, max_tokens))

        await asyncio.gather(*(ask_on() for _ in range(clients)))
    return found


async def _ask(openai: AsyncOpenAI, ticket: Ticket, model: str, max_tokens: int) -> Answer:
    """Asks one ticket; half of all tickets are asked as streams."""
    start = perf_counter()
    question: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": ticket.text}],
        # The server without probes blocks nothing: it answers such a ticket with one token, so that
        # both servers read and write the same amount.
        "max_tokens": 1 if ticket.is_abuse else max_tokens,
        "temperature": 0,
    }
    create = openai.chat.completions.with_raw_response.create
    verdicts: list[Mapping[str, Any]] = []
    id, ending = "", ""
    try:
        if ticket.number // 2 % 2:
            raw = await create(**question, stream=True)
            async for chunk in raw.parse():
                id = chunk.id
                for choice in chunk.choices:
                    extension = (choice.delta.model_extra or {}).get("sidelight") or {}
                    verdicts += extension.get("verdicts", [])
                    ending = choice.finish_reason or ending
        else:
            raw = await create(**question)
            answer = raw.parse()
            id, ending = answer.id, str(answer.choices[0].finish_reason)
            verdicts += (answer.model_extra or {})["sidelight"]["verdicts"]
    except APIError as error:
        ending = str(error.code) if isinstance(error, APIStatusError) else type(error).__name__
        return Answer(ticket, None, perf_counter() - start, (), (), ending)
    in_header = json.loads(raw.headers["x-sidelight-verdicts"])
    return Answer(ticket, id, perf_counter() - start, verdicts, in_header, ending)


def faults(answers: Sequence[Answer]) -> dict[str, int]:
    """How many answers of the server with probes have each fault; a sound run has none."""
    written = [answer for answer in answers if answer.id is not None]
    others = [answer for answer in answers if answer.id is None]
    told = [Counter(one["probe"] for one in own.verdicts if "error" not in one) for own in written]
    counts = [own[probe] for own in told for probe in PROBES]
    blocked = [answer for answer in others if answer.ending == "content_filter"]
    return {
        "failed requests": len(others) - len(blocked),
        "lost verdicts": sum(count == 0 for count in counts),
        "duplicated verdicts": sum(count > 1 for count in counts),
        "answers that share an id": len(written) - len({answer.id for answer in written}),
        "verdicts of another request": sum(map(_is_swapped, written)),
        "header unlike the answer": sum(map(_is_contradicted, written)),
        "abuse that was answered": sum(answer.ticket.is_abuse for answer in written),
        "others that were blocked": sum(not answer.ticket.is_abuse for answer in blocked),
    }


def _is_swapped(answer: Answer) -> bool:
    word = answer.ticket.word
    said = [one for one in (*answer.verdicts, *answer.in_header) if one["probe"] == "word"]
    return any(verdict.get("label", word) != word for verdict in said)


def _is_contradicted(answer: Answer) -> bool:
    own = {verdict["probe"]: verdict.get("label") for verdict in answer.verdicts}
    return any(own.get(one["probe"]) != one.get("label") for one in answer.in_header)


def _round_figures(server: Server, number: int) -> dict[str, float | None]:
    answers = server.answers[number]
    cpu_s = server.cpu_s[number] / len(answers) if answers else None
    return {"p50": _percentile(answers, 50), "p99": _percentile(answers, 99), "cpu": cpu_s}


def _percentile(answers: Sequence[Answer], percent: int) -> float | None:
    """Seconds of the answers that were not to be blocked; None if there are none."""
    seconds = [own.seconds for own in answers if own.id is not None and not own.ticket.is_abuse]
    return float(np.percentile(seconds, percent)) if seconds else None


def _sections(results: Mapping[str, Any]) -> list[str]:
    """The times and the faults."""
    times: list[list[str]] = []
    for name, title in {"p50": "p50", "p99": "p99", "cpu": "CPU of a request"}.items():
        pairs = [(one[f"{name}_with"], one[f"{name}_without"]) for one in results["rounds"]]
        known = [pair for pair in pairs if None not in pair]
        if known:
            judging, plain = zip(*known, strict=True)
            values = (judging, plain, [a / b for a, b in zip(judging, plain, strict=True)])
            times.append([title, *(Range.of(own).text(2) for own in values)])
    ends = ", ".join(f"{name} {number}" for name, number in results["endings"].items())
    return [
        table(
            "Seconds, median over rounds (range)",
            ["", "with probes", "without", "ratio"],
            times,
        ),
        table("Faults", ["", "answers"], list(results["faults"].items())),
        f"{results['answers']} answers with probes ({ends}).",
    ]
