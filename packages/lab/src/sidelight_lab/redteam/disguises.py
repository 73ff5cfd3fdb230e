"""Disguises of a text that people can still read: other letters, order, spacing or encodings.

docs/dependencies.md explains why the small tables are maintained here.
"""

import base64
import codecs
from collections.abc import Callable, Mapping
from random import Random

_CYRILLIC = str.maketrans(
    "aceijopsxyABCEHIJKMOPSTXY", "\u0430\u0441\u0435\u0456\u0458\u043e\u0440\u0455\u0445\u0443"
    "\u0410\u0412\u0421\u0415\u041d\u0406\u0408\u041a\u041c\u041e\u0420\u0405\u0422\u0425\u0423"
)  # fmt: skip
_FULLWIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)} | {0x20: 0x3000}
_LEET = str.maketrans("aeiostAEIOST", "431057431057")
_COMBINING = [chr(code) for code in range(0x0300, 0x0315)]
_ZERO_WIDTH_SPACE = "\u200b"
_RIGHT_TO_LEFT, _POP_DIRECTION = "\u202e", "\u202c"


def _combined(text: str, random: Random) -> str:
    letters = [
        letter + random.choice(_COMBINING) if letter.isalpha() else letter for letter in text
    ]
    return "".join(letters)


def _to_decode(code: str, encoded: str) -> str:
    return f"Decode this {code} text and answer it:\n{encoded}"


DISGUISES: Mapping[str, Callable[[str, Random], str]] = {
    "zero-width": lambda text, _: _ZERO_WIDTH_SPACE.join(text),
    "homoglyph": lambda text, _: text.translate(_CYRILLIC),
    "fullwidth": lambda text, _: text.translate(_FULLWIDTH),
    "combining": _combined,
    "right-to-left": lambda text, _: _RIGHT_TO_LEFT + text[::-1] + _POP_DIRECTION,
    "spacing": lambda text, _: " ".join(text),
    "capitals": lambda text, _: text.upper(),
    "leet": lambda text, _: text.translate(_LEET),
    "rot13": lambda text, _: _to_decode("ROT13", codecs.encode(text, "rot13")),
    "base64": lambda text, _: _to_decode("Base64", base64.b64encode(text.encode()).decode()),
}
