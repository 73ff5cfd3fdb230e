"""Conversion between texts and tokens: encoding, sampling, decoding, stop strings."""

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
    as_read,
    characters,
    has_response,
)
from sidelight.models.encode import PromptEncoder

# Replacement for bytes that are not, or not yet, a character.
UNFINISHED = "\ufffd"

T = TypeVar("T")


class Detokenizer:
    """Decodes a growing list of tokens into complete characters.

    A token can contain part of a character, and its text can depend on the previous token. Each
    step therefore decodes a short window and returns the new part of its text. Characters that are
    incomplete at the end are never returned.

    Args:
        decode: Function that decodes token ids without special tokens.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._window: list[int] = []
        self._sent_tokens = 0
        self._sent_text = ""

    def push(self, token: int) -> str:
        """Add a token, and return the text that it completes, which may be empty."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(UNFINISHED) or len(text) <= len(self._sent_text):
            return ""
        new = text[len(self._sent_text) :]
        # The next window begins with the tokens just sent, whose text is the context.
        self._window = self._window[self._sent_tokens :]
        self._sent_tokens = len(self._window)
        self._sent_text = self._decode(self._window)
        return new


class StopGate:
    """Passes text up to the first complete stop string, and holds back a possible beginning of one.

    Args:
        stop: Strings that end the text; empty ones are ignored.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(text for text in stop if text)
        self._pending = ""
        self.is_closed = False

    def push(self, text: str) -> str:
        """Add text, and return the part that can be sent now."""
        self._pending += text
        # The first complete stop string counts, so that the result does not depend on the chunks.
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
            # Limited to what is held, because each prefix of a long stop string is copied.
            for length in range(1, min(len(stop), len(self._pending) + 1))
            if self._pending.endswith(stop[:length])
        )
        return self._release(len(self._pending) - max(begun, default=0))

    def flush(self) -> str:
        """The text that is still held back at the end."""
        return "" if self.is_closed else self._release(len(self._pending))

    def _release(self, end: int) -> str:
        passed, self._pending = self._pending[:end], self._pending[end:]
        return passed


# Below this temperature, the division overflows before the choice changes.
_GREEDY_BELOW = 1e-5


class Sampler:
    """Samples tokens by inverting the cumulative distribution at one uniform number per token.

    Each request has its own generator, so its samples do not depend on concurrent requests.
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
        """Sample the id of the next token, on the device of ``logits``."""
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
        """The index at which the cumulative ``weights`` pass a uniform share of the total."""
        cumulative = weights.cumsum(-1)
        uniform = torch.rand((), generator=self._generator, dtype=torch.float64)
        # Apple's GPUs do not support float64.
        target = uniform.float().to(cumulative.device) * cumulative[-1]
        # Clamped, because rounding may raise the target to the total.
        return torch.searchsorted(cumulative, target, right=True).clamp(max=len(weights) - 1)


# Longer texts wait in a separate queue, so that others do not wait for them.
_SHORT_CHARACTERS = 2**14


class TextCodec:
    """Encodes texts within a model's context, and decodes its tokens. The engine closes it.

    Args:
        encoder: Encoder of texts as the model reads them, with its chat template.
    """

    def __init__(self, encoder: PromptEncoder):
        self._encoder = encoder
        self._threads = [
            ThreadPoolExecutor(1, thread_name_prefix=f"sidelight-{kind}-texts")
            for kind in ("short", "long")
        ]

    async def in_thread(self, texts: Sequence[Conversation], encode: Callable[[], T]) -> T:
        """Run ``encode`` for these texts in one of a few threads.

        It is not called for texts that are too long by their characters, nor if the caller has
        gone.

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
        """Stop the threads once they have encoded the waiting texts."""
        for thread in self._threads:
            thread.shutdown()

    def decode(self, tokens: Sequence[int]) -> str:
        """Decode tokens, without special ones."""
        return self._encoder.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def encode(self, text: Conversation, *, with_places: bool = False) -> EncodedPrompt:
        """Encode a text to classify. If the last turn is the assistant's, it is the response.

        Raises:
            ContextLengthError: The text is too long; it is never truncated.
            DisguisedTextError: The policy refuses the text.
        """
        read = as_read(text)
        if has_response(read):
            answer = read[-1].content
            prompt = self._encoder.encode(read[:-1], answer, with_places=with_places)
        else:
            prompt = self._encoder.encode(read, with_places=with_places)
        return prompt.read_from(text)

    def encode_to_continue(
        self, text: Conversation, max_tokens: int | None, *, with_places: bool = False
    ) -> tuple[EncodedPrompt, int]:
        """Encode a text to continue; return it with the number of tokens that can follow, at most
        ``max_tokens``.

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
