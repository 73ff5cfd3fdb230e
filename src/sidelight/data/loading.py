"""Loading of examples: read rows, then check and encode their texts and labels."""

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, overload

import numpy as np

from sidelight.data.examples import (
    Example,
    Examples,
    LabelledExamples,
    Skipped,
    SpanExamples,
)
from sidelight.data.guards import guard_of
from sidelight.data.labels import encode_labels, is_missing
from sidelight.data.readers import InMemory, Row, is_list, is_mapping, read_rows
from sidelight.data.span_labels import encode_spans, holds_spans
from sidelight.errors import SidelightError, did_you_mean, warn
from sidelight.models.conversation import Message, require_valid_unicode
from sidelight.types import Span, Task

OnMissingLabel = Literal["error", "skip"]


@overload
def load_examples(
    source: str | Path | InMemory,
    *,
    text: str = "text",
    label: str = "label",
    response: str | None = None,
    split: str | None = None,
    positive: str | None = None,
    task: Task | None = None,
    on_missing_label: OnMissingLabel = "error",
    spans: str,
    groups: str | None = None,
) -> SpanExamples: ...
@overload
def load_examples(
    source: str | Path | InMemory,
    *,
    text: str = "text",
    label: str = "label",
    response: str | None = None,
    split: str | None = None,
    positive: str | None = None,
    task: Task | None = None,
    on_missing_label: OnMissingLabel = "error",
    spans: str | None = None,
    groups: str | None = None,
) -> LabelledExamples: ...
@overload
def load_examples(
    source: str | Path | InMemory,
    *,
    text: str = "text",
    label: None,
    response: str | None = None,
    split: str | None = None,
) -> Examples: ...
def load_examples(
    source: str | Path | InMemory,
    *,
    text: str = "text",
    label: str | None = "label",
    response: str | None = None,
    split: str | None = None,
    positive: str | None = None,
    task: Task | None = None,
    on_missing_label: OnMissingLabel = "error",
    spans: str | None = None,
    groups: str | None = None,
) -> Examples:
    """Load texts with their labels, and infer the task from the labels.

    Two distinct labels make a binary task, and more make a multi-class task. Lists of labels, or
    several 0/1 columns, make a multi-label task. Rows with an empty text or response are left out
    and counted.

    Args:
        source: A file (.jsonl, .json, .csv or .tsv, each also with .gz, or .parquet), a Hugging
            Face data set as `name` or `name:config`, rows as mappings, or (text, label) pairs; or
            `guard:NAME`, `guard:NAME,FILE` or `guard:NAME:TEST`, whose columns and classes are
            those of the guard's card.
        text: Column of the prompt: a string, or a list of messages with `role` and `content` (text
            or text parts), and `tool_calls` of the assistant, which become lines of its text.
        label: Column of the label, or names of several columns separated by commas; None loads
            texts without labels.
        response: Column of the assistant's answer, for probes that read responses.
        split: Split of a Hugging Face data set; None means `train`.
        positive: Positive class of a binary task; None means 1 (of 0/1 or -1/1), true or yes, else
            the rarer label, else the alphabetically last one.
        task: Label space to map to, such as a trained probe's; None infers one.
        on_missing_label: Whether a row without a label is an error, or is left out and counted.
        spans: Column of spans in place of labels: a list of ``{"start": 0, "end": 5, "label":
            "NAME"}``, in characters (Unicode code points) of the text, or of the answer if there is
            one, the end exclusive. Spans of different labels may overlap; rows without any are
            negatives. A ``probability``, which ``predict`` writes, is ignored, and spans of labels
            that ``task`` lacks are left out and counted.
        groups: Columns, separated by commas, whose equal values keep rows together in a split or
            fold, such as a customer or a source document. Empty cells join nothing. If a group
            becomes too large, the last column is ignored first.

    Raises:
        SidelightError: The source cannot be read, or a row is malformed; the message names the
            place and the remedy.
    """
    joined = tuple(name.strip() for name in groups.split(",")) if groups else ()
    if (guard := guard_of(source)) is None:
        rows = read_rows(source, split=split, text=text, label=label or "label")
    else:
        guard.require(
            text=text, label=label, response=response, spans=spans, positive=positive, split=split
        )
        if guard.card.labels is None and spans is None and label is not None:
            raise SidelightError(
                f"The guard '{guard.name}' labels spans, not whole texts. Read them with --spans "
                "spans (spans= in Python), or name a probe that labels spans."
            )
        rows, positive, response = guard.rows(task), None, guard.card.columns["response"]
        if task is None and guard.card.labels is not None:
            task = Task("binary", guard.card.labels)
        joined = joined or guard.card.groups
    label = label if spans is None else None
    named = [("text", text), ("response", response), ("spans", spans)]
    named += [("set groups", name) for name in joined if groups]
    columns = _find_columns(rows, label, named)
    usable, plain = _usable(rows, columns, text, response, on_missing_label=on_missing_label)
    items = plain.items
    form = LabelledExamples
    if spans is not None:
        column = [row.cells.get(spans) for row in usable]
        task, labels, text_spans = encode_spans(items, column, spans, task=task)
        form = partial(SpanExamples, spans=text_spans)
        _warn_of_new_labels(usable, text_spans)
    elif not columns:
        return plain
    else:
        task, labels = encode_labels(usable, columns, positive=positive, task=task)
        pairs = zip(items, labels, strict=True)
        labellings = {
            (item.messages, item.response, row_labels.tobytes()) for item, row_labels in pairs
        }
        counts = Counter((messages, answer) for messages, answer, _ in labellings)
        if conflicts := sum(count > 1 for count in counts.values()):
            warn(
                f"{conflicts} texts appear more than once with different labels. Correct the "
                "labels."
            )
    weights = np.array([row.weight for row in usable])
    return form(
        items,
        plain.rows,
        plain.skipped,
        task=task,
        labels=labels,
        weights=None if (weights == 1).all() else weights,
        group_columns=joined,
    )


def _usable(
    rows: Sequence[Row],
    columns: Sequence[str],
    text: str,
    response: str | None,
    *,
    on_missing_label: OnMissingLabel,
) -> tuple[list[Row], Examples]:
    """The rows with a text and a cell in each label column, and their texts."""
    usable: list[Row] = []
    items: list[Example] = []
    empty: list[Row] = []
    unlabelled: list[Row] = []
    for row in rows:
        item = _parse_example(row, text, response)
        if item is None:
            empty.append(row)
        elif any(is_missing(row.cells.get(column)) for column in columns):
            unlabelled.append(row)
        else:
            usable.append(row)
            items.append(item)
    users = sum(row.is_beside_guard for row in rows)
    if users and users == sum(row.is_beside_guard for row in empty):
        raise SidelightError(
            f"None of your {users} rows for the guard has a "
            f"text{'' if response is None else ' and a response'}. Fill in what is missing."
        )
    if len(empty) == len(rows):
        answers = "" if response is None else f" and a response in column '{response}' (--response)"
        raise SidelightError(
            f"None of the {len(rows)} rows has a text in column '{text}' (--text){answers}. Name "
            "other columns, or fill in what is missing."
        )
    if unlabelled and (on_missing_label == "error" or not usable):
        # `sidelight guard` does not have this option.
        remedy = (
            "remove them"
            if unlabelled[0].is_beside_guard
            else "name another column with --label (label= in Python)"
            if not usable
            else "leave them out with --missing-label skip (in Python load_examples(..., "
            "on_missing_label='skip'))"
        )
        raise SidelightError(
            f"{len(unlabelled)} of {len(rows)} rows have no label in '{', '.join(columns)}', the "
            f"first at {unlabelled[0].place}. Label them, or {remedy}."
        )
    skipped = Skipped(len(empty), len(unlabelled), empty[0].place if empty else "")
    reasons = {"with an empty text or response": empty, "without a label": unlabelled}
    for reason, out in reasons.items():
        if out:
            warn(f"Left out {len(out)} rows {reason}.")
    return usable, Examples(tuple(items), tuple(row.cells for row in usable), skipped)


def _warn_of_new_labels(rows: Sequence[Row], spans: Sequence[Sequence[Span]]) -> None:
    """Warn if the user's rows have span labels that the guard's own rows lack."""
    packaged, each = Counter[str](), Counter[str]()
    for row, annotated in zip(rows, spans, strict=True):
        (each if row.is_beside_guard else packaged).update(span.label for span in annotated)
    if new := each.keys() - packaged.keys():
        warn(
            f"Only your rows have spans labelled {', '.join(sorted(new))}. Packaged texts may "
            "contain such spans without a label. If you mean one of the packaged labels, use it: "
            f"{', '.join(sorted(packaged))}."
        )


def _find_columns(
    rows: Sequence[Row], label: str | None, named: Sequence[tuple[str, str | None]]
) -> tuple[str, ...]:
    """The label columns: `label` names several, or a single one whose name contains a comma.

    Columns named by other options must exist too.
    """
    known = tuple(dict.fromkeys(name for row in rows for name in row.cells))
    labels = () if label is None else (label,)
    if label is not None and label not in known:
        labels = tuple(dict.fromkeys(name.strip() for name in label.split(",")))
    for option, name in [*named, *(("label", name) for name in labels)]:
        if name is not None and name not in known:
            labelled = [c for c in known if any(holds_spans(row.cells.get(c)) for row in rows)]
            hint = (
                f" Column '{labelled[0]}' has spans: train a probe that labels them with "
                f"`sidelight train --spans {labelled[0]}`."
                if labelled
                else ""
            )
            raise SidelightError(
                f"{rows[0].place}: no column '{name}'."
                f"{did_you_mean(name, [column[:40] for column in known])} "
                f"Name another with --{option} ({option.split()[-1]}= in Python)."
                f"{hint if option == 'label' else ''}"
            )
    return labels


def _parse_example(row: Row, text: str, response: str | None) -> Example | None:
    """Parse a row, where a string is one user message; None if the text or response is empty."""
    cell, place = row.cells.get(text), row.place
    turns = cell if is_list(cell) else [{"role": "user", "content": cell}]
    messages = [_parse_message(turn, place) for turn in turns]
    answer = None if response is None else _parse_text(row.cells.get(response), place)
    is_answered = answer is None or answer.strip()
    if is_answered and any(message.content.strip() for message in messages):
        return Example(tuple(messages), answer, place)
    return None


def _parse_message(turn: object, place: str) -> Message:
    """Parse a chat message as servers do: content as text or text parts, then its tool calls."""
    fields = turn if is_mapping(turn) else {}
    role, content, calls = (fields.get(name) for name in ("role", "content", "tool_calls"))
    if not (isinstance(role, str) and role and ("content" in fields or calls)):
        raise SidelightError(
            f"{place}: expected messages such as {{'role': 'user', 'content': 'Hello'}}, "
            f"got {repr(turn)[:80]}."
        )
    if fields.get("function_call"):
        raise SidelightError(
            f"{place}: 'function_call' is deprecated and not read. Write 'tool_calls': "
            "[{'function': {'name': ..., 'arguments': ...}}] instead."
        )
    if calls and role != "assistant":
        raise SidelightError(
            f"{place}: only the assistant calls tools, but a message with the role '{role}' has "
            "'tool_calls'. Correct the role, or remove the calls."
        )
    if is_list(content):
        texts = [_parse_part(block, place) for block in content]
    else:
        texts = [] if content is None and calls else [_parse_text(content, place)]
    calls = calls if is_list(calls) else [calls] if calls else []
    return Message.of_lines(role, texts, [_parse_call(call, place) for call in calls])


def _parse_part(block: object, place: str) -> str:
    """The text of a content part."""
    text = block.get("text") if is_mapping(block) else None
    if text is None:
        raise SidelightError(
            f"{place}: expected text parts such as {{'type': 'text', 'text': 'Hello'}}, got "
            f"{repr(block)[:80]}. Remove the part: probes read text only."
        )
    return _parse_text(text, place)


def _parse_call(call: object, place: str) -> tuple[str, str]:
    """The name and the arguments, as JSON, of the function that a tool call names."""
    function = call.get("function") if is_mapping(call) else None
    fields = function if is_mapping(function) else {}
    name, arguments = fields.get("name") or "", fields.get("arguments")
    if is_mapping(arguments):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not (isinstance(name, str) and isinstance(arguments, str)):
        raise SidelightError(
            f"{place}: expected tool calls such as {{'function': {{'name': 'search', 'arguments': "
            f"'{{}}'}}}}, got {repr(call)[:80]}."
        )
    require_valid_unicode(name + arguments, place=f"{place}: the tool call")
    return name, arguments


def _parse_text(cell: object, place: str) -> str:
    if cell is None:
        return ""
    if not isinstance(cell, str):
        raise SidelightError(
            f"{place}: expected a text (a string, or a list of messages), got {repr(cell)[:80]}. "
            "Put quotes around the text, or name the right column."
        )
    require_valid_unicode(cell, place=f"{place}: the text")
    return cell
