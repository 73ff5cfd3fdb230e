"""Text whose labelled words are replaced by placeholders."""

import re
from collections.abc import Callable, Iterable, Sequence

from sidelight.types import Span

_PLACEHOLDER = re.compile(r"\[[^\[\]]+_[1-9][0-9]*\]")


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


class Placeholders:
    """Numbered placeholders, such as ``[PERSON_1]``, the same for equal words of a label.

    Letter case and blanks do not tell words apart. Nothing gets a placeholder that a text so far
    has already, such as an answer to a question that was masked.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, dict[str, int]] = {}
        self._taken: set[str] = set()

    def name(self, label: str, words: str) -> str:
        """The placeholder of these words."""
        numbers = self._numbers.setdefault(label, {})
        key = " ".join(words.casefold().split())
        if key not in numbers:
            number = next(reversed(numbers.values()), 0) + 1
            while f"[{label}_{number}]" in self._taken:
                number += 1
            numbers[key] = number
        return f"[{label}_{numbers[key]}]"

    def mask(self, text: str, spans: Sequence[Span]) -> str:
        """The text, in which spans are placeholders."""
        self._taken.update(_PLACEHOLDER.findall(text))
        return redacted(text, spans, name=self.name)
