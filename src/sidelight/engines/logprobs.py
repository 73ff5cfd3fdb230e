"""The log-probabilities of the tokens that were written and of the likeliest alternatives.

They are those of the model's own distribution, before temperature and ``top_p``.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

# What OpenAI reports for "very unlikely"; JSON has no minus infinity.
LOWEST = -9999.0
# What a decoder writes for bytes that are not a character, or not yet.
UNFINISHED = "\ufffd"

TokenScore = tuple[int, float]
"""A token id and its log-probability."""


@dataclass(frozen=True)
class Spelling:
    r"""What a token stands for.

    Attributes:
        text: The characters; ``\xf0\x9f`` for a token that is only a part of one.
        bytes: What it adds to a text; None if the tokenizer does not say, and for a special token,
            which adds nothing.
    """

    text: str
    bytes: bytes | None

    @property
    def is_partial(self) -> bool:
        """Whether it is part of a character, so that ``text`` only describes it."""
        return self.bytes is not None and self.text.encode() != self.bytes


@dataclass(frozen=True)
class Candidate:
    """A token that was written, or could have been, with its log-probability (natural)."""

    spelling: Spelling
    logprob: float


@dataclass(frozen=True)
class TokenLogprobs:
    """One token of a text.

    Attributes:
        drawn: The token.
        likeliest: The most probable tokens at its place, best first.
        offset: Characters of the text before it.
    """

    drawn: Candidate
    likeliest: tuple[Candidate, ...]
    offset: int


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
