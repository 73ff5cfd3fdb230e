"""Spans that a rule ignores, such as product names, public figures and codes."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sidelight.errors import SidelightError, how_to_install
from sidelight.types import Span


@dataclass(frozen=True)
class Ignore:
    """Spans that do not count, regardless of their label.

    An entry has to be the whole span: "Ann" does not ignore "Ann Lee".

    Attributes:
        words: Texts of spans, ignoring case and the kind of whitespace.
        patterns: Regular expressions in RE2's syntax, which take time linear in the text.
        file: File of more words, one per line; relative to the policy's folder.
    """

    words: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    file: Path | None = None

    def covers(self, span: Span) -> bool:
        """Whether an entry matches the whole span."""
        text = _normalised(span.words)
        if text.casefold() in self._words:
            return True
        return any(pattern.fullmatch(text) is not None for pattern in self._patterns)

    def read(self, folder: Path) -> "Ignore":
        """Read the words of the file, and check the patterns.

        Args:
            folder: Folder that the file's path is relative to.

        Raises:
            SidelightError: The file cannot be read, or a pattern is not valid or matches an empty
                text.
        """
        words = self.words
        if self.file is not None:
            path = folder / self.file
            try:
                words += tuple(path.read_text("utf-8-sig").splitlines())
            except (OSError, UnicodeDecodeError) as error:
                raise SidelightError(
                    f"Cannot read {path}, a list of words that a rule ignores: {error}. Name a "
                    "UTF-8 text file with one entry per line."
                ) from error
        complete = replace(self, words=words, file=None)
        for source, pattern in zip(self.patterns, complete._patterns, strict=True):
            if pattern.fullmatch("") is not None:
                raise SidelightError(
                    f"The pattern '{source}' under 'ignore' also matches an empty text, so it "
                    "could match anywhere. Write a pattern that requires at least one character."
                )
        return complete

    @cached_property
    def _words(self) -> frozenset[str]:
        return frozenset(_normalised(word).casefold() for word in self.words) - {""}

    @cached_property
    def _patterns(self) -> list[Any]:
        return [_compiled(source) for source in self.patterns]


def split(spans: Iterable[Span], ignore: Ignore) -> tuple[list[Span], list[Span]]:
    """Split spans into those that count and those that are ignored."""
    counted: list[Span] = []
    ignored: list[Span] = []
    for span in spans:
        (ignored if ignore.covers(span) else counted).append(span)
    return counted, ignored


def _normalised(text: str) -> str:
    return " ".join(text.split())


def _compiled(source: str) -> Any:
    # Not `re`, whose patterns can take exponential time and would block every other request.
    try:
        import re2
    except ImportError as error:
        raise SidelightError(
            "Patterns under 'ignore' need google-re2, which is not installed. "
            f"{how_to_install('.[serve]')}"
        ) from error
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(source, options)
    except re2.error as error:
        reason = error.args[0].decode() if isinstance(error.args[0], bytes) else error
        raise SidelightError(
            f"'{source}' under 'ignore' is not a valid RE2 pattern: {reason}. RE2 supports "
            "neither look-around nor back-references."
        ) from error
