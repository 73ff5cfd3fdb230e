"""Log-probabilities in OpenAI's two formats.

How OpenAI words a choice: as a chat's message, or as the text of a completion.

A completion, of a chat or of a text, as one JSON object.

A completion as server-sent events, in the order that OpenAI's clients expect.
"""

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from sidelight.engines.base import Finished, FinishReason, PromptJudged, ResponseScored, TextDelta
from sidelight.engines.logprobs import Candidate, Spelling, TokenLogprobs
from sidelight.errors import SidelightError
from sidelight.server.choices import Choices, Indexed, Written
from sidelight.server.errors import failure_body
from sidelight.server.report import Reporter, SideReport, extension, joined


def chat_logprobs(tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """As a chat's choice has them."""
    content = [
        {**_entry(token.drawn), "top_logprobs": [_entry(other) for other in token.likeliest]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """As a text's choice has them: the drawn token stands among the likeliest in any case."""
    return {
        "tokens": [_name(token.drawn.spelling) for token in tokens],
        "token_logprobs": [token.drawn.logprob for token in tokens],
        "top_logprobs": [_by_name((*token.likeliest, token.drawn)) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _entry(candidate: Candidate) -> dict[str, Any]:
    known = candidate.spelling.bytes
    return {
        "token": candidate.spelling.text,
        "bytes": None if known is None else list(known),
        "logprob": candidate.logprob,
    }


def _by_name(candidates: Sequence[Candidate]) -> Mapping[str, float]:
    """By spelling; of two tokens that are spelled alike, the likelier."""
    return {_name(one.spelling): one.logprob for one in reversed(candidates)}


def _name(spelling: Spelling) -> str:
    return f"bytes:{spelling.text}" if spelling.is_partial else spelling.text


Json = dict[str, Any]


class Form(ABC):
    """One endpoint's words.

    Args:
        has_logprobs: Whether a choice tells the log-probabilities of its tokens.

    Attributes:
        prefix: Of an answer's id.
        whole: The kind of a plain answer.
        piece: The kind of a chunk.
    """

    prefix: str
    whole: str
    piece: str

    def __init__(self, *, has_logprobs: bool):
        self.has_logprobs = has_logprobs

    @abstractmethod
    def choice(self, index: int, written: Written) -> Json:
        """A complete choice of a plain answer."""

    @abstractmethod
    def delta(
        self,
        index: int,
        text: str | None,
        *,
        reason: FinishReason | None = None,
        extra: Mapping[str, Any] | None = None,
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> Json:
        """A choice in a chunk; ``extra`` goes where clients keep what they do not know."""

    @abstractmethod
    def opening(self, index: int, extra: Mapping[str, Any]) -> Json:
        """The first chunk's choice, before any text."""


class ChatForm(Form):
    """``/v1/chat/completions``."""

    prefix = "chatcmpl"
    whole = "chat.completion"
    piece = "chat.completion.chunk"

    def choice(self, index: int, written: Written) -> Json:
        """With a message."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": written.text},
            "logprobs": chat_logprobs(written.logprobs) if self.has_logprobs else None,
            "finish_reason": written.finished.reason,
        }

    def delta(
        self,
        index: int,
        text: str | None,
        *,
        reason: FinishReason | None = None,
        extra: Mapping[str, Any] | None = None,
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> Json:
        """With a delta, which is empty at the end."""
        content = {} if text is None else {"content": text}
        return {
            "index": index,
            "delta": {**content, **(extra or {})},
            "logprobs": chat_logprobs(logprobs) if logprobs else None,
            "finish_reason": reason,
        }

    def opening(self, index: int, extra: Mapping[str, Any]) -> Json:
        """With the role."""
        return self.delta(index, "", extra={"role": "assistant", **extra})


class TextForm(Form):
    """``/v1/completions``."""

    prefix = "cmpl"
    whole = "text_completion"
    piece = "text_completion"

    def choice(self, index: int, written: Written) -> Json:
        """With a text."""
        return {
            "index": index,
            "text": written.text,
            "logprobs": text_logprobs(written.logprobs) if self.has_logprobs else None,
            "finish_reason": written.finished.reason,
        }

    def delta(
        self,
        index: int,
        text: str | None,
        *,
        reason: FinishReason | None = None,
        extra: Mapping[str, Any] | None = None,
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> Json:
        """With a text, which is empty at the end."""
        return {
            "index": index,
            "text": text or "",
            "logprobs": text_logprobs(logprobs) if logprobs else None,
            "finish_reason": reason,
            **(extra or {}),
        }

    def opening(self, index: int, extra: Mapping[str, Any]) -> Json:
        """With an empty text."""
        return self.delta(index, "", extra=extra)


@dataclass(frozen=True)
class Envelope:
    """What names an answer: the same in all chunks of a stream.

    Attributes:
        id: Of this answer.
        created: Unix time.
        model: As the request calls it.
        form: How choices are worded.
    """

    id: str
    created: int
    model: str
    form: Form

    @classmethod
    def new(cls, model: str, form: Form) -> "Envelope":
        """A fresh one."""
        return cls(f"{form.prefix}-{uuid.uuid4().hex}", int(time.time()), model, form)

    def fields(self, kind: str) -> dict[str, Any]:
        """As JSON, with the object's kind."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def completion(
    envelope: Envelope,
    reporter: Reporter,
    judged: Sequence[PromptJudged],
    written: Sequence[Written],
) -> dict[str, Any]:
    """The body of the answer, with every chosen probe's verdict on all prompts and responses."""
    prompt = joined([reporter.side(event) for event in judged])
    response = joined([reporter.side(each.finished) for each in written])
    return {
        **envelope.fields(envelope.form.whole),
        "choices": [envelope.form.choice(index, each) for index, each in enumerate(written)],
        "usage": usage(judged, [each.finished for each in written]),
        "moderation": reporter.moderation(prompt, response) if reporter.probes else None,
        "sidelight": extension(prompt, response),
    }


def usage(judged: Sequence[PromptJudged], finished: Sequence[Finished]) -> dict[str, int]:
    """Tokens read and written; a prompt counts once, however many texts follow it."""
    prompt = sum(event.tokens for event in judged)
    written = sum(event.completion_tokens for event in finished)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
    }


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

    def _prompt_of(self, index: int) -> SideReport:
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

    def _moderation(self, response: SideReport | None) -> str:
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
