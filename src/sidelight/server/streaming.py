"""A chat completion as server-sent events, in the order that OpenAI's clients expect."""

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from sidelight.engines.base import Event, Finished, PromptJudged, ResponseScored, TextDelta
from sidelight.errors import SidelightError
from sidelight.server.completions import Envelope, usage
from sidelight.server.errors import failure_body
from sidelight.server.report import Reporter, Side, extension

_DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Chunks:
    """Writes the chunks of one stream.

    Attributes:
        envelope: What every chunk carries.
        reporter: Writes the verdicts.
        prompt: The prompt's verdicts, known before the stream begins.
        includes_usage: Whether a usage chunk follows the last delta.
    """

    envelope: Envelope
    reporter: Reporter
    prompt: Side
    includes_usage: bool

    async def stream(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[str, None]:
        """Role and verdicts, moderation, text, the reason for the end, usage, ``[DONE]``.

        A failure midway is the last event; no ``[DONE]`` follows, so that nobody takes the text
        for complete.
        """
        first = {"role": "assistant", "content": "", "sidelight": extension(self.prompt)}
        yield self._delta(first)
        if self.reporter.probes:
            yield self._moderation(None)
        try:
            async with aclosing(events):
                async for event in events:
                    for chunk in self._chunks(event):
                        yield chunk
            yield _DONE
        except SidelightError as error:
            yield _sse(failure_body(error))

    def _chunks(self, event: Event) -> list[str]:
        match event:
            case TextDelta(text):
                return [self._delta({"content": text})]
            case Finished():
                return self._ending(event)
            case PromptJudged() | ResponseScored():
                return []

    def _ending(self, event: Finished) -> list[str]:
        response = self.reporter.side(event)
        late = self.reporter.reads_response
        delta = {"sidelight": extension(response)} if late else {}
        chunks = [self._delta(delta, finish_reason=event.reason)]
        if late:
            chunks.append(self._moderation(response))
        if self.includes_usage:
            chunks.append(self._chunk([], usage=usage(event)))
        return chunks

    def _moderation(self, response: Side | None) -> str:
        sides = [self.prompt] if response is None else [self.prompt, response]
        moderation = self.reporter.moderation(self.prompt, response)
        return self._chunk([], moderation=moderation, sidelight=extension(*sides))

    def _delta(self, delta: Mapping[str, Any], *, finish_reason: str | None = None) -> str:
        return self._chunk([{"index": 0, "delta": delta, "finish_reason": finish_reason}])

    def _chunk(self, choices: list[dict[str, Any]], **extra: Any) -> str:
        # With include_usage every chunk has the field, null until the last (OpenAI's API).
        blank = {"usage": None} if self.includes_usage else {}
        return _sse(
            {
                **self.envelope.fields("chat.completion.chunk"),
                "choices": choices,
                **blank,
                **extra,
            }
        )


def _sse(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'), allow_nan=False)}\n\n"
