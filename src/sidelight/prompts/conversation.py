"""A conversation, and which of its tokens a probe reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

PromptFormat = Literal["chat", "raw"]
Side = Literal["prompt", "response", "both"]
Role = Literal["system", "user", "assistant", "tool", "developer"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class PlainText:
    """A text that no chat template is written around, such as a prompt to complete."""

    content: str


Conversation = Sequence[Message] | PlainText


class Part(IntEnum):
    """What a token belongs to."""

    UNREAD = 0
    """Before the first turn that is not the system's, or after the response."""
    PROMPT = 1
    TEMPLATE = 2
    """Written by the chat template after the prompt began: turn markers, generation prompt."""
    RESPONSE = 3


@dataclass(frozen=True)
class Reads:
    """Which tokens a probe reads.

    Attributes:
        side: The prompt, the response, or both.
        template: Whether the chat template's tokens count as part of the prompt. The markers that
            follow a prompt carry much of what the model has concluded about it.
    """

    side: Side = "prompt"
    template: bool = True

    @property
    def parts(self) -> frozenset[Part]:
        """The kinds of token that are read."""
        prompt = {Part.PROMPT, Part.TEMPLATE} if self.template else {Part.PROMPT}
        sides = {"prompt": prompt, "response": {Part.RESPONSE}, "both": {*prompt, Part.RESPONSE}}
        return frozenset(sides[self.side])
