"""Rows from comma- and tab-separated text with a header line (RFC 4180 quoting)."""

import csv
import io
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from sidelight.data.readers.decoding import read_text
from sidelight.data.rows import Row
from sidelight.errors import SidelightError

_LONGEST_FIELD = 2**31 - 1


def read_csv(path: Path) -> list[Row]:
    """One row per comma-separated record; see `_read_delimited`."""
    return _read_delimited(path, ",")


def read_tsv(path: Path) -> list[Row]:
    """One row per tab-separated record; see `_read_delimited`."""
    return _read_delimited(path, "\t")


def _read_delimited(path: Path, delimiter: str) -> list[Row]:
    """One row per record after the header; blank lines are passed over, all cells are texts.

    Raises:
        SidelightError: A column name appears twice, a record has more or fewer fields than the
            header, or its quotes do not match.
    """
    records = _numbered_records(path, delimiter)
    with _long_fields():
        header = next(records, None)
        names = _column_names(header[1], path.name) if header else []
        return [
            Row(path.name, "line", line, _cells(names, record, f"{path.name}, line {line}"))
            for line, record in records
        ]


@contextmanager
def _long_fields() -> Generator[None, None, None]:
    """Lifts the limit of 131,072 characters a field, which the csv module keeps for everyone."""
    previous = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(previous)


def _numbered_records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Each record that is not blank, with the line on which it starts."""
    lines = io.StringIO(read_text(path), newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    line = 1
    try:
        for record in reader:
            if record:
                yield line, record
            line = reader.line_num + 1
    except csv.Error as error:
        raise SidelightError(
            f"{path.name}, line {line}: {error}. A field that holds quotes, delimiters or line "
            'ends is written in quotes, with "" for a quote inside it.'
        ) from error


def _column_names(header: list[str], source: str) -> list[str]:
    names = [name.strip() for name in header]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise SidelightError(
            f"{source}, line 1: column '{min(twice)}' appears twice. Give each its own name."
        )
    return names


def _cells(names: list[str], record: list[str], place: str) -> dict[str, object]:
    if len(record) != len(names):
        raise SidelightError(
            f"{place}: {len(record)} fields, but the header has {len(names)}. "
            "Put quotes around a field that holds the delimiter."
        )
    return dict(zip(names, record, strict=True))
