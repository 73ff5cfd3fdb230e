"""From texts to tokens and back: encoding, drawing, decoding, stop strings, log-probabilities."""

import asyncio
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sidelight.engines.base import Candidate, Sampling, Spelling, TokenLogprobs, Tokens
from sidelight.errors import ContextLengthError
from sidelight.prompts import (
    Conversation,
    EncodedPrompt,
    Message,
    Place,
    PlainText,
    PromptEncoder,
    characters,
    has_response,
)

# What OpenAI reports for "very unlikely"; JSON has no minus infinity.
LOWEST = -9999.0
# What a decoder writes for bytes that are not a character, or not yet.
UNFINISHED = "\ufffd"

T = TypeVar("T")
TokenScore = tuple[int, float]
"""A token id and its log-probability."""


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
        self._held = ""
        self.is_closed = False

    def push(self, text: str) -> str:
        """The part of the text so far that can be sent now."""
        self._held += text
        # The first one to be complete counts, so that the cut does not depend on the pieces.
        ends = [
            (start + len(stop), start)
            for stop in self._stop
            if (start := self._held.find(stop)) >= 0
        ]
        if ends:
            self.is_closed = True
            return self._release(min(ends)[1])
        begun = (
            length
            for stop in self._stop
            for length in range(1, len(stop))
            if self._held.endswith(stop[:length])
        )
        return self._release(len(self._held) - max(begun, default=0))

    def flush(self) -> str:
        """What is still held back when no more text comes."""
        return "" if self.is_closed else self._release(len(self._held))

    def _release(self, end: int) -> str:
        passed, self._held = self._held[:end], self._held[end:]
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
        kept = torch.where(before < self._top_p, ranked, 0.0)
        return token_ids[self._invert(kept)]

    def _invert(self, weights: Float[Tensor, " vocabulary"]) -> Int[Tensor, ""]:
        """The index at which the running sum of ``weights`` passes a uniform share of the whole."""
        cumulative = weights.double().cumsum(-1)
        uniform = torch.rand((), generator=self._generator, dtype=torch.float64)
        target = uniform.to(cumulative.device) * cumulative[-1]
        # Clamped: rounding may lift the target to the sum itself.
        return torch.searchsorted(cumulative, target, right=True).clamp(max=len(weights) - 1)


def likeliest_tokens(
    logits: Float[Tensor, " vocabulary"], token: int, *, count: int
) -> tuple[TokenScore, list[TokenScore]]:
    """The scores of the drawn token and of the ``count`` likeliest, each at least ``LOWEST``."""
    logprobs = torch.log_softmax(logits.float(), dim=-1).clamp(min=LOWEST)
    best = logprobs.topk(min(count, len(logprobs)))
    likeliest = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return (token, logprobs[token].item()), [*likeliest]


class LogprobStream:
    """Sends the tokens of a growing text, each with the text that it contributes to.

    Text that may still become a stop string, or is half a character, is held back, and so are its
    tokens.

    Args:
        spell: Says what a token stands for.
    """

    def __init__(self, spell: Callable[[int], Spelling]):
        self._spell = spell
        self._waiting: list[TokenLogprobs] = []
        self._length = 0
        self._sent = 0

    def add(self, drawn: TokenScore, likeliest: Iterable[TokenScore], *, characters: int) -> None:
        """Takes a token that completes this many characters."""
        token, *others = (Candidate(self._spell(t), score) for t, score in (drawn, *likeliest))
        # A whole token's characters are the last ones; they may follow a character it completes.
        spelling = token.spelling
        text = 0 if spelling.is_partial else min(characters, len(spelling.text))
        offset = self._length + (characters - text if text else 0)
        self._waiting.append(TokenLogprobs(token, tuple(others), offset))
        self._length += characters

    def send(self, characters: int) -> tuple[TokenLogprobs, ...]:
        """The tokens that go with the next ``characters`` of the text."""
        self._sent += characters
        due = tuple(token for token in self._waiting if token.offset < self._sent)
        self._waiting = self._waiting[len(due) :]
        return due

    def rest(self) -> tuple[TokenLogprobs, ...]:
        """The tokens that are left when the text ends by itself: parts of a character."""
        return tuple(self._waiting)


_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_BYTE_OF_LETTER = {letter: byte for byte, letter in bytes_to_unicode().items()}


class Speller:
    """Spells the tokens of one ``transformers`` tokenizer, each once."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._known: dict[int, Spelling] = {}

    def __call__(self, token: int) -> Spelling:
        if token not in self._known:
            self._known[token] = self._spell(token)
        return self._known[token]

    def _spell(self, token: int) -> Spelling:
        text = self._decode([token])
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None or token in self._special:
            return Spelling(text, None)
        if UNFINISHED in text:
            return _spell_part(name, text)
        # Some tokenizers drop the space before the first word; the second one's is kept.
        twice = self._decode([token, token])
        text = twice[len(text) :] if twice.startswith(text) else text
        return Spelling(text, text.encode())

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def _spell_part(name: str, decoded: str) -> Spelling:
    """Spells a token whose bytes are not whole characters, by its name in the vocabulary.

    The name is a byte token of SentencePiece (``<0xF0>``), or spells bytes in GPT-2's alphabet.
    """
    if byte := _BYTE_TOKEN.fullmatch(name):
        found = bytes([int(byte[1], 16)])
    elif all(letter in _BYTE_OF_LETTER for letter in name):
        found = bytes(_BYTE_OF_LETTER[letter] for letter in name)
    else:
        return Spelling(decoded, None)
    if found.decode(errors="replace") != decoded:
        return Spelling(decoded, None)
    try:
        return Spelling(found.decode(), found)
    except UnicodeDecodeError:
        return Spelling("".join(f"\\x{byte:02x}" for byte in found), found)


# Texts of more characters wait in a line of their own, so that others need not wait for them.
_SHORT_CHARACTERS = 2**14

# Every probe must judge it before it is served.
WARM_UP = (Message("user", "Hello"), Message("assistant", "Hello"))


class TextCodec:
    """Encodes texts within a model's context, and decodes its tokens.

    Args:
        encoder: Turns texts into tokens as the model reads them, within its chat template.
        tokenizer: Turns tokens back into text; the model's own, from transformers.
        max_tokens: The most tokens that the model reads and writes together.
    """

    def __init__(self, encoder: PromptEncoder, tokenizer: Any, *, max_tokens: int):
        self._encoder = encoder
        self._tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.spell = Speller(tokenizer)
        self._threads = [
            ThreadPoolExecutor(1, thread_name_prefix=f"sidelight-{kind}-texts")
            for kind in ("short", "long")
        ]

    async def in_thread(self, texts: Sequence[Conversation], encode: Callable[[], T]) -> T:
        """What ``encode`` makes of these texts, in a thread of which there are few.

        It is not called for texts that their length alone refuses, nor if nobody waits any more.

        Raises:
            ContextLengthError: A text is too long.
        """
        for text in texts:
            self._encoder.require_few_characters(text)
        is_long = sum(map(characters, texts)) > _SHORT_CHARACTERS
        return await asyncio.get_running_loop().run_in_executor(self._threads[is_long], encode)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the tokens, without special ones."""
        return self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def encode(self, text: Conversation) -> EncodedPrompt:
        """A text to judge. If the last turn is the assistant's, it is the response.

        Raises:
            ContextLengthError: The text is too long; it is never cut.
        """
        prompt = self._encoder.encode(*_with_response(text))
        self.require_within_context(prompt)
        return prompt

    def places(self, text: Conversation) -> list[Place | None]:
        """Where each token of ``encode`` stands in the messages."""
        return self._encoder.places(*_with_response(text))

    def encode_to_continue(
        self, text: Conversation, max_tokens: int | None
    ) -> tuple[EncodedPrompt, int]:
        """A text to continue, and how many tokens can follow: at most ``max_tokens``.

        Raises:
            ContextLengthError: The text leaves no room for a token.
        """
        prompt = self._encoder.encode(text)
        room = self.max_tokens - len(prompt)
        if room < 1:
            raise ContextLengthError(
                f"The prompt has {len(prompt)} tokens with its template, which leaves no room for "
                f"an answer: the context has {self.max_tokens}. Shorten it."
            )
        return prompt, room if max_tokens is None else min(room, max_tokens)

    def tokens(self, text: Conversation) -> Tokens:
        """The tokens of ``encode``, with their texts."""
        ids = self.encode(text).token_ids
        return Tokens(ids, tuple(self._tokenizer.convert_ids_to_tokens(ids)))

    def require_within_context(self, prompt: EncodedPrompt) -> None:
        """Checks that the model can read the prompt.

        ``encode`` calls it; so does vLLM's engine, for prompts that its caller has encoded.

        Raises:
            ContextLengthError: It is too long.
        """
        if len(prompt) > self.max_tokens:
            raise ContextLengthError(
                f"The text has {len(prompt)} tokens with its template, but this engine judges "
                f"{self.max_tokens} at most. Shorten it, or judge it in parts."
            )


def _with_response(text: Conversation) -> tuple[Conversation, str | None]:
    """The turns before the response, and the response, if the text ends with one."""
    if isinstance(text, PlainText) or not has_response(text):
        return text, None
    return text[:-1], text[-1].content
