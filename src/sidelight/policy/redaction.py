"""Text in which labelled words are replaced by placeholders."""

from collections.abc import Iterable

from sidelight.types import Span


def redacted(text: str, spans: Iterable[Span], *, start: int = 0, end: int | None = None) -> str:
    """Part of a text, with each labelled run of characters replaced by ``[LABEL]``.

    Overlapping spans form one run with the label of the first span. A run that begins before the
    part has its placeholder in an earlier part, so the parts of a text join to the whole.

    Args:
        text: The whole text.
        spans: Spans of the text.
        start: Index of the first character of the part.
        end: Index after the last character; None means the end of the text.
    """
    end = len(text) if end is None else end
    segments: list[str] = []
    written, run_end = start, 0
    for span in sorted(spans, key=lambda span: (span.start, span.label)):
        if span.start >= end:
            break
        if span.start >= max(start, run_end):
            segments += [text[written : span.start], f"[{span.label}]"]
        run_end = max(run_end, span.end)
        written = min(max(written, run_end), end)
    return "".join([*segments, text[written:end]])
