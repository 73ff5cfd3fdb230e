"""Correctness and latency under many concurrent chat clients.

Probes with random weights classify every prompt in advance, so the correct verdicts are known. A
server with probes and policies and one without are queried in alternation, by the same number of
clients of the openai package.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx
import numpy as np
import psutil
from openai import APIError, APIStatusError, AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from sidelight.data.loading import load_examples
from sidelight.engines.transformers.backbone import TransformersBackbone, load_backbone
from sidelight.models.conversation import Message, Reads
from sidelight.probes.artifact import save_probe
from sidelight.probes.probe import Probe
from sidelight.progress import progress
from sidelight.scoring import classify
from sidelight_lab.bench.measurement import Range, Record, conditions, spread_probe, table
from sidelight_lab.bench.server_process import ServerProcess

_TEXTS = files("sidelight.demo") / "data" / "urgency_train.jsonl"
# The first two read the prompt, the last one the response.
PROBES = ("blocking", "telling", "reply")
_BLOCKED_SHARE = 1 / 8
# Of a probability: batches of other shapes round bfloat16 differently, by up to 0.03. Of two texts,
# both probes agree so far in one pair of a hundred.
TOLERANCE = 0.06
# Number of prompts over which probabilities are spread.
_SPREAD = 40
# The output rule is evaluated after every token but never fires, so responses keep their length.
_POLICY = """[input.blocking]
mode = "block"
threshold = {}
disclose = "scores"

[output.reply]
mode = "block"
threshold = 1.0
"""
# The output rule withholds scores, which the metrics contain.
_METRICS_KEY = "load"
_WARM_UP_S = 5.0
_TIMEOUT_S = 600.0

Verdicts = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Question:
    """A prompt, the expected probability of each prompt probe, and the expected result."""

    text: str
    probabilities: Mapping[str, float]
    is_blocked: bool


def prepare(
    backbone: TransformersBackbone, folder: Path, *, spans: bool
) -> tuple[list[Path], Path, list[Question]]:
    """Create the probes, a policy that blocks by one of them, and the questions with expected
    results.

    With ``spans``, the probes that have a rule label spans.
    """
    texts = load_examples(str(_TEXTS), label=None).items
    prompts = [backbone.encoder.encode(item.messages) for item in texts]
    asked = (Message("user", "Write a message."),)
    answered = [backbone.encoder.encode(asked, item.text) for item in texts]
    probes: list[Probe] = []
    for seed, name in enumerate(PROBES):
        labels_spans = spans and name != "telling"
        is_reply = name == "reply"
        probe = spread_probe(
            backbone,
            (answered if is_reply else prompts)[:_SPREAD],
            name,
            reads=Reads("response" if is_reply else "prompt", template=not labels_spans),
            labels_spans=labels_spans,
            seed=seed,
        )
        probes.append(probe)
    probabilities = np.array(
        [
            [
                probe.verdict(text.logits).probabilities["yes"]
                for text in classify(backbone, probe, texts)
            ]
            for probe in probes[:2]
        ]
    )
    threshold = float(np.quantile(probabilities[0], 1 - _BLOCKED_SHARE))
    questions = [
        Question(item.text, dict(zip(PROBES, chances, strict=False)), chances[0] >= threshold)
        for item, chances in zip(texts, probabilities.T.tolist(), strict=True)
        # What becomes of the others depends on rounding.
        if abs(chances[0] - threshold) > TOLERANCE
    ]
    policy = folder / "policy.toml"
    policy.write_text(_POLICY.format(threshold), "utf-8")
    return [save_probe(probe, folder / probe.name) for probe in probes], policy, questions


@dataclass(frozen=True)
class Answer:
    """The result of one client: verdicts in the body or stream, and in the header."""

    question: Question
    id: str | None  # None for an error
    seconds: float
    verdicts: Verdicts
    in_header: Verdicts
    ending: str  # the finish reason, or the error's code


@dataclass
class Server:
    """One of the two servers, with its answers and the metrics of each round."""

    process: ServerProcess
    answers: list[Answer] = field(default_factory=list[Answer])
    rounds: list[dict[str, float | None]] = field(default_factory=list[dict[str, float | None]])

    @property
    def spent_s(self) -> float:
        """The CPU time of the server since it started."""
        spent = psutil.Process(self.process.pid).cpu_times()
        return spent.user + spent.system

    def classified(self) -> int:
        """Number of prompts with a counted verdict of a probe."""
        headers = {"Authorization": f"Bearer {_METRICS_KEY}"}
        series = httpx.get(f"{self.process.url}/metrics", headers=headers).text
        families = text_string_to_metric_families(series)
        return round(
            sum(
                sample.value
                for family in families
                for sample in family.samples
                if sample.name == "sidelight_verdicts_total" and sample.labels["probe"] == PROBES[1]
            )
        )


def run_load(
    folder: Path,
    *,
    model: str,
    clients: int,
    seconds: float,
    round_s: float,
    max_tokens: int,
    spans: bool = False,
) -> Record:
    """Write the probes into the folder, start both servers, and ask them in turn.

    Rounds with probes take ``seconds`` in total; each is paired with one without. ``is_sound`` in
    the results means that nothing was lost, duplicated, swapped, or let through.
    """
    backbone = load_backbone(model)
    rounds = max(1, round(seconds / round_s))
    probes, policy, questions = prepare(backbone, folder, spans=spans)
    where = conditions(
        backbone,
        {
            "clients": clients,
            "rounds": rounds,
            "round s": round_s,
            "tokens of an answer": max_tokens,
            "probes": len(probes),
            "probes of spans": 2 if spans else 0,
        },
    )
    ask = partial(
        _round,
        queue=enumerate(cycle(questions)),
        clients=clients,
        model=backbone.name,
        max_tokens=max_tokens,
    )
    del backbone
    options = ("--model", model, "--metrics-key", _METRICS_KEY)
    with (
        ServerProcess(probes, options=(*options, "--policy", str(policy))) as classifying,
        ServerProcess((), options=options) as plain,
    ):
        servers = [Server(classifying), Server(plain)]
        for server in servers:
            server.process.wait_until_ready()
        results = asyncio.run(_measure(servers, ask, rounds, round_s))
    return Record("load", where, results, _sections(results))


async def _measure(
    servers: Sequence[Server],
    ask: Callable[..., Awaitable[list[Answer]]],
    rounds: int,
    round_s: float,
) -> dict[str, Any]:
    for server in servers:
        await ask(server, seconds=min(_WARM_UP_S, round_s))
    counted = servers[0].classified()
    with progress("Asking", rounds * len(servers), unit="rounds") as advance:
        for number in range(rounds):
            # The servers take turns in going first.
            for server in servers if number % 2 == 0 else reversed(servers):
                before = server.spent_s
                answers = await ask(server, seconds=round_s)
                server.answers += answers
                server.rounds.append(_round_metrics(answers, server.spent_s - before))
                advance(1)
    answers = servers[0].answers
    found = faults(answers)
    unanswered = abs(servers[0].classified() - counted - len(answers))
    found["classified by the server, but not answered, or the reverse"] = unanswered
    return {
        "rounds": [
            {"with": classifying, "without": plain}
            for classifying, plain in zip(*(server.rounds for server in servers), strict=True)
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
    queue: Iterator[tuple[int, Question]],
    clients: int,
    model: str,
    max_tokens: int,
) -> list[Answer]:
    """Run clients until the time is up, then wait for their last answers."""
    found: list[Answer] = []
    deadline = perf_counter() + seconds
    url = f"{server.process.url}/v1"
    async with AsyncOpenAI(
        base_url=url, api_key="unused", max_retries=0, timeout=_TIMEOUT_S
    ) as openai:

        async def ask_on() -> None:
            while perf_counter() < deadline:
                found.append(await _ask(openai, *next(queue), model, max_tokens))

        await asyncio.gather(*(ask_on() for _ in range(clients)))
    return found


async def _ask(
    openai: AsyncOpenAI, number: int, question: Question, model: str, max_tokens: int
) -> Answer:
    """Ask one question; every other one as a stream."""
    start = perf_counter()
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": question.text}],
        # The server without probes blocks nothing: it answers such a prompt with one token, so that
        # both servers read and write the same amount.
        "max_tokens": 1 if question.is_blocked else max_tokens,
        "temperature": 0,
    }
    create = openai.chat.completions.with_raw_response.create
    verdicts: list[Mapping[str, Any]] = []
    id, ending = "", ""
    try:
        if number % 2:
            raw = await create(**body, stream=True)
            async for chunk in raw.parse():
                id = chunk.id
                for choice in chunk.choices:
                    extension = (choice.delta.model_extra or {}).get("sidelight") or {}
                    verdicts += extension.get("verdicts", [])
                    ending = choice.finish_reason or ending
        else:
            raw = await create(**body)
            answer = raw.parse()
            id, ending = answer.id, str(answer.choices[0].finish_reason)
            verdicts += (answer.model_extra or {})["sidelight"]["verdicts"]
    except APIError as error:
        ending = str(error.code) if isinstance(error, APIStatusError) else type(error).__name__
        return Answer(question, None, perf_counter() - start, (), (), ending)
    in_header = json.loads(raw.headers["x-sidelight-verdicts"])
    return Answer(question, id, perf_counter() - start, verdicts, in_header, ending)


def faults(answers: Sequence[Answer]) -> dict[str, int]:
    """Number of answers with each fault on the server with probes; zero in a sound run."""
    written = [answer for answer in answers if answer.id is not None]
    without_id = [answer for answer in answers if answer.id is None]
    counts = [
        sum(one["probe"] == probe and "error" not in one for one in answer.verdicts)
        for answer in written
        for probe in PROBES
    ]
    blocked = [answer for answer in without_id if answer.ending == "content_filter"]
    return {
        "failed requests": len(without_id) - len(blocked),
        "lost verdicts": sum(count == 0 for count in counts),
        "duplicated verdicts": sum(count > 1 for count in counts),
        "answers that share an id": len(written) - len({answer.id for answer in written}),
        "verdicts of another request": sum(map(_is_swapped, written)),
        "answered, but to be blocked": sum(answer.question.is_blocked for answer in written),
        "blocked, but to be answered": sum(not answer.question.is_blocked for answer in blocked),
    }


def _is_swapped(answer: Answer) -> bool:
    """Whether a verdict in the answer or its header belongs to another prompt."""
    return any(
        abs(one["probabilities"]["yes"] - answer.question.probabilities[one["probe"]]) > TOLERANCE
        for one in (*answer.verdicts, *answer.in_header)
        if one["probe"] in answer.question.probabilities and "error" not in one
    )


def _round_metrics(answers: Sequence[Answer], cpu_s: float) -> dict[str, float | None]:
    """Seconds of the answers that were not to be blocked, and CPU time of a request."""
    seconds = [
        answer.seconds
        for answer in answers
        if answer.id is not None and not answer.question.is_blocked
    ]
    p50, p99 = np.percentile(seconds, (50, 99)).tolist() if seconds else (None, None)
    return {"p50": p50, "p99": p99, "cpu": cpu_s / len(answers) if answers else None}


def _sections(results: Mapping[str, Any]) -> list[str]:
    """The times and the faults."""
    times: list[list[str]] = []
    for name, title in {"p50": "p50", "p99": "p99", "cpu": "CPU of a request"}.items():
        pairs = [(one["with"][name], one["without"][name]) for one in results["rounds"]]
        known = [pair for pair in pairs if None not in pair]
        if known:
            classifying, plain = zip(*known, strict=True)
            values = (classifying, plain, [a / b for a, b in zip(classifying, plain, strict=True)])
            times.append([title, *(Range.of(values).text(2) for values in values)])
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
