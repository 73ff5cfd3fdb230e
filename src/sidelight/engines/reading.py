"""Texts as tokens within the model's context: what every engine does before it runs them."""

from collections.abc import Sequence
from typing import Any

from sidelight.engines.base import Tokens
from sidelight.errors import ContextLengthError
from sidelight.prompts import Conversation, EncodedPrompt, Message, PlainText, PromptEncoder

# Every probe has to judge it before it is served.
WARM_UP = (Message("user", "Hello"), Message("assistant", "Hello"))


class TextReader:
    """Encodes for one model.

    Args:
        encoder: Of the model.
        tokenizer: Of the model.
        max_tokens: What it reads and writes together.
    """

    def __init__(self, encoder: PromptEncoder, tokenizer: Any, *, max_tokens: int):
        self._encoder = encoder
        self._tokenizer = tokenizer
        self.max_tokens = max_tokens

    def read(self, text: Conversation) -> EncodedPrompt:
        """A text to judge; a last turn of the assistant's is the response.

        Raises:
            ContextLengthError: It is too long; nothing is cut.
        """
        if isinstance(text, PlainText) or not has_response(text):
            prompt = self._encoder.encode(text)
        else:
            prompt = self._encoder.encode(text[:-1], response=text[-1].content)
        self.require_fitting(prompt)
        return prompt

    def tokens(self, text: Conversation) -> Tokens:
        """The same, as the tokenizer writes it."""
        ids = self.read(text).token_ids
        return Tokens(ids, tuple(self._tokenizer.convert_ids_to_tokens(ids)))

    def require_fitting(self, prompt: EncodedPrompt) -> None:
        """Checks that the model can read it.

        Raises:
            ContextLengthError: It is too long.
        """
        if len(prompt) > self.max_tokens:
            raise ContextLengthError(
                f"The text has {len(prompt)} tokens with its template, and this engine judges "
                f"{self.max_tokens} at most. Shorten it, or judge it in parts."
            )

    def room(self, prompt: EncodedPrompt, wanted: int | None) -> int:
        """How many tokens may follow.

        Args:
            prompt: What they follow.
            wanted: Most of them; None: any number.

        Raises:
            ContextLengthError: None.
        """
        room = self.max_tokens - len(prompt)
        if room < 1:
            raise ContextLengthError(
                f"The prompt has {len(prompt)} tokens with its template and fills the context of "
                f"{self.max_tokens}, so nothing can be written. Shorten it."
            )
        return min(room, room if wanted is None else wanted)


def has_response(messages: Sequence[Message]) -> bool:
    """Whether the last turn is the assistant's."""
    return bool(messages) and messages[-1].role == "assistant"
