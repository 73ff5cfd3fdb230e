"""Rows from JSON lines and from JSON arrays."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from sidelight.data.readers.decoding import read_text
from sidelight.data.rows import Row, Unit, is_list, is_mapping
from sidelight.errors import SidelightError


def read_json_lines(path: Path) -> list[Row]:
    """One row per line; blank lines are passed over.

    Raises:
        SidelightError: A line is not a JSON object, or an object has two members of one name.
    """
    # Not splitlines: a JSON string may hold U+2028, which ends no line of the file.
    lines = enumerate(read_text(path).split("\n"), start=1)
    return [
        _row(_parse(line, f"{path.name}, line {number}"), path.name, "line", number)
        for number, line in lines
        if line.strip()
    ]


def read_json(path: Path) -> list[Row]:
    """One row per element of the file's array.

    Raises:
        SidelightError: The file is not an array of JSON objects, or one has two members of one
            name.
    """
    content = _parse(read_text(path).strip() or "[]", path.name)
    if not is_list(content):
        raise SidelightError(
            f"{path.name}: expected one array of objects, got another JSON value. "
            "Write [{...}, {...}], or one object a line in a file that ends in .jsonl."
        )
    return [_row(cells, path.name, "row", number) for number, cells in enumerate(content, start=1)]


def _parse(text: str, place: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=partial(_object, place=place))
    except (ValueError, RecursionError) as error:
        raise SidelightError(
            f"{place}: not valid JSON ({error}). A .jsonl file has one object a line, "
            "a .json file one array of objects."
        ) from error


def _object(members: list[tuple[str, Any]], *, place: str) -> dict[str, Any]:
    """The members by name; no two may share one, as columns may not."""
    cells = dict(members)
    if len(cells) < len(members):
        names = [name for name, _ in members]
        twice = min(name for name in names if names.count(name) > 1)
        raise SidelightError(
            f"{place}: '{twice}' appears twice in one object. Give each its own name."
        )
    return cells


def _row(cells: object, source: str, unit: Unit, number: int) -> Row:
    if not is_mapping(cells):
        raise SidelightError(
            f"{source}, {unit} {number}: expected an object such as "
            f'{{"text": "...", "label": "..."}}, got {json.dumps(cells)[:60]}.'
        )
    return Row(source, unit, number, cells)
