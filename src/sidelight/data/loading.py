"""Loads examples: reads rows, then checks and encodes their texts and labels."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, overload

from jaxtyping import Int

from sidelight.data.examples import Example, Examples, LabelledExamples, Skipped
from sidelight.data.labels import encode_labels, is_missing
from sidelight.data.readers import InMemory, Row, is_list, is_mapping, plain, read_rows
from sidelight.errors import SidelightError, did_you_mean
from sidelight.prompts import Message, require_whole_characters
from sidelight.types import Numbers, Task

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
) -> Examples:
    """Loads texts with their labels, and infers the task from the labels.

    Two distinct labels make a binary task, more make a multi-class one. Lists of labels, or several
    columns of 0/1, make a multi-label one. Rows with an empty text or response are left out and
    counted.

    Args:
        source: A file (.jsonl, .json, .csv or .tsv, each also with .gz, or .parquet), a Hugging
            Face data set as `name` or `name:config`, rows as mappings, or (text, label) pairs.
        text: Column of the prompt: a string, or a list of messages with `role` and `content`.
        label: Column of the label, or names of several columns separated by commas; None loads
            texts without labels.
        response: Column of the assistant's answer, for probes that read responses.
        split: Split of a Hugging Face data set; None means `train`.
        positive: Positive class of a binary task; None means 1 (of 0/1 or -1/1), true or yes, else
            the rarer label, else the last in the alphabet.
        task: Label space to map to, such as a trained probe's; None infers one.
        on_missing_label: Whether a row without a label is an error, or is left out and counted.

    Raises:
        SidelightError: The source cannot be read, or a row is malformed; the message names the
            place and the remedy.
    """
    rows = read_rows(source, split=split, text=text, label=label or "label")
    columns = _find_columns(rows, text=text, label=label, response=response)
    examples = [(row, _parse_example(row, text, response)) for row in rows]
    readable = [(row, item) for row, item in examples if item is not None]
    if not readable:
        raise SidelightError(f"{rows[0].source}: {_emptiness(rows, text, response)}")
    complete = [(row, item) for row, item in readable if not _lacks_label(row, columns)]
    missing = len(readable) - len(complete)
    if missing and (on_missing_label == "error" or not complete):
        first = next(row for row, _ in readable if _lacks_label(row, columns))
        raise SidelightError(
            f"{missing} of {len(readable)} rows have no label in column '{', '.join(columns)}', "
            f"the first at {first.place}. Label them, or leave them out with --missing-label skip "
            "(in training --set missing_label=skip, in Python on_missing_label='skip')."
        )
    kept, items = [row for row, _ in complete], tuple(item for _, item in complete)
    cells = tuple(row.cells for row in kept)
    first_empty = next((row.place for row, item in examples if item is None), "")
    skipped = Skipped(len(rows) - len(readable), missing, first_empty)
    reasons = {
        "with an empty text or response": skipped.empty_text,
        "without a label": skipped.missing_label,
    }
    warnings = tuple(f"Left out {n} rows {reason}." for reason, n in reasons.items() if n)
    if not columns:
        return Examples(items, cells, skipped, warnings)
    task, labels, doubts = encode_labels(kept, columns, positive=positive, task=task)
    warnings += (*doubts, *_conflict_warnings(items, labels))
    return LabelledExamples(items, cells, skipped, warnings, task=task, labels=labels)


def _find_columns(
    rows: Sequence[Row], *, text: str, label: str | None, response: str | None
) -> tuple[str, ...]:
    """The columns of labels: `label` names several, or a single one whose name has a comma."""
    known = tuple(dict.fromkeys(name for row in rows for name in row.cells))
    labels = () if label is None else (label,)
    if label is not None and label not in known:
        labels = tuple(dict.fromkeys(name.strip() for name in label.split(",")))
    responses = () if response is None else (response,)
    wanted = {"text": (text,), "response": responses, "label": labels}
    kinds = {"text": "texts", "response": "answers", "label": "labels"}
    for option, names in wanted.items():
        for name in names:
            if name not in known:
                shown = [column[:40] for column in known]
                raise SidelightError(
                    f"{rows[0].source}: no column '{name}'.{did_you_mean(name, shown)} "
                    f"Name the column of {kinds[option]} with --{option} ({option}= in Python)."
                )
    return labels


def _parse_example(row: Row, text: str, response: str | None) -> Example | None:
    """The row's example; None if its text or response is empty."""
    messages = _parse_chat(row.cells.get(text), row.place)
    answer = None if response is None else _parse_text(row.cells.get(response), row.place)
    is_empty = not messages or (answer is not None and not answer.strip())
    return None if is_empty else Example(messages, answer, row.place)


def _parse_chat(cell: object, place: str) -> tuple[Message, ...]:
    """The messages of a cell (a string is one user message); none if all are white space."""
    cell = plain(cell)
    if not is_list(cell):
        cell = [{"role": "user", "content": cell}]
    messages = tuple(_parse_message(message, place) for message in cell)
    return messages if any(message.content.strip() for message in messages) else ()


def _parse_message(message: object, place: str) -> Message:
    role = message.get("role") if is_mapping(message) else None
    if not (is_mapping(message) and isinstance(role, str) and role and "content" in message):
        raise SidelightError(
            f"{place}: expected messages such as {{'role': 'user', 'content': 'Hello'}}, "
            f"got {_shown(message)}."
        )
    content = plain(message["content"])
    if not is_list(content):
        return Message(role, _parse_text(content, place))
    texts: list[str] = []
    for part in content:  # OpenAI's content parts
        if not (is_mapping(part) and part.get("type") == "text"):
            raise SidelightError(
                f"{place}: a probe reads only text, but a message has the part {_shown(part)}. "
                "Remove the parts whose type is not 'text'."
            )
        texts.append(_parse_text(part.get("text"), place))
    return Message(role, "\n".join(texts))


def _parse_text(cell: object, place: str) -> str:
    if cell is None:
        return ""
    if not isinstance(cell, str):
        raise SidelightError(
            f"{place}: expected a text (a string, or a list of messages), got {_shown(cell)}. "
            "Put quotes around it, or name the right column."
        )
    require_whole_characters(cell, place=f"{place}: the text")
    return cell


def _shown(value: object) -> str:
    return repr(value)[:80]


def _emptiness(rows: Sequence[Row], text: str, response: str | None) -> str:
    """Says which column is to blame when no row can be used."""
    if not any(_parse_chat(row.cells.get(text), row.place) for row in rows):
        return (
            f"column '{text}' is empty in all {len(rows)} rows. Name another column of texts with "
            "--text (text= in Python)."
        )
    if not any(_parse_text(row.cells.get(response or ""), row.place).strip() for row in rows):
        return (
            f"column '{response}' is empty in all {len(rows)} rows. Name another column of answers "
            "with --response (response= in Python)."
        )
    return (
        f"none of the {len(rows)} rows has both a '{text}' and a '{response}'. Fill in what is "
        "missing."
    )


def _lacks_label(row: Row, columns: Sequence[str]) -> bool:
    return any(is_missing(row.cells.get(column)) for column in columns)


def _conflict_warnings(
    items: Sequence[Example], labels: Int[Numbers, "row ..."]
) -> tuple[str, ...]:
    seen: defaultdict[tuple[tuple[Message, ...], str | None], set[bytes]] = defaultdict(set)
    for item, label in zip(items, labels, strict=True):
        seen[item.messages, item.response].add(label.tobytes())
    conflicts = sum(len(labellings) > 1 for labellings in seen.values())
    warning = f"{conflicts} texts appear more than once, with different labels."
    return (warning,) if conflicts else ()
