"""How OpenAI words a choice: as a chat's message, or as the text of a completion."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from sidelight.engines.base import FinishReason

Json = dict[str, Any]


class Form(ABC):
    """One endpoint's words.

    Attributes:
        prefix: Of an answer's id.
        whole: The kind of a plain answer.
        piece: The kind of a chunk.
    """

    prefix: str
    whole: str
    piece: str

    @abstractmethod
    def choice(self, index: int, text: str, reason: FinishReason) -> Json:
        """A complete choice of a plain answer."""

    @abstractmethod
    def delta(
        self,
        index: int,
        text: str | None,
        *,
        reason: FinishReason | None = None,
        extra: Mapping[str, Any] | None = None,
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

    def choice(self, index: int, text: str, reason: FinishReason) -> Json:
        """With a message."""
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "finish_reason": reason}

    def delta(
        self,
        index: int,
        text: str | None,
        *,
        reason: FinishReason | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Json:
        """With a delta, which is empty at the end."""
        content = {} if text is None else {"content": text}
        return {"index": index, "delta": {**content, **(extra or {})}, "finish_reason": reason}

    def opening(self, index: int, extra: Mapping[str, Any]) -> Json:
        """With the role."""
        return self.delta(index, "", extra={"role": "assistant", **extra})


class TextForm(Form):
    """``/v1/completions``."""

    prefix = "cmpl"
    whole = "text_completion"
    piece = "text_completion"

    def choice(self, index: int, text: str, reason: FinishReason) -> Json:
        """With a text."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def delta(
        self,
        index: int,
        text: str | None,
        *,
        reason: FinishReason | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Json:
        """With a text, which is empty at the end."""
        words = {"index": index, "text": text or "", "logprobs": None, "finish_reason": reason}
        return {**words, **(extra or {})}

    def opening(self, index: int, extra: Mapping[str, Any]) -> Json:
        """With an empty text."""
        return self.delta(index, "", extra=extra)
