"""Invisible characters and mixed-script words, which hide an attack from classifiers.

A character is invisible if Unicode calls it default-ignorable (zero-width spaces, soft hyphens,
tags, variation selectors, direction marks) or a control character. It is kept where a script or an
emoji needs it: joiners in Persian and Indic words, zero-width spaces in Thai, selectors after emoji
and ideographs, direction marks in right-to-left text.
"""

import re
from typing import Literal

from sidelight.errors import DisguisedTextError

Invisible = Literal["off", "strip", "refuse", "refuse_mixed_scripts"]
"""How invisible characters are handled; the last value also refuses mixed-script words."""

# Cursive scripts, where a joiner changes the form of a letter: Arabic to Mandaic, and Mongolian.
_SHAPED = (
    "\u0600-\u061b\u061d-\u08ff\u1820-\u18aa\ufb50-\ufdff\ufe70-\ufefc"
    "\U00010d00-\U00010d27\U0001e900-\U0001e94b"
)
# Viramas and register shifters, Devanagari to Khmer: joiners next to them select a conjunct.
_VIRAMAS = (
    "\u094d\u09cd\u0a4d\u0acd\u0b4d\u0bcd\u0c4d\u0ccd\u0d3b\u0d3c\u0d4d\u0dca\u0f84\u1039\u103a"
    "\u17d2\u1a60\u1b44\ua806\ua8c4\ua9c0\uaaf6\U00011046\U0001107f\U000110b9\U00011133"
    "\u17c9\u17ca\U0001134d\U00011235\U000112ea\U00011442\U000114c2\U000115bf\U0001163f\U000116b6\U00011839\U0001193e"
)
# Scripts without spaces, where a zero-width space separates words: Thai, Lao, Myanmar, Khmer,
# Javanese and related ones.
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17b3\u17b6-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1bbf"
    "\ua980-\ua9ff\uaa00-\uaa7f"
)
# Bases of variation selectors: ideographs, and the entries of Unicode's StandardizedVariants.
_IDEOGRAPHS = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003347f"
_VARIED = (
    "0\u3001\u3002\uff01\uff0c\uff0e\uff10\uff1a\uff1b\uff1f\u210b-\u2133\u2200-\u22ff\u2a00-\u2aff"
    "\U0001d49c-\U0001d4cf\u1000-\u109f\uaa60-\uaa7f\ua840-\ua87f"
)
_PICTURES = (
    "\u00a9\u00ae\u203c\u2049\u2122\u2139\u2190-\u2bff\u3030\u303d\u3297\u3299\U0001f000-\U0001faff"
)
_RIGHT_TO_LEFT = (
    "\u0590-\u061b\u061d-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff"
)
# Only the flags of England, Scotland and Wales are written with tags.
_FLAGS = "|".join(
    "\U0001f3f4" + "".join(chr(0xE0000 + ord(letter)) for letter in code) + "\U000e007f"
    for code in ("gbeng", "gbsct", "gbwls")
)
_ALWAYS = (
    # Control characters except tabs and line or page breaks, and direction overrides.
    "\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u034f\u115f\u1160\u17b4\u17b5\u202d\u202e"
    "\u2060-\u2065\u206a-\u206f\u3164\ufeff\uffa0\ufff0-\ufffc\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"
)
# Direction marks, embeddings and isolates.
_DIRECTIONS = "\u061c\u200e\u200f\u202a-\u202c\u2066-\u2069"
_SUSPECTS = rf"{_ALWAYS}\u200b-\u200d\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef"
# Accents and vowel points, which are part of a word too.
_DIACRITICS = "\u0300-\u036f\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u064b-\u065f\u0670"
_WORD_CHARACTER = rf"\w|[{_SUSPECTS}{_DIACRITICS}]"
_NO_EDGE = rf"{_WORD_CHARACTER}|[{_DIRECTIONS}]"
_JOINS = "|".join(
    (
        rf"(?:(?<=[{_PICTURES}])|(?<=[{_PICTURES}]\ufe0f))\u200d[{_PICTURES}]",
        rf"(?<=[{_VIRAMAS}])\u200d|\u200d[{_VIRAMAS}]",
        # At a word boundary, a joiner keeps the medial form of a cursive letter.
        rf"(?<=[{_SHAPED}])\u200d(?!{_NO_EDGE})|(?<!{_NO_EDGE})\u200d[{_SHAPED}]",
    )
)
_UNNEEDED = (
    rf"[{_ALWAYS}]+",
    rf"(?<![{_UNSPACED}])\u200b+(?![{_UNSPACED}\u200b])",
    # Persian endings follow words of other scripts, digits and quotes too.
    rf"(?<![{_SHAPED}{_VIRAMAS}])\u200c(?![{_VIRAMAS}]|(?<=[^{_SUSPECTS}{_DIRECTIONS}]\u200c)[\u0620-\u06ff])",
    rf"(?!{_JOINS})\u200d",
    rf"(?<![{_PICTURES}0-9#*])[\ufe0e\ufe0f]+|(?<=[0-9#*])[\ufe0e\ufe0f](?!\u20e3)",
    rf"(?<![{_IDEOGRAPHS}{_VARIED}])[\ufe00-\ufe02]+|[\ufe03-\ufe0d]+",
    rf"(?<![{_IDEOGRAPHS}])[\U000e0100-\U000e011f]+|[\U000e0120-\U000e01ef]+",
    r"(?<![\u1800-\u180a\u1810-\u18af])[\u180b-\u180f]+",
)
_ANY_DIRECTION = rf"[{_DIRECTIONS}]+"
# In a text that runs from right to left, only inside a word.
_INSIDE_WORD = rf"(?<={_WORD_CHARACTER})[{_DIRECTIONS}]+(?={_WORD_CHARACTER})"
_RUNS_LEFT = re.compile(f"[{_RIGHT_TO_LEFT}]")
# Characters that may be invisible. A text without any is returned unchanged.
_SUSPECT = re.compile(f"[{_SUSPECTS}{_DIRECTIONS}]")
_INVISIBLE, _INVISIBLE_BESIDE_RTL = (
    re.compile(f"({_FLAGS})|(?=[{_SUSPECTS}{_DIRECTIONS}])(?:{'|'.join((*_UNNEEDED, needless))})")
    for needless in (_ANY_DIRECTION, _INSIDE_WORD)
)
# Letters of scripts with look-alikes in each other; only these of Greek, because formulas mix
# scripts.
_SCRIPTS = (
    "A-Za-z\u00aa\u00ba\u00c0-\u024f\u1e00-\u1eff",
    "\u0391\u0392\u0395-\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7\u03b1\u03b3"
    "\u03b9\u03ba\u03bd\u03bf\u03c1\u03c4\u03c5\u03c7\u03f2\u03f3\u03f9",
    "\u0400-\u052f\u1c80-\u1c8f\u2de0-\u2dff\ua640-\ua69f",
    "\u0530-\u058f",
    "\u13a0-\u13ff\uab70-\uabbf",
)
_NOT_LATIN = re.compile(f"[{''.join(_SCRIPTS[1:])}]")
_MIXED = re.compile(
    "|".join(f"[{needless}](?=[{''.join(_SCRIPTS)}])[^{needless}]" for needless in _SCRIPTS)
)


def visible(text: str) -> str:
    """The text without its invisible characters; idempotent."""
    return _pattern(text).sub(r"\1", text) if _SUSPECT.search(text) else text


def holds_invisible(text: str) -> bool:
    return visible(text) != text


def visible_places(text: str) -> list[int]:
    """The index in ``text`` of each character of ``visible(text)``."""
    places: list[int] = []
    end = 0
    for match in _pattern(text).finditer(text):
        if match[1] is None:
            places += range(end, match.start())
            end = match.end()
    return [*places, *range(end, len(text))]


def mixes_scripts(text: str) -> bool:
    """Whether a word mixes scripts with look-alike letters, such as Latin and Cyrillic."""
    return bool(_NOT_LATIN.search(text) and _MIXED.search(visible(text)))


def reject_disguises(text: str, invisible: Invisible, *, can_strip: bool = True) -> None:
    """Check that a text has no disguise that the policy refuses.

    Args:
        text: The text.
        invisible: How the policy handles invisible characters.
        can_strip: Whether the caller strips them; if not, ``strip`` refuses them too.

    Raises:
        DisguisedTextError: The text has invisible characters or mixed-script words.
    """
    is_refused = invisible in ("refuse", "refuse_mixed_scripts")
    if (is_refused or (invisible == "strip" and not can_strip)) and holds_invisible(text):
        raise DisguisedTextError(
            "The text contains invisible characters, such as zero-width spaces, which the "
            "server's policy refuses. Remove them."
        )
    if invisible == "refuse_mixed_scripts" and mixes_scripts(text):
        raise DisguisedTextError(
            "The text contains words that mix look-alike letters of several scripts, such as "
            "Latin and Cyrillic, which the server's policy refuses. Write each word in one "
            "script.",
            code="mixed_scripts",
        )


def _pattern(text: str) -> re.Pattern[str]:
    return _INVISIBLE_BESIDE_RTL if _RUNS_LEFT.search(text) else _INVISIBLE
