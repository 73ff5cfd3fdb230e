"""How OpenAI words a choice: as a chat's message, or as the text of a completion."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from sidelight.engines.events import FinishReason
from sidelight.engines.logprobs import TokenLogprobs
from sidelight.server.choices import Written
from sidelight.server.logprobs import chat_logprobs, text_logprobs

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
