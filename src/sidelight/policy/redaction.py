"""Text in which labelled words are replaced by placeholders."""

from collections.abc import Iterable

from sidelight.types import Span


def redacted(text: str, spans: Iterable[Span], *, start: int = 0, end: int | None = None) -> str:
    """Part of a text, in which each labelled run of characters is ``[LABEL]``.

    Overlapping spans are one run, with the label of the first. A run that begins before the part
    has its placeholder there, so the parts of a text join to the whole.

    Args:
        text: The whole.
        spans: Of the text.
        start: The first character of the part.
        end: The one after the last; None: that of the text.
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
