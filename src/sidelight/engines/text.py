"""From texts to tokens and back: encoding, drawing, decoding, stop strings."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sidelight.engines.base import EngineUnavailableError, Sampling
from sidelight.errors import ContextLengthError
from sidelight.models.conversation import (
    Conversation,
    EncodedPrompt,
    PlainText,
    as_read,
    characters,
    has_response,
)
from sidelight.models.encode import PromptEncoder

# What a decoder writes for bytes that are not a character, or not yet.
UNFINISHED = "\ufffd"

T = TypeVar("T")


class Detokenizer:
    """Decodes a growing list of tokens, one whole character at a time.

    A token can hold part of a character, and its text can depend on the token before it. So each
    step decodes a short window and sends what the window shows beyond what was sent. Characters
    that stay unfinished at the end are never sent.

    Args:
        decode: Turns token ids into text, without special tokens.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._window: list[int] = []
        self._sent_tokens = 0
        self._sent_text = ""

    def push(self, token: int) -> str:
        """The text that ``token`` completes; may be empty."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(UNFINISHED) or len(text) <= len(self._sent_text):
            return ""
        new = text[len(self._sent_text) :]
        # The next window begins with the tokens just sent: their text gives the context.
        self._window = self._window[self._sent_tokens :]
        self._sent_tokens = len(self._window)
        self._sent_text = self._decode(self._window)
        return new


class StopGate:
    """Passes text up to the first complete stop string, and holds back what may become one.

    Args:
        stop: Strings that end the text; empty ones are ignored.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(text for text in stop if text)
        self._pending = ""
        self.is_closed = False

    def push(self, text: str) -> str:
        """The part of the text so far that can be sent now."""
        self._pending += text
        # The first one to be complete counts, so that the cut does not depend on the pieces.
        ends = [
            (start + len(stop), start)
            for stop in self._stop
            if (start := self._pending.find(stop)) >= 0
        ]
        if ends:
            self.is_closed = True
            return self._release(min(ends)[1])
        begun = (
            length
            for stop in self._stop
            # No more than is held: each prefix of a long one is copied.
            for length in range(1, min(len(stop), len(self._pending) + 1))
            if self._pending.endswith(stop[:length])
        )
        return self._release(len(self._pending) - max(begun, default=0))

    def flush(self) -> str:
        """The text that is still held back when no more comes."""
        return "" if self.is_closed else self._release(len(self._pending))

    def _release(self, end: int) -> str:
        passed, self._pending = self._pending[:end], self._pending[end:]
        return passed


# Below this, dividing by the temperature overflows before it changes the choice.
_GREEDY_BELOW = 1e-5


class Sampler:
    """Draws tokens by inverting the cumulative distribution at one uniform number per token.

    Each request has its own generator, so what it draws does not depend on the requests beside it.
    """

    def __init__(self, sampling: Sampling):
        self._temperature = sampling.temperature
        self._top_p = sampling.top_p
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def __call__(self, logits: Float[Tensor, " vocabulary"]) -> Int[Tensor, ""]:
        """The next token's id, on the device of ``logits``."""
        if self._temperature < _GREEDY_BELOW:
            return logits.argmax()
        probabilities = torch.softmax(logits.float() / self._temperature, dim=-1)
        if self._top_p >= 1:
            return self._invert(probabilities)
        ranked, token_ids = probabilities.sort(descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked
        nucleus = torch.where(before < self._top_p, ranked, 0.0)
        return token_ids[self._invert(nucleus)]

    def _invert(self, weights: Float[Tensor, " vocabulary"]) -> Int[Tensor, ""]:
        """The index at which the running sum of ``weights`` passes a uniform share of the whole."""
        cumulative = weights.cumsum(-1)
        uniform = torch.rand((), generator=self._generator, dtype=torch.float64)
        # Apple's GPUs have no float64.
        target = uniform.float().to(cumulative.device) * cumulative[-1]
        # Clamped: rounding may lift the target to the sum itself.
        return torch.searchsorted(cumulative, target, right=True).clamp(max=len(weights) - 1)


# Texts of more characters wait in a line of their own, so that others need not wait for them.
_SHORT_CHARACTERS = 2**14


class TextCodec:
    """Encodes texts within a model's context, and decodes its tokens; its engine closes it.

    Args:
        encoder: Turns texts into tokens as the model reads them, within its chat template.
    """

    def __init__(self, encoder: PromptEncoder):
        self._encoder = encoder
        self._threads = [
            ThreadPoolExecutor(1, thread_name_prefix=f"sidelight-{kind}-texts")
            for kind in ("short", "long")
        ]

    async def in_thread(self, texts: Sequence[Conversation], encode: Callable[[], T]) -> T:
        """The result of ``encode`` for these texts, computed in a thread of which there are few.

        It is not called for texts that their length alone refuses, nor if no caller is left.

        Raises:
            ContextLengthError: A text is too long.
            EngineUnavailableError: The codec is closed.
        """
        for text in texts:
            self._encoder.require_few_characters(text)
        is_long = sum(map(characters, texts)) > _SHORT_CHARACTERS
        try:
            result = asyncio.get_running_loop().run_in_executor(self._threads[is_long], encode)
        except RuntimeError as error:
            raise EngineUnavailableError() from error
        return await result

    def close(self) -> None:
        """End its threads, once they have encoded what waits."""
        for thread in self._threads:
            thread.shutdown()

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the tokens, without special ones."""
        return self._encoder.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def encode(self, text: Conversation, *, with_places: bool = False) -> EncodedPrompt:
        """A text to judge. If the last turn is the assistant's, it is the response.

        Raises:
            ContextLengthError: The text is too long; it is never cut.
            DisguisedTextError: The policy refuses it.
        """
        read = as_read(text)
        if isinstance(read, PlainText) or not has_response(read):
            prompt = self._encoder.encode(read, with_places=with_places)
        else:
            answer = read[-1].content
            prompt = self._encoder.encode(read[:-1], answer, with_places=with_places)
        return prompt.read_from(text)

    def encode_to_continue(
        self, text: Conversation, max_tokens: int | None, *, with_places: bool = False
    ) -> tuple[EncodedPrompt, int]:
        """A text to continue, and how many tokens can follow: at most ``max_tokens``.

        Raises:
            ContextLengthError: The text leaves no room for a token.
            DisguisedTextError: The policy refuses the text.
        """
        prompt = self._encoder.encode(as_read(text), with_places=with_places).read_from(text)
        most = self._encoder.max_tokens
        room = most - len(prompt)
        if room < 1:
            raise ContextLengthError(
                f"The prompt has {len(prompt)} tokens with its template, which leaves no room "
                f"for a response: the context length is {most}. Shorten the "
                f"prompt.{self._encoder.more}"
            )
        return prompt, room if max_tokens is None else min(room, max_tokens)
