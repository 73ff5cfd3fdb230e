"""Texts whose characters are labelled: one column has a list of spans."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import SupportsIndex, cast

import numpy as np

from sidelight.data.examples import Example, Examples, LabelledExamples, located
from sidelight.data.labels import is_missing, label_name
from sidelight.data.readers import is_list, is_mapping
from sidelight.errors import SidelightError
from sidelight.types import NONE, Span, Task, is_label

_KEYS = ("start", "end", "label")
_FORM = '[{"start": 0, "end": 5, "label": "NAME"}], or [] for a text without any'


@dataclass(frozen=True, eq=False, kw_only=True)
class SpanExamples(LabelledExamples):
    """Texts with labelled spans; ``labels`` are those that a text has anywhere.

    Attributes:
        spans: Of each text, in order: of its response if it has one, else of its only message.
    """

    spans: tuple[tuple[Span, ...], ...]

    @property
    def texts(self) -> list[str]:
        """What the spans are in."""
        return [span_text(item) for item in self.items]

    def select(self, indices: Iterable[SupportsIndex]) -> "SpanExamples":
        chosen = [int(position) for position in indices]
        # The superclass makes a copy of this class that still has all spans.
        selected = cast("SpanExamples", super().select(chosen))
        return replace(selected, spans=tuple(self.spans[i] for i in chosen))


def span_text(example: Example) -> str:
    """The text whose characters are labelled.

    Raises:
        SidelightError: There is no response, and there are several messages.
    """
    if example.response is not None:
        return example.response
    if len(example.messages) > 1:
        raise SidelightError(
            f"The text has {len(example.messages)} messages, and spans count the characters of "
            "one. Give a single text, or name the column of answers with --response (response= in "
            "Python)."
        )
    return example.text


def label_spans(examples: Examples, column: str, *, task: Task | None) -> SpanExamples:
    """Texts with the spans that a column holds; the labels are as for ``load_examples``."""
    rows: list[tuple[Span, ...]] = []
    for index, (item, cell) in enumerate(zip(examples.items, examples.column(column), strict=True)):
        with located(item, index):
            rows.append(_parse_spans(cell, span_text(item), column=column))
    names = Counter(span.label for row in rows for span in row)
    task = task or _task(sorted(names), column)
    judged = task.output_labels
    unknown = {name: count for name, count in names.items() if name not in judged}
    warnings = examples.warnings
    if unknown:
        warnings += (
            "Left out the spans of labels that training did not know "
            f"({', '.join(unknown)[:200]}; {sum(unknown.values())} in all). What is found there "
            "counts as a false alarm.",
        )
    rows = [tuple(span for span in row if span.label in judged) for row in rows]
    holds = [[any(span.label == label for span in row) for label in judged] for row in rows]
    labels = np.array(holds, dtype=np.int64)
    return SpanExamples(
        examples.items,
        examples.rows,
        examples.skipped,
        warnings,
        task=task,
        labels=labels[:, 0] if task.kind == "binary" else labels,
        spans=tuple(rows),
    )


def _task(names: Sequence[str], column: str) -> Task:
    if not names:
        raise SidelightError(
            f"No text has a span in column '{column}'. Give texts with spans: {_FORM}."
        )
    wrong = [
        name for name in names if not is_label(name) or name in ("", NONE) or {*"[]"} & {*name}
    ]
    if wrong:
        raise SidelightError(
            f"A span cannot have the label {wrong[0][:60]!r}: labels stand in placeholders such as "
            "[NAME_1], so they have no brackets. Rename it in the data."
        )
    if len(names) == 1:
        return Task("binary", (NONE, names[0]))
    return Task("multilabel", tuple(names))


def holds_spans(cell: object) -> bool:
    """Whether a cell is a list of spans, and not an empty one."""
    return is_list(cell) and bool(cell) and is_mapping(cell[0]) and {*_KEYS} <= {*cell[0]}


def _parse_spans(cell: object, text: str, *, column: str) -> tuple[Span, ...]:
    if is_missing(cell):
        return ()
    if isinstance(cell, str) and cell.strip().startswith("["):
        # A table of comma-separated values holds a list as JSON.
        with suppress(ValueError):
            cell = json.loads(cell)
    if not is_list(cell):
        raise SidelightError(
            f"column '{column}' holds {str(cell)[:60]!r}. Write a list of spans, such as {_FORM}."
        )
    return tuple(sorted(_parse_span(span, text) for span in cell))


def _parse_span(span: object, text: str) -> Span:
    unknown = {*span} - {*_KEYS, "probability"} if is_mapping(span) else {}
    if not is_mapping(span) or unknown or not {*_KEYS} <= {*span}:
        named = f" (unknown: {', '.join(map(str, unknown))})" if unknown else ""
        raise SidelightError(
            f"expected a span with the keys {', '.join(_KEYS)}, got {str(span)[:80]}{named}."
        )
    start, end = span["start"], span["end"]
    if type(start) is not int or type(end) is not int or not 0 <= start < end <= len(text):
        raise SidelightError(
            f"a span from {start!r} to {end!r} is not within the {len(text)} characters of the "
            "text. Count Unicode code points from 0, the end exclusive."
        )
    if not text[start:end].strip():
        raise SidelightError(f"the span from {start} to {end} has only blanks. Remove it.")
    return Span(start, end, label_name(span["label"], "its label"))
