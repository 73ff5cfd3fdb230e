"""Text whose labelled words are replaced by placeholders."""

import re
import secrets
import unicodedata
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain
from operator import itemgetter
from typing import Literal

from sidelight.types import Span

_PLACEHOLDER = re.compile(r"\[([^\[\]]+)_0*([1-9][0-9]*)\]")
# Unicode's Default_Ignorable_Code_Point.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff]"
)
# Sorting the accents of one letter takes quadratic time.
_NORMALISED_AT_ONCE = 100

# A label and its words, folded; a label and a number that stand in a text.
_Words = tuple[str, str]
_Literal = tuple[str, str]


def redacted(
    text: str,
    spans: Iterable[Span],
    *,
    start: int = 0,
    end: int | None = None,
    name: Callable[[str, str], str] = lambda label, _: f"[{label}]",
) -> str:
    """Part of a text, in which each labelled run of characters is a placeholder.

    Overlapping spans are one run, with the label of the first. A run that begins before the part
    has its placeholder there, so the parts of a text join to the whole.

    Args:
        text: The whole.
        spans: Of the text.
        start: The first character of the part.
        end: The one after the last; None: that of the text.
        name: Gives the placeholder of a label and the words that have it.
    """
    end = len(text) if end is None else end
    pieces: list[str] = []
    written = start
    for first, last, label in _runs(spans):
        if first >= end:
            break
        if first >= start:
            pieces += [text[written:first], name(label, text[first:last])]
        written = min(max(written, last), end)
    return "".join([*pieces, text[written:end]])


def _runs(spans: Iterable[Span]) -> list[tuple[int, int, str]]:
    """The first and last character of each run of overlapping spans, and its label."""
    runs: list[tuple[int, int, str]] = []
    for span in sorted(spans, key=lambda span: (span.start, span.label)):
        if runs and span.start < runs[-1][1]:
            first, last, label = runs[-1]
            runs[-1] = first, max(last, span.end), label
        else:
            runs.append((span.start, span.end, span.label))
    return runs


def without_placeholders(text: str, spans: Iterable[Span], labels: Iterable[str]) -> list[Span]:
    """The spans of a text, of which placeholders of these labels are no part.

    A probe may take them for names. What looks like one and is longer could hide a value.
    """
    names = "|".join(map(re.escape, labels))
    written = re.finditer(rf"\[(?:{names})_(?:[1-9][0-9]{{0,3}}|[a-f][0-9a-f]{{7}})\]", text)
    edges = [match.span() for match in written]
    kept: list[Span] = []
    for span in spans:
        first = bisect_right(edges, span.start, key=itemgetter(1))
        inside = edges[first : bisect_left(edges, span.end, key=itemgetter(0))]
        bounds = [span.start, *chain.from_iterable(inside), span.end]
        for start, end in zip(bounds[::2], bounds[1::2], strict=True):
            words = text[start:end].strip() if inside else text[start:end]
            # Beside a placeholder there may be marks alone.
            if not inside or not all(map(_is_mark, words)):
                start = text.index(words, start)
                kept.append(replace(span, start=start, end=start + len(words)))
    return kept


class Placeholders:
    """Placeholders such as ``[PERSON_1]``, the same for equal words of a label.

    Letter case, blanks and Unicode's normal forms do not tell words apart. All texts are read
    first, in order: words that have the placeholder of a text get another one, unless the model
    wrote it first. It repeats what it has read in an earlier turn, where the same words had it.

    Args:
        is_answer: Whether the texts answer a prompt that is unknown, with placeholders and answers
            before it. Then random numbers tell placeholders apart: ``[PERSON_c386d081]``.
    """

    def __init__(self, *, is_answer: bool = False) -> None:
        self._is_answer = is_answer
        self._numbers: dict[_Words, str] = {}
        self._words: dict[_Literal, _Words] = {}
        self._literals: set[_Literal] = set()
        self._last: Counter[str] = Counter()

    def read(self, text: str, spans: Iterable[Span] = (), *, is_written: bool = False) -> None:
        """Numbers the labelled words of the next text.

        Args:
            text: The text.
            spans: Of the text.
            is_written: Whether the model wrote it, having read the texts before.
        """
        literals = dict.fromkeys(_PLACEHOLDER.findall(_folded(text)))
        new = [literal for literal in literals if literal not in self._literals]
        self._literals.update(new)
        if not is_written:
            for words in [self._words.pop(each) for each in new if each in self._words]:
                self._number(words)
        for start, end, label in _runs(spans):
            if (words := _words(label, text[start:end])) not in self._numbers:
                self._number(words)

    def mask(self, text: str, spans: Iterable[Span]) -> str:
        """A text that was read, in which spans are placeholders."""

        def name(label: str, words: str) -> str:
            return f"[{label}_{self._numbers[_words(label, words)]}]"

        return redacted(text, spans, name=name)

    def _number(self, words: _Words) -> None:
        if self._is_answer:
            # Eight digits of base 16, of which the first is a letter.
            self._numbers[words] = f"{secrets.randbelow(6 << 28) + (10 << 28):x}"
            return
        label = _folded(words[0])
        self._last[label] += 1
        while (label, str(self._last[label])) in self._literals:
            self._last[label] += 1
        self._numbers[words] = number = str(self._last[label])
        self._words[label, number] = words


def _is_mark(character: str) -> bool:
    """Whether it is a blank, or punctuation that spells nothing, as circled letters do."""
    if character.isascii():
        return not character.isalnum()
    return character.isspace() or unicodedata.category(character).startswith("P")


def _words(label: str, words: str) -> _Words:
    return label, " ".join(_normalised("NFD", _normalised("NFD", words).casefold()).split())


def _folded(text: str) -> str:
    """The text, of which letters that look alike are alike, without those that nobody sees."""
    return _normalised("NFKD", _INVISIBLE.sub("", text)).casefold()


def _normalised(form: Literal["NFD", "NFKD"], text: str) -> str:
    starts = range(0, len(text), _NORMALISED_AT_ONCE)
    parts = (text[start : start + _NORMALISED_AT_ONCE] for start in starts)
    return "".join(unicodedata.normalize(form, part) for part in parts)
