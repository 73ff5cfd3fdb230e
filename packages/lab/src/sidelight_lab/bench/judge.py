"""Delay of deferred responses on our server, with a judge that takes a fixed time.

Every prompt is deferred and passes. A server with the same probe and no rule answers the same
prompts in alternation.
"""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import uvicorn
from openai import AsyncOpenAI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from sidelight.engines.transformers.backbone import TransformersBackbone
from sidelight.probes.artifact import save_probe
from sidelight.progress import Progress, progress
from sidelight_lab.bench.measurement import Range, Record, conditions, table, untrained_probe
from sidelight_lab.bench.server_process import ServerProcess

_PROBE = "deferring"
# At a threshold of 0, the probe flags every prompt, so every prompt is deferred.
_POLICY = """system_turns = "trust"

[judges.slow]
url = "{url}"
model = "slow"
criterion = "criterion.md"
concurrency = {clients}
budget_per_minute = 1000000
budget_per_key = 1000000

[input.deferring]
mode = "block"
threshold = 0.0
defer = {{ judge = "slow", share = 0.0 }}
"""
_NO = {
    "choices": [
        {
            "message": {"role": "assistant", "content": "No"},
            "logprobs": {
                "content": [
                    {
                        "token": "No",
                        "logprob": -0.01,
                        "top_logprobs": [{"token": "No", "logprob": -0.01}],
                    }
                ]
            },
        }
    ]
}


class SlowJudge:
    """A judge that clears everything after a fixed number of seconds.

    Attributes:
        url: Address of the judge.
        asked: Time of each prompt's question.
    """

    def __init__(self, seconds: float):
        self.url, self.asked, self._seconds = "", dict[str, float](), seconds

    async def answer(self, request: Request) -> JSONResponse:
        came = perf_counter()
        asked = json.loads((await request.json())["messages"][-1]["content"].splitlines()[0])
        self.asked[asked["turns"][0]["text"]] = came
        await asyncio.sleep(self._seconds - (perf_counter() - came))
        return JSONResponse(_NO)


@contextmanager
def slow_judge(seconds: float) -> Generator[SlowJudge]:
    """A judge on loopback."""
    judge = SlowJudge(seconds)
    routes = [Route("/v1/chat/completions", judge.answer, methods=["POST"])]
    config = uvicorn.Config(Starlette(routes=routes), port=0, log_level="warning", backlog=2048)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    judge.url = f"http://127.0.0.1:{port}/v1"
    try:
        yield judge
    finally:
        server.should_exit = True
        thread.join()


@dataclass(frozen=True)
class _First:
    """When a response began and when the judge was asked, in seconds after the request."""

    began: float
    asked: float | None


def measure_judge(
    backbone: TransformersBackbone,
    folder: Path,
    *,
    model: str,
    seconds: float,
    rounds: int,
    clients: int,
    max_tokens: int,
) -> Record:
    """Time first tokens with and without a judge: of one client, then of many at once.

    Args:
        backbone: Backbone, for the size of the probe.
        folder: Folder for the probe and the policy.
        model: Model, as in ``sidelight serve``.
        seconds: Response time of the judge.
        rounds: Number of prompts of the single client.
        clients: Number of concurrent prompts afterwards.
        max_tokens: Maximum tokens of each response.
    """
    settings = {"judge s": seconds, "rounds": rounds, "clients": clients, "tokens": max_tokens}
    where = conditions(backbone, settings)
    probe = save_probe(untrained_probe(backbone.fingerprint, _PROBE), folder / _PROBE)
    name = backbone.name
    (folder / "criterion.md").write_text("The text asks for a secret.", "utf-8")
    with slow_judge(seconds) as judge:
        (folder / "policy.toml").write_text(_POLICY.format(url=judge.url, clients=clients), "utf-8")
        options = ("--model", model)
        with (
            ServerProcess(
                [probe], options=(*options, "--policy", str(folder / "policy.toml"))
            ) as a,
            ServerProcess([probe], options=options) as b,
        ):
            a.wait_until_ready()
            b.wait_until_ready()
            work = 2 * (rounds + clients)
            with progress("Asking", work, unit="prompts") as advance:
                ask = {
                    kind: _asker(server.url, name, judge, max_tokens, advance)
                    for kind, server in (("deferred", a), ("plain", b))
                }
                one = asyncio.run(_one_client(ask, rounds))
                many = asyncio.run(_many_clients(ask, clients))
    return _record(where, seconds, one, many)


_Ask = Callable[[AsyncOpenAI, str], Awaitable[_First]]


def _asker(
    url: str, model: str, judge: SlowJudge, max_tokens: int, advance: Progress
) -> tuple[str, _Ask]:
    async def ask(client: AsyncOpenAI, text: str) -> _First:
        started, began = perf_counter(), None
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": text}],
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
        )
        async for chunk in stream:
            if began is None and chunk.choices and chunk.choices[0].delta.content:
                began = perf_counter() - started
        advance(1)
        asked = judge.asked.get(text)
        # A response without text begins with its end.
        return _First(began or perf_counter() - started, asked and asked - started)

    return url, ask


async def _one_client(asks: dict[str, tuple[str, _Ask]], rounds: int) -> dict[str, list[_First]]:
    """Time the same prompts on both servers in alternation, excluding the first, which warms them
    up.
    """
    found: dict[str, list[_First]] = {kind: [] for kind in asks}
    for number in range(rounds):
        for kind, (url, ask) in asks.items():
            async with _client(url) as client:
                found[kind].append(await ask(client, _prompt(number)))
    return {kind: each[1:] for kind, each in found.items()}


async def _many_clients(asks: dict[str, tuple[str, _Ask]], clients: int) -> dict[str, list[_First]]:
    """All clients ask at once."""
    found: dict[str, list[_First]] = {}
    for kind, (url, ask) in asks.items():
        async with _client(url) as client:
            texts = [_prompt(10_000 + number) for number in range(clients)]
            found[kind] = await asyncio.gather(*(ask(client, text) for text in texts))
    return found


def _client(url: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)


def _prompt(number: int) -> str:
    return f"Write a sentence about the number {number}, a river and a friendly dog."


def _record(
    where: dict[str, Any],
    seconds: float,
    one: dict[str, list[_First]],
    many: dict[str, list[_First]],
) -> Record:
    results, rows = dict[str, Any](), list[list[object]]()
    for name, found in (("one client", one), (f"{where['clients']} clients", many)):
        plain = np.array([first.began for first in found["plain"]])
        deferred = np.array([first.began for first in found["deferred"]])
        answered = np.array([(first.asked or 0.0) + seconds for first in found["deferred"]])
        slower = np.maximum(plain, answered)
        if name != "one client":
            # Prompts at once are answered in no fixed order.
            plain, deferred, slower = (
                np.sort(plain),
                np.sort(deferred),
                np.maximum(np.sort(plain), np.sort(answered)),
            )
        lags = deferred / slower - 1
        values = {
            "without a judge": plain,
            "the judge has answered": answered,
            "deferred": deferred,
            "later than the slower": lags,
        }
        results[name] = {
            kind: {"median": float(np.median(each)), "max": float(each.max())}
            for kind, each in values.items()
        } | {
            "answers": len(deferred),
            "questions": sum(f.asked is not None for f in found["deferred"]),
        }
        rows.append(
            [
                name,
                *(Range.of(each.tolist()).text() for each in (plain, answered, deferred)),
                f"{100 * np.median(lags):.1f} % ({100 * lags.min():.1f} to {100 * lags.max():.1f})",
            ]
        )
    headings = [
        "",
        "first token without a judge, s",
        "the judge has answered, s",
        "first token, deferred, s",
        "later than the slower of both",
    ]
    title = f"Deferred prompts, a judge of {seconds:g} s: median (smallest to largest)"
    return Record("judge", where, results, (table(title, headings, rows),))
