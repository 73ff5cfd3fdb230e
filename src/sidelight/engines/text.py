"""Turns sampled tokens into text that can be sent: whole characters, stop strings cut away.

What single tokens stand for, as text and as bytes.

Draws the next token of one request.

Texts as tokens within the model's context: what every engine does before it runs them.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sidelight.engines.base import Sampling, Tokens
from sidelight.engines.logprobs import Spelling
from sidelight.errors import ContextLengthError
from sidelight.prompts import Conversation, EncodedPrompt, Message, PlainText, PromptEncoder

# What a decoder writes for bytes that are not yet, or not at all, a character.
UNFINISHED = "\ufffd"


class Detokenizer:
    """Text of a growing list of tokens, one whole character at a time.

    A token may hold part of a character, and its text may depend on the token before it. So each
    step decodes a short window, and sends what the window shows beyond what was sent.
    Characters that stay unfinished at the end are never sent.

    Args:
        decode: Token ids to text, special tokens left out.
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
    """Lets text pass up to the stop string that is complete first; holds back what may become one.

    Args:
        stop: Strings that end the text; empty strings do not count.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(text for text in stop if text)
        self._held = ""
        self.is_closed = False

    def push(self, text: str) -> str:
        """The part of the text so far that can be sent now."""
        self._held += text
        # The one complete first counts, so that the cut does not depend on the pieces of text.
        ends = [
            (start + len(stop), start)
            for stop in self._stop
            if (start := self._held.find(stop)) >= 0
        ]
        if ends:
            self.is_closed = True
            return self._release(min(ends)[1])
        return self._release(len(self._held) - self._overlap())

    def flush(self) -> str:
        """What is still held back, when no more text comes."""
        return "" if self.is_closed else self._release(len(self._held))

    def _release(self, end: int) -> str:
        passed, self._held = self._held[:end], self._held[end:]
        return passed

    def _overlap(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        lengths = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in lengths if self._begins_stop(self._held[-n:])), 0)

    def _begins_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stop)


_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Speller:
    """Spells the tokens of one tokenizer; each once.

    Args:
        tokenizer: Of ``transformers``.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._known: dict[int, Spelling] = {}

    def __call__(self, token: int) -> Spelling:
        """What the token stands for."""
        if token not in self._known:
            self._known[token] = self._spelled(token)
        return self._known[token]

    def _spelled(self, token: int) -> Spelling:
        text = self._decode([token])
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None or token in self._special:
            return Spelling(text, None)
        if UNFINISHED in text:
            return _partial(name, text)
        # Some tokenizers drop the space before the first word: the second one's is kept.
        twice = self._decode([token, token])
        text = twice[len(text) :] if twice.startswith(text) else text
        return Spelling(text, text.encode())

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def _partial(name: str, decoded: str) -> Spelling:
    """A token whose bytes are not whole characters, by what the vocabulary calls it."""
    found = _bytes_of(name)
    if found is None or found.decode(errors="replace") != decoded:
        return Spelling(decoded, None)
    try:
        return Spelling(found.decode(), found)
    except UnicodeDecodeError:
        return Spelling("".join(f"\\x{byte:02x}" for byte in found), found)


def _bytes_of(name: str) -> bytes | None:
    """From a byte token of SentencePiece (``<0xF0>``), or from the letters of GPT-2's bytes."""
    if byte := _BYTE_TOKEN.fullmatch(name):
        return bytes([int(byte[1], 16)])
    if all(letter in _BYTE_OF_LETTER for letter in name):
        return bytes(_BYTE_OF_LETTER[letter] for letter in name)
    return None


def _letters() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are themselves, the others the letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    moved = {chr(0x100 + place): byte for place, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | moved


_BYTE_OF_LETTER = _letters()


# Below this, dividing by the temperature overflows before it changes the choice.
_GREEDY_BELOW = 1e-5


class Sampler:
    """Draws tokens by inverting the cumulative distribution at one uniform number per token.

    The numbers come from a generator of the request's own, so what a request draws does not depend
    on the requests beside it.
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
