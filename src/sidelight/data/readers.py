"""One row of a source, and the kinds of cell it may hold. Knows no file format.

The text of a file, plain or gzip. Knows no format.

Rows from comma- and tab-separated text with a header line (RFC 4180 quoting).

Rows from JSON lines and from JSON arrays.

Rows from Parquet, through the package pyarrow.

Finds the reader for a file by its ending, and helps where there is none.

Rows from a Hugging Face data set, through the optional package `datasets`.

Rows that the caller already holds.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeGuard

import numpy as np

from sidelight.errors import SidelightError, did_you_mean

Unit = Literal["line", "row"]

_LONGEST_NAME = 40


@dataclass(frozen=True, slots=True)
class Row:
    """The cells of one row, and where they stood.

    Attributes:
        source: Name of the file or data set, for messages.
        unit: What `number` counts.
        number: Position in the source, from 1.
        cells: Value of each column.
    """

    source: str
    unit: Unit
    number: int
    cells: Mapping[str, object]

    @property
    def place(self) -> str:
        """Where the row stands, as the start of an error message."""
        return f"{self.source}, {self.unit} {self.number}"


def column_names(rows: Iterable[Row]) -> tuple[str, ...]:
    """The columns that at least one row has, in the order in which they appear."""
    return tuple(dict.fromkeys(name for row in rows for name in row.cells))


def require_column(name: str, *, rows: Sequence[Row], known: Iterable[str], remedy: str) -> None:
    """Checks that a column exists.

    Raises:
        SidelightError: No row has the column; the message ends with the remedy.
    """
    known = tuple(known)
    if name in known:
        return
    shown = [column[:_LONGEST_NAME] for column in known]
    raise SidelightError(
        f"{rows[0].source}: no column '{name}'.{did_you_mean(name, shown)} {remedy}"
    )


def plain(value: object) -> object:
    """A NumPy array as a list and a NumPy scalar as Python's own; all else as it is."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def require_whole_characters(text: str, *, place: str) -> None:
    """Checks that a text can be written as UTF-8.

    Raises:
        SidelightError: It holds half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SidelightError(
            f"{place}: the text holds half a character (a lone surrogate) at position "
            f"{error.start}. Remove it, or write the file again from the original."
        ) from error


def is_mapping(value: object) -> TypeGuard[Mapping[str, object]]:
    """Whether a cell is an object with named fields."""
    return isinstance(value, Mapping)


def is_list(value: object) -> TypeGuard[Sequence[object]]:
    """Whether a cell is a list; a string is not."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def read_text(path: Path) -> str:
    """The file's UTF-8 text, without a byte order mark.

    Raises:
        SidelightError: The gzip stream is damaged, or a byte is not UTF-8; the message names its
            line.
    """
    content = path.read_bytes()
    if path.suffix.lower() == ".gz":
        content = _decompress(content, path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SidelightError(
            f"{path.name}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8. "
            "Save the file as UTF-8 text."
        ) from error


def _decompress(content: bytes, path: Path) -> bytes:
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise SidelightError(
            f"{path.name} is not a whole gzip file ({error}). Copy or compress it again."
        ) from error


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


def read_parquet(path: Path) -> list[Row]:
    """One row per record.

    Raises:
        SidelightError: pyarrow is missing, the file is damaged, or it has two columns of one name.
    """
    pyarrow, parquet = _import(path, "pyarrow"), _import(path, "pyarrow.parquet")
    try:
        _require_distinct(parquet.read_schema(path).names, path)
        records = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise SidelightError(
            f"{path.name} is not a whole Parquet file ({error}). Write it again."
        ) from error
    return [Row(path.name, "row", number, cells) for number, cells in enumerate(records, start=1)]


def _require_distinct(names: list[str], path: Path) -> None:
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise SidelightError(
            f"{path.name}: column '{min(twice)}' appears twice. Give each its own name."
        )


def _import(path: Path, module: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise SidelightError(
            f"Reading '{path.name}' needs the package pyarrow. Run `pip install pyarrow`, "
            "or save the data as .jsonl."
        ) from error


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".csv": read_csv,
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".parquet": read_parquet,
    ".tsv": read_tsv,
}


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
            f"Cannot read '{path.name}': its ending is none of {', '.join(_READERS)} (plain, or "
            "with .gz for text). Convert it, or rename it to what it holds."
        )
    try:
        rows = _READERS[_format_suffix(path)](path)
    except PermissionError as error:
        raise SidelightError(f"May not read '{path}'. Change its permissions.") from error
    if not rows:
        raise SidelightError(f"{path.name} has no rows. Give a file with at least one example.")
    return rows


def is_readable(path: Path) -> bool:
    """Whether a name ends like a format that is read here; the file need not exist."""
    return _format_suffix(path) in _READERS


def files_beside(path: Path) -> list[str]:
    """The readable files beside a path, or in it if it is a folder: of a like name, or any."""
    directory = path if path.is_dir() else path.parent
    if not directory.is_dir():
        return []
    names = [other.name for other in directory.iterdir() if is_readable(other)]
    return get_close_matches(path.name, names, n=10, cutoff=0.5) or sorted(names)[:10]


def _format_suffix(path: Path) -> str:
    """The ending that tells the format: `.csv` for `train.csv.gz`."""
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    # Parquet is compressed inside.
    return inner if suffix == ".gz" and inner != ".parquet" else suffix


def _absence(path: Path) -> str:
    if path.is_dir():
        return f"'{path}' is a directory. Name one file.{_choice(path, path)}"
    if not path.parent.is_dir():
        return f"No file '{path}': there is no directory '{path.parent}'. Check the path."
    return f"No file '{path}'.{_choice(path, path.parent)}"


def _choice(path: Path, directory: Path) -> str:
    beside = files_beside(path)
    if beside:
        return did_you_mean(path.name, beside)
    return f" No file in '{directory.resolve()}' ends like labelled data, such as .jsonl or .csv."


_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def is_hub_name(source: str) -> bool:
    """Whether a text reads as `name`, `owner/name` or `owner/name:config`."""
    return _HUB_NAME.fullmatch(source) is not None


def read_hub(source: str, *, split: str | None) -> list[Row]:
    """All rows of one split of a data set.

    Columns of class numbers become class names where there are three or more classes; with two,
    they stay 0 and 1, so that 1 is the positive class.

    Args:
        source: `name` or `name:config`.
        split: Name of the split; None means `train`.

    Raises:
        SidelightError: The package is missing, the hub is out of reach, or it has no such data set,
            configuration or split, or the data set cannot be built.
    """
    datasets = _import_datasets(source)
    name, _, config = source.partition(":")
    try:
        table = datasets.load_dataset(name, config or None, split=split or "train")
    except _loading_errors(datasets) as error:
        raise SidelightError(
            f"Cannot load '{source}', split '{split or 'train'}', from the Hugging Face hub "
            f"({str(error)[:300]}). Check name, configuration, split and network, "
            "or download it once and give the file."
        ) from error
    names = _class_names(table, datasets.ClassLabel)
    rows = [Row(source, "row", n, _with_names(cells, names)) for n, cells in enumerate(table, 1)]
    if not rows:
        raise SidelightError(f"'{source}' has no rows in split '{split or 'train'}'. Name another.")
    return rows


def _import_datasets(source: str) -> Any:
    try:
        return import_module("datasets")
    except ImportError as error:
        raise SidelightError(
            f"There is no file '{source}'.{did_you_mean(source, files_beside(Path(source)))} "
            "To read it as a Hugging Face data set, run `pip install 'sidelight[datasets]'`."
        ) from error


def _loading_errors(datasets: Any) -> tuple[type[Exception], ...]:
    """What loading raises; a data set that is a script is refused by a RuntimeError."""
    own, transport = datasets.exceptions.DatasetsError, import_module("httpx").HTTPError
    return (OSError, ValueError, RuntimeError, own, transport)


def _class_names(table: Any, class_label: type[Any]) -> dict[str, list[str]]:
    """Names of the classes, for each column of class numbers."""
    features = table.features.items()
    return {name: feature.names for name, feature in features if isinstance(feature, class_label)}


def _with_names(cells: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    return {**cells, **{column: _class(cells[column], names[column]) for column in names}}


def _class(number: int | None, names: list[str]) -> int | str | None:
    # The hub marks an unlabelled row by -1, as in hidden test sets.
    if number is None or number == -1:
        return None
    return names[number] if len(names) > 2 else number


InMemory = Sequence[Mapping[str, object]] | Sequence[Sequence[object]]

_SOURCE = "Given rows"


def read_memory(source: InMemory, *, text: str, label: str) -> list[Row]:
    """One row per mapping, or per (text, label) pair.

    Args:
        source: Mappings or pairs.
        text: Column that the first half of a pair becomes.
        label: Column that the second half of a pair becomes.

    Raises:
        SidelightError: There are no rows, or one is neither a mapping nor a pair.
    """
    if not source:
        raise SidelightError("There are no rows. Give at least one example.")
    return [
        Row(
            _SOURCE,
            "row",
            number,
            cells if is_mapping(cells) else _pair(cells, text, label, number),
        )
        for number, cells in enumerate(source, start=1)
    ]


def _pair(cells: object, text: str, label: str, number: int) -> dict[str, object]:
    if not is_list(cells) or len(cells) != 2:
        raise SidelightError(
            f"{_SOURCE}, row {number}: expected a mapping or a (text, label) pair, "
            f"got {str(cells)[:60]}."
        )
    return {text: cells[0], label: cells[1]}
