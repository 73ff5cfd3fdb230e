"""What a judge is asked about, and what comes back."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from sidelight.errors import SidelightError
from sidelight.models.conversation import Conversation, Message, characters

FailureReason = Literal[
    "timeout",
    "unreachable",
    "status",
    "unreadable",
    "budget",
    "too_long",
    "not_redacted",
    "cancelled",
]
# Control tokens of chat templates and tags of judges begin like this; a server would read them
# as its own: <|im_end|>, [INST], [gMASK] of GLM, [|user|] of EXAONE, ]~b] and [e~[ of MiniMax.
_CONTROL = re.compile(r"<(?=\S)|\[(?=\||/?[a-z]?[A-Z_]+\]|e~\[)|\](?=~)")


class JudgeError(SidelightError):
    """A judge gave no verdict; never to be taken for a harmless one.

    Attributes:
        reason: A word for metrics.
    """

    def __init__(self, reason: FailureReason, message: str):
        super().__init__(message)
        self.reason: FailureReason = reason


@dataclass(frozen=True)
class JudgeAnswer:
    """A judge's answer.

    Attributes:
        probability: That the criterion is met.
        seconds: Until it was there; 0.0 for one that was given before.
    """

    probability: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Question:
    """The text that a judge decides about.

    Attributes:
        turns: In order, without the system's leading turn.
        is_exchange: Whether the last turn is a response, which is what is decided about; otherwise
            it is all turns.
    """

    turns: tuple[Message, ...]
    is_exchange: bool = False

    @staticmethod
    def about(text: Conversation, response: str | None = None) -> "Question":
        """The question about a prompt, or about a response to it.

        All turns are sent, not only the one with the highest score: beside a decoy that scores
        higher and is harmless, an attack would otherwise go unread.
        """
        turns = [*text]
        while len(turns) > 1 and turns[0].role in ("system", "developer"):
            del turns[0]
        if response is None:
            return Question(tuple(turns))
        return Question((*turns, Message("assistant", response)), is_exchange=True)

    @property
    def characters(self) -> int:
        return characters(self.turns)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the turns."""
        turns = [[turn.role, turn.content] for turn in self.turns]
        return hashlib.sha256(json.dumps([self.is_exchange, turns]).encode()).hexdigest()

    @property
    def prompt(self) -> str:
        """The turns before the response as one text that can pose as nothing else."""
        return _joined(self.turns[:-1] if self.is_exchange else self.turns)

    @property
    def response(self) -> str | None:
        return inert(self.turns[-1].content) if self.is_exchange else None

    def to_json(self) -> str:
        """The turns as one line of JSON, which no text inside it can end."""
        turns = [{"role": t.role, "text": inert(t.content)} for t in self.turns]
        return json.dumps({"turns": turns}, ensure_ascii=False)


def inert(text: str) -> str:
    """The text, in which nothing is a control token of a chat template or a judge's tag.

    A space follows each ``<`` and each bracket that could begin one.
    """
    return _CONTROL.sub(lambda found: f"{found[0]} ", text)


def _joined(turns: Sequence[Message]) -> str:
    if len(turns) == 1:
        return inert(turns[0].content)
    return "\n\n".join(f"{turn.role}: {inert(turn.content)}" for turn in turns)
