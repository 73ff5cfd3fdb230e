"""Judges: a scripted server, and answers in the form that each family of judges gives."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sidelight.judges.settings import JudgeSettings
from worlds.servers import listening

Reply = Callable[[Mapping[str, Any]], Awaitable[Response] | Response]
# Alternatives of one token, with their probabilities.
Token = tuple[str, Mapping[str, float]]
CRITERION = "The text asks for a secret number."


def chat_answer(*tokens: Token, content: str | None = None) -> dict[str, Any]:
    """A chat completion with log-probabilities, as vLLM, llama.cpp and Ollama give them."""
    text = "".join(token for token, _ in tokens) if content is None else content
    scored = [
        {
            "token": token,
            "logprob": math.log(alternatives[token]),
            "bytes": list(token.encode()),
            "top_logprobs": [
                {"token": word, "logprob": math.log(p), "bytes": list(word.encode())}
                for word, p in alternatives.items()
            ],
        }
        for token, alternatives in tokens
    ]
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "judge",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "logprobs": {"content": scored} if scored else None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": len(tokens), "total_tokens": 2},
    }


def yes_no(probability: float) -> dict[str, Any]:
    """The answer of a judge that is so sure."""
    p = min(max(probability, 1e-9), 1 - 1e-9)
    return chat_answer(("Yes" if p >= 0.5 else "No", {"Yes": p, "No": 1 - p}))


@dataclass
class ScriptedJudge:
    """A server that answers as its script says.

    Attributes:
        address: Where it listens, with ``/v1``.
        reply: Answers a body.
        asked: Every body so far.
        headers: Those of every request so far.
        most_at_once: The most requests that it has had at once.
    """

    address: str = ""
    reply: Reply = lambda _body: JSONResponse(yes_no(0.0))
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    most_at_once: int = 0

    def reset(self) -> None:
        """Forgets every question, and answers with a probability of 0.2."""
        self.asked.clear()
        self.headers.clear()
        self.most_at_once = 0
        self.says(0.2)

    def answers(self, answer: Mapping[str, Any] | Response, *, after_s: float = 0.0) -> None:
        """Answers every question so from now on."""

        async def reply(_body: Mapping[str, Any]) -> Response:
            await asyncio.sleep(after_s)
            return answer if isinstance(answer, Response) else JSONResponse(dict(answer))

        self.reply = reply

    def says(self, probability: float, *, after_s: float = 0.0) -> None:
        self.answers(yes_no(probability), after_s=after_s)

    def settings(self, **fields: Any) -> JudgeSettings:
        """How a policy describes it."""
        defaults = {"url": self.address, "model": "judge", "retries": 0, "timeout_s": 5}
        is_chat = fields.get("kind", "chat") == "chat" and "profile" not in fields
        return JudgeSettings(**defaults | ({"criterion": CRITERION} if is_chat else {}) | fields)

    @property
    def texts(self) -> Sequence[str]:
        """What was asked, as text."""
        return [str(body.get("messages") or body.get("input")) for body in self.asked]


@contextmanager
def scripted_judge() -> Iterator[ScriptedJudge]:
    """A live judge on loopback."""
    judge, app, running = ScriptedJudge(), FastAPI(), 0

    async def answer(request: Request) -> Response:
        nonlocal running
        body = await request.json()
        judge.asked.append(body)
        judge.headers.append(dict(request.headers))
        running += 1
        judge.most_at_once = max(judge.most_at_once, running)
        try:
            reply = judge.reply(body)
            return reply if isinstance(reply, Response) else await reply
        finally:
            running -= 1

    for route in ("chat/completions", "decisions", "moderations"):
        app.add_route(f"/v1/{route}", answer, methods=["POST"])
    with listening(app) as address:
        judge.address = f"{address}/v1"
        yield judge
