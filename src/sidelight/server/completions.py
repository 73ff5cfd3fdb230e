"""A chat completion as one JSON object."""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from sidelight.engines.base import Event, Finished, PromptJudged, ResponseScored, TextDelta
from sidelight.server.report import Reporter, Side, extension


@dataclass(frozen=True)
class Envelope:
    """What names an answer: the same in all chunks of a stream."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, model: str) -> "Envelope":
        """A fresh one."""
        return cls(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model)

    def fields(self, kind: str) -> dict[str, Any]:
        """As JSON, with the object's kind."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


@dataclass(frozen=True)
class Written:
    """A complete text and how it ended."""

    text: str
    finished: Finished


async def collect(events: AsyncGenerator[Event, None]) -> Written:
    """Waits for the whole text."""
    pieces: list[str] = []
    async with aclosing(events):
        async for event in events:
            match event:
                case TextDelta(text):
                    pieces.append(text)
                case Finished():
                    return Written("".join(pieces), event)
                case PromptJudged() | ResponseScored():
                    pass
    raise AssertionError("An engine's events end with Finished or an error.")


def completion(
    envelope: Envelope, reporter: Reporter, prompt: Side, written: Written
) -> dict[str, Any]:
    """The body of the answer, with every chosen probe's verdict."""
    response = reporter.side(written.finished)
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": written.text},
        "finish_reason": written.finished.reason,
    }
    moderation = reporter.moderation(prompt, response) if reporter.probes else None
    return {
        **envelope.fields("chat.completion"),
        "choices": [choice],
        "usage": usage(written.finished),
        "moderation": moderation,
        "sidelight": extension(prompt, response),
    }


def usage(finished: Finished) -> dict[str, int]:
    """Tokens read and written."""
    prompt, written = finished.prompt_tokens, finished.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
    }
