"""Examples from any source: finds the reader, then checks and encodes texts and labels."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from sidelight.data.examples import Example, Examples, Labels, Skipped, parse_chat, parse_text
from sidelight.data.labels import EncodedLabels, encode_labels, is_missing
from sidelight.data.readers import (
    InMemory,
    Row,
    column_names,
    is_hub_name,
    is_readable,
    read_file,
    read_hub,
    read_memory,
    require_column,
)
from sidelight.errors import SidelightError
from sidelight.prompts import Message
from sidelight.types import Task

OnMissingLabel = Literal["error", "skip"]


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

    Two distinct labels make a binary task, more a multi-class one; lists of labels, or several
    columns of 0/1, make a multi-label one. Rows with an empty text or response are left out and
    counted.

    Args:
        source: A file (.jsonl, .json, .csv or .tsv, each also with .gz, or .parquet), a Hugging
            Face data set as `name` or `name:config`, rows as mappings, or (text, label) pairs.
        text: Column of the prompt: a string, or a list of messages with `role` and `content`.
        label: Column of the label, or names of several columns with commas between them; None
            loads without labels.
        response: Column of the assistant's answer, for probes that read responses.
        split: Split of a Hugging Face data set; None means `train`.
        positive: Positive class of a binary task; None means 1 (of 0/1 or -1/1), true or yes, else
            the rarer label, else the last in the alphabet.
        task: Label space to map to, as a trained probe has it; None infers one.
        on_missing_label: Whether a row without a label is an error, or is left out and counted.

    Raises:
        SidelightError: The source cannot be read, or a row is malformed; the message names the
            place and the remedy.
    """
    rows = _read_rows(source, split=split, text=text, label=label or "label")
    _require_text_columns(rows, text, response)
    columns = _label_columns(label, rows)
    examples = [(row, _parse_example(row, text, response)) for row in rows]
    readable = [(row, item) for row, item in examples if item is not None]
    if not readable:
        raise SidelightError(_emptiness(rows, text, response))
    complete = [(row, item) for row, item in readable if not _lacks_label(row, columns)]
    _check_missing([row for row, _ in readable], columns, len(complete), on_missing_label)
    kept = [row for row, _ in complete]
    first_empty = next((row.place for row, item in examples if item is None), "")
    skipped = Skipped(len(rows) - len(readable), len(readable) - len(complete), first_empty)
    encoded = encode_labels(kept, columns, positive=positive, task=task) if columns else None
    return _assemble(tuple(item for _, item in complete), kept, encoded, skipped, task)


def _assemble(
    items: tuple[Example, ...],
    rows: Sequence[Row],
    encoded: EncodedLabels | None,
    skipped: Skipped,
    task: Task | None,
) -> Examples:
    cells = tuple(row.cells for row in rows)
    if encoded is None:
        return Examples(items, task, None, cells, skipped, _skip_warnings(skipped))
    conflicts = _conflict_warnings(items, encoded.labels)
    warnings = (*_skip_warnings(skipped), *encoded.warnings, *conflicts)
    return Examples(items, encoded.task, encoded.labels, cells, skipped, warnings)


def _read_rows(
    source: str | Path | InMemory, *, split: str | None, text: str, label: str
) -> list[Row]:
    if isinstance(source, str):
        if _is_hub_source(source):
            return read_hub(source, split=split)
        source = Path(source).expanduser()
    if split is not None:
        raise SidelightError(
            f"split='{split}' chooses a part of a Hugging Face data set, but the source is a file "
            "or rows in memory. Give the rows of that split only."
        )
    if isinstance(source, Path):
        return read_file(source)
    return read_memory(source, text=text, label=label)


def _is_hub_source(source: str) -> bool:
    path = Path(source)
    return is_hub_name(source) and not path.exists() and not is_readable(path)


def _require_text_columns(rows: Sequence[Row], text: str, response: str | None) -> None:
    known = column_names(rows)
    require_column(
        text,
        rows=rows,
        known=known,
        remedy="Name the column of texts with --text (text= in Python).",
    )
    if response is not None:
        remedy = "Name the column of answers with --response (response= in Python)."
        require_column(response, rows=rows, known=known, remedy=remedy)


def _label_columns(label: str | None, rows: Sequence[Row]) -> tuple[str, ...]:
    """The columns that `label` names: it may be one whose own name holds a comma."""
    if label is None:
        return ()
    known = column_names(rows)
    names = [label] if label in known else [name.strip() for name in label.split(",")]
    for name in names:
        remedy = "Name the column of labels with --label (label= in Python)."
        require_column(name, rows=rows, known=known, remedy=remedy)
    return tuple(dict.fromkeys(names))


def _parse_example(row: Row, text: str, response: str | None) -> Example | None:
    """The row's example; None where its text or response is empty."""
    messages = parse_chat(row.cells.get(text), place=row.place)
    if response is None:
        return Example(messages, place=row.place) if messages else None
    answer = parse_text(row.cells.get(response), place=row.place)
    return Example(messages, answer, row.place) if messages and answer.strip() else None


def _emptiness(rows: Sequence[Row], text: str, response: str | None) -> str:
    """Says which column is to blame where no row can be read."""
    where = f"{rows[0].source}: "
    if not any(parse_chat(row.cells.get(text), place=row.place) for row in rows):
        return where + (
            f"column '{text}' is empty in all {len(rows)} rows. Name another column of texts with "
            "--text (text= in Python)."
        )
    if not any(parse_text(row.cells.get(response or ""), place=row.place).strip() for row in rows):
        return where + (
            f"column '{response}' is empty in all {len(rows)} rows. Name another column of answers "
            "with --response (response= in Python)."
        )
    return where + (
        f"none of the {len(rows)} rows has both a '{text}' and a '{response}'. Fill one of them in "
        "where the other is."
    )


def _lacks_label(row: Row, columns: Sequence[str]) -> bool:
    return any(is_missing(row.cells.get(column)) for column in columns)


def _check_missing(
    rows: Sequence[Row], columns: Sequence[str], complete: int, on_missing_label: OnMissingLabel
) -> None:
    missing = len(rows) - complete
    if complete == 0 or (missing and on_missing_label == "error"):
        first = next(row for row in rows if _lacks_label(row, columns))
        raise SidelightError(
            f"{missing} of {len(rows)} rows have no label in column '{', '.join(columns)}', first "
            f"{first.place}. Label them, or leave them out with --missing-label skip "
            "(on_missing_label='skip' in Python)."
        )


def _skip_warnings(skipped: Skipped) -> tuple[str, ...]:
    counts = {
        "with an empty text or response": skipped.empty_text,
        "without a label": skipped.missing_label,
    }
    return tuple(f"Left out {count} rows {reason}." for reason, count in counts.items() if count)


def _conflict_warnings(items: Sequence[Example], labels: Labels) -> tuple[str, ...]:
    seen: defaultdict[tuple[tuple[Message, ...], str | None], set[bytes]] = defaultdict(set)
    for item, label in zip(items, labels, strict=True):
        seen[item.messages, item.response].add(label.tobytes())
    conflicts = sum(len(found) > 1 for found in seen.values())
    warning = f"{conflicts} texts appear more than once, with different labels."
    return (warning,) if conflicts else ()
