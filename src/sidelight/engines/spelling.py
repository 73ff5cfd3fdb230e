"""What single tokens stand for, as text and as bytes."""

import re
from collections.abc import Sequence
from typing import Any

from sidelight.engines.detokenizer import UNFINISHED
from sidelight.engines.logprobs import Spelling

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
