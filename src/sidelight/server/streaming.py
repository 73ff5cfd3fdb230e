"""A completion as server-sent events, in the order that OpenAI's clients expect."""

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from sidelight.engines.events import Finished, PromptJudged, ResponseScored, TextDelta
from sidelight.errors import SidelightError
from sidelight.server.choices import Choices, Indexed
from sidelight.server.completions import Envelope, usage
from sidelight.server.errors import failure_body
from sidelight.server.report import Reporter, Told, extension, joined

_DONE = "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Sends events, and closes them when the answer is over: they are recorded to their end then.

    Args:
        events: What is sent.
        headers: Of the answer.
    """

    def __init__(self, events: AsyncGenerator[str, None], headers: Mapping[str, str]):
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={**headers, "Cache-Control": "no-cache"},
        )
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As Starlette's, which leaves them to the garbage collector where a send is given up."""
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


@dataclass(frozen=True)
class Chunks:
    """Writes the chunks of one stream.

    Attributes:
        envelope: What every chunk carries.
        reporter: Writes the verdicts.
        choices: The texts; their prompts' verdicts are known before the stream begins.
        includes_usage: Whether a usage chunk follows the last delta.
    """

    envelope: Envelope
    reporter: Reporter
    choices: Choices
    includes_usage: bool

    async def stream(self) -> AsyncGenerator[str, None]:
        """Verdicts, moderation, text, the reasons for the end, usage, ``[DONE]``.

        A failure midway is the last event; no ``[DONE]`` follows, so that nobody takes the text
        for complete.
        """
        finished: dict[int, Finished] = {}
        async with aclosing(self.choices.events()) as events:
            try:
                for index in range(len(self.choices.streams)):
                    verdicts = _numbered(extension(self._prompt_of(index)))
                    yield self._chunk([self.envelope.form.opening(index, {"sidelight": verdicts})])
                if self.reporter.probes:
                    yield self._moderation(None)
                async for indexed in events:
                    if isinstance(indexed.event, Finished):
                        finished[indexed.index] = indexed.event
                    for chunk in self._deltas(indexed):
                        yield chunk
                for chunk in self._ending([finished[index] for index in sorted(finished)]):
                    yield chunk
                yield _DONE
            except SidelightError as error:
                yield _sse(failure_body(error))

    def _prompt_of(self, index: int) -> Told:
        texts_per_prompt = len(self.choices.streams) // len(self.choices.judged)
        return self.reporter.side(self.choices.judged[index // texts_per_prompt])

    def _response_of(self, index: int, finished: Finished) -> dict[str, Any]:
        said = len(extension(self._prompt_of(index))["verdicts"])
        return {"sidelight": _numbered(extension(self.reporter.side(finished)), first=said)}

    def _deltas(self, indexed: Indexed) -> list[str]:
        form, index = self.envelope.form, indexed.index
        match indexed.event:
            case TextDelta(text, logprobs=logprobs):
                return [self._chunk([form.delta(index, text, logprobs=logprobs)])]
            case Finished() as event:
                extra = self._response_of(index, event) if self.reporter.reads_response else {}
                last = form.delta(
                    index, None, reason=event.reason, extra=extra, logprobs=event.logprobs
                )
                return [self._chunk([last])]
            case PromptJudged() | ResponseScored():
                return []

    def _ending(self, finished: list[Finished]) -> list[str]:
        chunks: list[str] = []
        if self.reporter.reads_response:
            response = joined([self.reporter.side(event) for event in finished])
            chunks.append(self._moderation(response))
        if self.includes_usage:
            chunks.append(self._chunk([], usage=usage(self.choices.judged, finished)))
        return chunks

    def _moderation(self, response: Told | None) -> str:
        prompt = joined([self.reporter.side(event) for event in self.choices.judged])
        sides = [prompt] if response is None else [prompt, response]
        moderation = self.reporter.moderation(prompt, response)
        return self._chunk([], moderation=moderation, sidelight=extension(*sides))

    def _chunk(self, choices: list[dict[str, Any]], **extra: Any) -> str:
        # With include_usage every chunk has the field, null until the last (OpenAI's API).
        blank = {"usage": None} if self.includes_usage else {}
        fields = self.envelope.fields(self.envelope.form.piece)
        return _sse({**fields, "choices": choices, **blank, **extra})


def _numbered(said: Mapping[str, Any], *, first: int = 0) -> dict[str, Any]:
    """The verdicts of a delta, which OpenAI's stream helper adds up by their ``index``.

    Without one it raises as soon as a second delta has verdicts.
    """
    verdicts = enumerate(said["verdicts"], start=first)
    return {**said, "verdicts": [{"index": index, **verdict} for index, verdict in verdicts]}


def _sse(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'), allow_nan=False)}\n\n"
