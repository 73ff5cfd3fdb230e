"""Characters that nobody can see, and words of two scripts: disguises that a reader overlooks.

Invisible is what Unicode calls default-ignorable (zero-width spaces, soft hyphens, tags, variation
selectors, marks of direction) or a control character, but not where a script or an emoji needs it:
joiners in Arabic and Indic words, zero-width spaces in Thai, selectors after emoji and ideographs,
marks of direction in texts that run from right to left.
"""

import re
from typing import Literal

from sidelight.errors import DisguisedTextError

Invisible = Literal["off", "strip", "refuse", "refuse_mixed_scripts"]
"""What happens to invisible characters before a text is read; the last also refuses words that mix
scripts."""

# Scripts whose letters take joiners: Arabic to Mandaic, Indic to Sinhala, Tibetan, Myanmar, Khmer
# and Mongolian, and their extensions.
_JOINED = (
    "\u0600-\u061b\u061d-\u08ff\u0900-\u0dff\u0f00-\u0fff\u1000-\u109f\u1780-\u17b3\u17b6-\u180a"
    "\u1810-\u18af\ua840-\ua95f\ufb50-\ufdff\ufe70-\ufefc\U00011000-\U0001193f"
)
# Scripts without blanks between words: Thai, Lao, Tibetan, Myanmar, Khmer, kana and Han.
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17b3\u17b6-\u17ff\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
)
_HAN = (
    "\u3000-\u303f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uff9f\uffa1-\uffef"
    "\U00020000-\U000323af"
)
_PICTURES = (
    "\u00a9\u00ae\u203c\u2049\u2122\u2139\u2190-\u2bff\u3030\u303d\u3297\u3299\U0001f000-\U0001faff"
)
_RIGHT_TO_LEFT = (
    "\u0590-\u061b\u061d-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff"
)
# The flags of England, Scotland and Wales are the only ones that are spelt in tags.
_FLAGS = "|".join(
    "\U0001f3f4" + "".join(chr(0xE0000 + ord(letter)) for letter in code) + "\U000e007f"
    for code in ("gbeng", "gbsct", "gbwls")
)
_ALWAYS = (
    # Controls without those that are blanks or end lines, and overrides of the direction.
    "\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u034f\u115f\u1160\u17b4\u17b5\u202d\u202e"
    "\u2060-\u2065\u206a-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"
)
# Marks and embeddings of direction, and isolates.
_DIRECTIONS = "\u061c\u200e\u200f\u202a-\u202c\u2066-\u2069"
_AFTER_PICTURE = rf"(?<=[{_PICTURES}])|(?<=[{_PICTURES}]\ufe0f)"
_UNNEEDED = (
    rf"[{_ALWAYS}]+",
    rf"(?<![{_UNSPACED}])\u200b|\u200b(?![{_UNSPACED}])",
    rf"(?<![{_JOINED}])\u200c",
    # Between two pictures, or after a letter that takes it.
    rf"(?<![{_JOINED}])(?!(?:{_AFTER_PICTURE})\u200d[{_PICTURES}])\u200d",
    rf"(?<![{_PICTURES}0-9#*])[\ufe0e\ufe0f]|(?<=[0-9#*])[\ufe0e\ufe0f](?!\u20e3)",
    rf"(?<![{_HAN}\u2200-\u22ff\u1000-\u109f\ua840-\ua87f])[\ufe00-\ufe0d]",
    rf"(?<![{_HAN}])[\U000e0100-\U000e01ef]",
    r"(?<![\u1800-\u180a\u1810-\u18af])[\u180b-\u180f]",
)
_SUSPECTS = rf"{_ALWAYS}\u200b-\u200d\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef"
_ANY_DIRECTION = rf"[{_DIRECTIONS}]+"
# In a text that runs from right to left, only inside a word of another script.
_OTHER = rf"[^\W{_RIGHT_TO_LEFT}]|[{_SUSPECTS}]"
_INSIDE_WORD = rf"(?<={_OTHER})[{_DIRECTIONS}]+(?={_OTHER})"
_RUNS_LEFT = re.compile(f"[{_RIGHT_TO_LEFT}]")
# Whatever may be invisible: all other characters are passed at once.
_SUSPECT = re.compile(f"[{_SUSPECTS}{_DIRECTIONS}]")
_INVISIBLE, _INVISIBLE_BESIDE_RTL = (
    re.compile(f"({_FLAGS})|(?=[{_SUSPECTS}{_DIRECTIONS}])(?:{'|'.join((*_UNNEEDED, own))})")
    for own in (_ANY_DIRECTION, _INSIDE_WORD)
)
# Letters of scripts that have look-alikes in each other; of Greek these alone, since formulas mix.
_SCRIPTS = (
    "A-Za-z\u00aa\u00ba\u00c0-\u024f\u1e00-\u1eff",
    "\u0391\u0392\u0395-\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7\u03b1\u03b3"
    "\u03b9\u03ba\u03bd\u03bf\u03c1\u03c4\u03c5\u03c7\u03f2\u03f3\u03f9",
    "\u0400-\u052f\u1c80-\u1c8f\u2de0-\u2dff\ua640-\ua69f",
    "\u0530-\u058f",
    "\u13a0-\u13ff\uab70-\uabbf",
)
_NOT_LATIN = re.compile(f"[{''.join(_SCRIPTS[1:])}]")
_MIXED = re.compile("|".join(f"[{own}](?=[{''.join(_SCRIPTS)}])[^{own}]" for own in _SCRIPTS))


def visible(text: str) -> str:
    """The text without its invisible characters; a second time changes nothing."""
    return _pattern(text).sub(r"\1", text) if _SUSPECT.search(text) else text


def holds_invisible(text: str) -> bool:
    return visible(text) != text


def visible_places(text: str) -> list[int]:
    """Where each character of ``visible(text)`` stands in ``text``."""
    places: list[int] = []
    end = 0
    for match in _pattern(text).finditer(text):
        if match[1] is None:
            places += range(end, match.start())
            end = match.end()
    return [*places, *range(end, len(text))]


def mixes_scripts(text: str) -> bool:
    """Whether a word has letters of two scripts that resemble each other, as Latin and Cyrillic."""
    return bool(_NOT_LATIN.search(text) and _MIXED.search(visible(text)))


def require_plain_sight(text: str, invisible: Invisible) -> None:
    """Refuses a text that is disguised.

    Raises:
        DisguisedTextError: It has invisible characters, or words of two scripts, whichever of them
            are refused; ``strip`` refuses nothing.
    """
    if invisible in ("refuse", "refuse_mixed_scripts") and holds_invisible(text):
        raise DisguisedTextError(
            "The text holds characters that nobody can see, such as zero-width spaces, which the "
            "server's policy refuses. Remove them."
        )
    if invisible == "refuse_mixed_scripts" and mixes_scripts(text):
        raise DisguisedTextError(
            "The text holds words with letters of two scripts that resemble each other, such as "
            "Latin and Cyrillic, which the server's policy refuses. Write each word in one script.",
            code="mixed_scripts",
        )


def _pattern(text: str) -> re.Pattern[str]:
    return _INVISIBLE_BESIDE_RTL if _RUNS_LEFT.search(text) else _INVISIBLE
