"""Rows of a table, from a file, the Hugging Face hub or memory. Knows no texts and no labels.

The files are read by hand, for errors that name the line (docs/dependencies.md says more).
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from sidelight.errors import SidelightError, did_you_mean

InMemory = Sequence[Mapping[str, object]] | Sequence[Sequence[object]]

_LONGEST_FIELD = 2**31 - 1
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Row:
    """The cells of one row by column, and where they were.

    Attributes:
        source: Name of the file or data set.
        position: Where in the source, such as `line 17`.
        cells: The value of each column.
    """

    source: str
    position: str
    cells: Mapping[str, object]

    @property
    def place(self) -> str:
        """Source and position, as error messages begin."""
        return f"{self.source}, {self.position}"


def plain(value: object) -> object:
    """A NumPy array as a list, a NumPy scalar as a Python value; anything else unchanged."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def is_mapping(value: object) -> TypeGuard[Mapping[str, object]]:
    return isinstance(value, Mapping)


def is_list(value: object) -> TypeGuard[Sequence[object]]:
    """Whether a cell is a list; a string is not."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def read_rows(
    source: str | Path | InMemory, *, split: str | None, text: str, label: str
) -> list[Row]:
    """All rows of a source, in order; at least one.

    Args:
        source: A file, a Hugging Face data set as `name` or `name:config`, or rows.
        split: Split of a Hugging Face data set; None means `train`.
        text: Name to give to the first half of (text, label) pairs.
        label: Name to give to the second half.
    """
    if isinstance(source, str):
        path = Path(source)
        if _HUB_NAME.fullmatch(source) and not path.exists() and not is_readable(path):
            return _read_hub(source, split or "train")
        source = path.expanduser()
    if split is not None:
        raise SidelightError(
            f"split='{split}' chooses a part of a Hugging Face data set, but the source is a file "
            "or rows in memory. Leave split out, and give only the rows of that split."
        )
    return read_file(source) if isinstance(source, Path) else _read_memory(source, text, label)


def read_file(path: Path) -> list[Row]:
    """All rows of a file, in order; at least one.

    Raises:
        SidelightError: The file is absent, empty, of another format, or malformed. The message
            names the file and, where there is one, the line.
    """
    if not path.is_file():
        raise SidelightError(_absence(path))
    if not is_readable(path):
        raise SidelightError(
            f"Cannot read '{path.name}': its name must end in {', '.join(_READERS)} (or, except "
            "for .parquet, in one of these and .gz). Convert the file, or correct its name."
        )
    try:
        rows = _READERS[_format_suffix(path)](path)
    except PermissionError as error:
        raise SidelightError(
            f"Cannot read '{path}': permission denied. Change its permissions, or copy the file."
        ) from error
    if not rows:
        raise SidelightError(f"{path.name} has no rows. Give a file with at least one example.")
    return rows


def is_readable(path: Path) -> bool:
    """Whether the name has the ending of a format that can be read; no file need exist."""
    return _format_suffix(path) in _READERS


def _format_suffix(path: Path) -> str:
    """The ending that names the format: `.csv` for `train.csv.gz`."""
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    # Parquet has compression of its own.
    return inner if suffix == ".gz" and inner != ".parquet" else suffix


def _absence(path: Path) -> str:
    """Names the readable files in the folder, or beside the file."""
    directory = path if path.is_dir() else path.parent
    if not directory.is_dir():
        return f"No file '{path}': there is no directory '{directory}'. Check the path."
    names = sorted(other.name for other in directory.iterdir() if is_readable(other))
    names = get_close_matches(path.name, names, n=10, cutoff=0.5) or names[:10]
    hint = did_you_mean(path.name, names) if names else " No file there can be read."
    return (
        f"'{path}' is a directory. Give one file.{hint}"
        if path.is_dir()
        else (f"No file '{path}'.{hint}")
    )


def _read_text(path: Path) -> str:
    """The text of a UTF-8 file, plain or gzip, without a byte order mark."""
    content = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise SidelightError(
                f"{path.name} is not a complete gzip file ({error}). Copy or compress it again."
            ) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SidelightError(
            f"{path.name}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8. "
            "Save the file as UTF-8 text."
        ) from error


def _require_distinct(names: list[str], place: str) -> None:
    if len(set(names)) < len(names):
        twice = min(name for name in names if names.count(name) > 1)
        raise SidelightError(f"{place}: '{twice}' appears twice. Give each column its own name.")


def _read_delimited(path: Path, *, delimiter: str) -> list[Row]:
    """One row per record after the header (RFC 4180); blank lines are skipped."""
    text = io.StringIO(_read_text(path), newline="")
    rows: list[Row] = []
    names: list[str] | None = None
    line = 1
    # The csv module keeps one limit, of 131,072 characters, for the whole process.
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        for record in reader:
            position = f"line {line}"
            line = reader.line_num + 1  # a record may span several lines
            if not record:
                continue
            if names is None:
                names = [name.strip() for name in record]
                _require_distinct(names, f"{path.name}, {position}")
                if len(names) == 1 and (other := next((c for c in ",;\t|" if c in record[0]), "")):
                    raise SidelightError(
                        f"{path.name}, {position}: the header has one column, and {other!r} in its "
                        f"name. Separate fields by {delimiter!r}, or save the file as JSON Lines."
                    )
                continue
            if len(record) != len(names):
                raise SidelightError(
                    f"{path.name}, {position}: {len(record)} fields, but the header has "
                    f"{len(names)}. Put quotes around a field that holds the delimiter."
                )
            rows.append(Row(path.name, position, dict(zip(names, record, strict=True))))
    except csv.Error as error:
        raise SidelightError(
            f"{path.name}, line {line}: {error}. Put quotes around a field that holds quotes, "
            'delimiters or line breaks, and write "" for a quote inside it.'
        ) from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _read_json_lines(path: Path) -> list[Row]:
    """One row per line; blank lines are skipped."""
    # Not splitlines: a JSON string may hold U+2028, which ends no line of the file.
    lines = enumerate(_read_text(path).split("\n"), start=1)
    return [
        _json_row(_parse_json(line, f"{path.name}, line {number}"), path.name, f"line {number}")
        for number, line in lines
        if line.strip()
    ]


def _read_json(path: Path) -> list[Row]:
    """One row per element of the file's array."""
    content = _parse_json(_read_text(path).strip() or "[]", path.name)
    if not is_list(content):
        raise SidelightError(
            f"{path.name}: expected one array of objects, got another JSON value. "
            "Write [{...}, {...}], or one object per line in a file that ends in .jsonl."
        )
    return [_json_row(cells, path.name, f"row {n}") for n, cells in enumerate(content, start=1)]


def _parse_json(text: str, place: str) -> object:
    def build(members: list[tuple[str, Any]]) -> dict[str, Any]:
        _require_distinct([name for name, _ in members], place)
        return dict(members)

    try:
        return json.loads(text, object_pairs_hook=build)
    except (ValueError, RecursionError) as error:
        raise SidelightError(
            f"{place}: not valid JSON ({error}). A .jsonl file has one object per line, "
            "a .json file has one array of objects."
        ) from error


def _json_row(cells: object, source: str, position: str) -> Row:
    if not is_mapping(cells):
        raise SidelightError(
            f"{source}, {position}: expected an object such as "
            f'{{"text": "...", "label": "..."}}, got {json.dumps(cells)[:60]}.'
        )
    return Row(source, position, cells)


def _read_parquet(path: Path) -> list[Row]:
    pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    try:
        _require_distinct(parquet.read_schema(path).names, path.name)
        records = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise SidelightError(
            f"{path.name} is not a complete Parquet file ({error}). Write it again."
        ) from error
    return [Row(path.name, f"row {n}", cells) for n, cells in enumerate(records, start=1)]


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".csv": partial(_read_delimited, delimiter=","),
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
    ".tsv": partial(_read_delimited, delimiter="\t"),
}


def _read_hub(source: str, split: str) -> list[Row]:
    """All rows of one split of a data set.

    Columns of class numbers become class names if there are three or more classes; with two, they
    stay 0 and 1, so that 1 is the positive class.
    """
    try:
        datasets: Any = import_module("datasets")
    except ImportError as error:
        raise SidelightError(
            f"{_absence(Path(source))} To read it as a Hugging Face data set, run "
            "`pip install 'sidelight[datasets]'`."
        ) from error
    name, _, config = source.partition(":")
    try:
        table = datasets.load_dataset(name, config or None, split=split)
    except (
        OSError,
        ValueError,
        RuntimeError,  # a data set that is a script
        datasets.exceptions.DatasetsError,
        import_module("httpx").HTTPError,
    ) as error:
        raise SidelightError(
            f"Cannot load '{source}', split '{split}', from the Hugging Face hub "
            f"({str(error)[:300]}). Check name, configuration, split and network, "
            "or download it once and give the file."
        ) from error
    names: dict[str, list[str]] = {
        column: feature.names
        for column, feature in table.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    rows = [
        Row(source, f"row {n}", {**cells, **{c: _class(cells[c], names[c]) for c in names}})
        for n, cells in enumerate(table, start=1)
    ]
    if not rows:
        raise SidelightError(f"'{source}' has no rows in split '{split}'. Name another split.")
    return rows


def _class(number: int | None, names: list[str]) -> int | str | None:
    # The hub marks an unlabelled row by -1, as in hidden test sets.
    if number is None or number == -1:
        return None
    return names[number] if len(names) > 2 else number


def _read_memory(source: InMemory, text: str, label: str) -> list[Row]:
    if not source:
        raise SidelightError("There are no rows. Give at least one example.")
    rows: list[Row] = []
    for number, item in enumerate(source, start=1):
        cells: object = item
        if is_list(cells) and len(cells) == 2:
            cells = {text: cells[0], label: cells[1]}
        if not is_mapping(cells):
            raise SidelightError(
                f"Given rows, row {number}: expected a mapping or a (text, label) pair, "
                f"got {str(cells)[:60]}."
            )
        rows.append(Row("Given rows", f"row {number}", cells))
    return rows
