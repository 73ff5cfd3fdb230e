"""Conversion of a column of labelled spans to a task, labels and spans."""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from jaxtyping import Int

from sidelight.data.examples import Example, located
from sidelight.data.labels import is_missing, label_name
from sidelight.data.readers import is_list, is_mapping
from sidelight.errors import SidelightError, warn
from sidelight.types import NONE, Numbers, Span, Task, is_label

_KEYS = ("start", "end", "label")
_FORM = '[{"start": 0, "end": 5, "label": "NAME"}], or [] for a text without any'


def encode_spans(
    items: Sequence[Example], cells: Sequence[object], column: str, *, task: Task | None
) -> tuple[Task, Int[Numbers, "row ..."], tuple[tuple[Span, ...], ...]]:
    """Parse a column of spans.

    Returns:
        The task, the labels and the spans as in ``LabelledExamples``.
    """
    rows: list[tuple[Span, ...]] = []
    for index, (item, cell) in enumerate(zip(items, cells, strict=True)):
        with located(item, index):
            rows.append(_parse_spans(cell, item.span_text, column=column))
    names = Counter(span.label for row in rows for span in row)
    task = task or _task(sorted(names), column)
    task_labels = task.output_labels
    unknown = {name: count for name, count in names.items() if name not in task_labels}
    if unknown:
        warn(
            "Left out spans with labels that the probe was not trained on "
            f"({', '.join(unknown)[:200]}; {sum(unknown.values())} in all). Words found there "
            "count as false positives."
        )
    spans = tuple(tuple(span for span in row if span.label in task_labels) for row in rows)
    holds = [[any(span.label == label for span in row) for label in task_labels] for row in spans]
    return task, task.labels_of(np.array(holds)), spans


def _task(names: Sequence[str], column: str) -> Task:
    if not names:
        raise SidelightError(
            f"No text has a span in column '{column}'. Give texts with spans: {_FORM}."
        )
    wrong = next((name for name in names if not is_label(name) or name in ("", NONE)), None)
    if wrong is not None:
        raise SidelightError(
            f"{wrong[:60]!r} is not a valid label for a span. Rename it in the data."
        )
    if len(names) == 1:
        return Task("binary", (NONE, names[0]))
    return Task("multilabel", tuple(names))


def holds_spans(cell: object) -> bool:
    """Whether a cell is a non-empty list of spans."""
    return is_list(cell) and bool(cell) and is_mapping(cell[0]) and {*_KEYS} <= {*cell[0]}


def _parse_spans(cell: object, text: str, *, column: str) -> tuple[Span, ...]:
    if is_missing(cell):
        return ()
    if isinstance(cell, str) and cell.strip().startswith("["):
        # In CSV files, a list is written as JSON.
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
            "text. Count Unicode code points from 0, with an exclusive end."
        )
    if not text[start:end].strip():
        raise SidelightError(f"the span from {start} to {end} contains only whitespace. Remove it.")
    return Span(start, end, label_name(span["label"], "its label"))
