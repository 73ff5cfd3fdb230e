"""A completion, of a chat or of a text, as one JSON object."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sidelight.engines.events import Finished, PromptJudged
from sidelight.server.choices import Written
from sidelight.server.forms import Form
from sidelight.server.report import Reporter, extension, joined


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
