"""Rows of a table from a file, the Hugging Face hub or memory. Independent of texts and labels.

Files are parsed by hand so that errors can name the line (see docs/dependencies.md).
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

from sidelight.errors import SidelightError, did_you_mean, how_to_install, transport_errors

InMemory = Sequence[Mapping[str, object]] | Sequence[Sequence[object]]

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Row:
    """The cells of one row.

    Attributes:
        place: Origin of the row, such as ``train.csv, line 17``; error messages begin with it.
        cells: Value of each column.
        weight: Weight in training.
    """

    place: str
    cells: Mapping[str, object]
    weight: float = 1.0

    @property
    def is_beside_guard(self) -> bool:
        """Whether this is a user's row for a guard, whose card names the columns."""
        return self.weight > 1


def is_mapping(value: object) -> TypeGuard[Mapping[str, object]]:
    return isinstance(value, Mapping)


def is_list(value: object) -> TypeGuard[Sequence[object]]:
    """Whether a cell is a list; a string is not."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def read_rows(
    source: str | Path | InMemory, *, split: str | None, text: str, label: str
) -> list[Row]:
    """Read all rows of a source, in order; at least one. ``text`` and ``label`` name halves of
    pairs.
    """
    if isinstance(source, str):
        path = Path(source)
        if _HUB_NAME.fullmatch(source) and not path.exists() and not is_readable(path):
            return _read_hub(source, split or "train")
        source = path.expanduser()
    if split is not None:
        raise SidelightError(
            f"split='{split}' selects a split of a Hugging Face data set, but the source is a "
            "file or rows in memory. Leave split out, and pass only the rows of that split."
        )
    return read_file(source) if isinstance(source, Path) else _read_memory(source, text, label)


def read_file(path: Path) -> list[Row]:
    """Read all rows of a file, in order; at least one.

    Raises:
        SidelightError: The file is absent, empty, of another format, or malformed. The message
            names the file and, where there is one, the line.
    """
    if not path.is_file():
        raise SidelightError(_absence(path))
    if not is_readable(path):
        raise SidelightError(
            f"Cannot read '{path.name}': its name must end in {', '.join(_READERS)}, followed by "
            ".gz if the file is compressed (except for .parquet). Convert the file, or correct "
            "its name."
        )
    try:
        rows = _READERS[_format_suffix(path)](path)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise SidelightError(
            f"{path.name}, line {line}: not UTF-8 (byte 0x{byte:02x}). Save the file as UTF-8. "
            f"To convert from Latin-1, run `iconv -f latin1 -t utf-8 {path.name} > NEW_FILE`."
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SidelightError(f"Cannot read {path.name}: {error}. Copy it again.") from error
    if not rows:
        raise SidelightError(f"{path.name} has no rows. Give a file with at least one example.")
    return rows


def is_readable(path: Path) -> bool:
    """Whether the file name ends like a supported format; the file need not exist."""
    return _format_suffix(path) in _READERS


def _format_suffix(path: Path) -> str:
    """The suffix of the format: ``.csv`` for ``train.csv.gz``."""
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    # Parquet has built-in compression.
    return inner if suffix == ".gz" and inner != ".parquet" else suffix


def _absence(path: Path) -> str:
    """A message about an absent file, with the readable files in its folder."""
    folder = path if path.is_dir() else path.parent
    names = [file.name for file in folder.glob("*") if is_readable(file) and file.is_file()]
    nearest = get_close_matches(path.name, names, n=10, cutoff=0.0)
    if path.is_dir():
        return f"{path} is a folder. Name a file in this folder.{did_you_mean('', nearest)}"
    if path.exists():
        return f"{path} is a pipe or a device. Write its rows to a file first, and name that file."
    if not nearest:
        place = folder.resolve()
        why = f"{place} contains no data files" if folder.is_dir() else f"{place} is not a folder"
        return f"No file '{path}': {why}. Check the path."
    return f"No file '{path}'.{did_you_mean(path.name, nearest)}"


def _read_text(path: Path) -> str:
    """Read a UTF-8 file, plain or gzip, without a byte order mark."""
    content = path.read_bytes()
    is_named_gzip = path.suffix.lower() == ".gz"
    if content and content.startswith(b"\x1f\x8b") != is_named_gzip:
        raise SidelightError(
            f"{path.name} is not compressed, although its name ends in .gz. Rename it to "
            f"{path.stem}."
            if is_named_gzip
            else f"{path.name} is compressed with gzip. Rename it to {path.name}.gz."
        )
    return (gzip.decompress(content) if is_named_gzip else content).decode("utf-8-sig")


def _read_delimited(path: Path, *, delimiter: str) -> list[Row]:
    """One row per record after the header (RFC 4180); blank lines are skipped."""
    # The default limit is 131,072 characters and applies to the whole process.
    csv.field_size_limit(2**31 - 1)
    text = _read_text(path)
    header = text.lstrip("\r\n").partition("\n")[0]
    found = next((character for character in ";|\t," if character in header), None)
    if found is not None and delimiter not in header:
        raise SidelightError(
            f"{path.name}, line 1: the columns are separated by {found!r} instead of "
            f"{delimiter!r}. Save the file as .csv with commas, or as .tsv with tabs."
        )
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    names: list[str] = []
    line = 1
    try:
        for record in reader:
            if record and not names:
                names = [name.strip() for name in record]
                twice = next((name for name in names if names.count(name) > 1), None)
                if twice is not None:
                    raise SidelightError(
                        f"{path.name}, line {line}: column '{twice}' appears twice (columns: "
                        f"{', '.join(names)}). Rename or remove one of the two."
                    )
            elif record:
                if len(record) != len(names):
                    raise csv.Error(f"{len(record)} fields, but the header has {len(names)}")
                cells = dict(zip(names, record, strict=True))
                rows.append(Row(f"{path.name}, line {line}", cells))
            line = reader.line_num + 1  # A record may span several lines.
    except csv.Error as error:
        raise SidelightError(
            f"{path.name}, line {line}: {error}. Put quotes around a field that contains quotes, "
            'delimiters or line breaks, and write "" for a quote inside it.'
        ) from error
    return rows


def _read_json_lines(path: Path) -> list[Row]:
    """One row per line; blank lines are skipped."""
    # Not splitlines: a JSON string may contain U+2028, which does not end a line of the file.
    places = ((f"{path.name}, line {n}", s) for n, s in enumerate(_read_text(path).split("\n"), 1))
    return [_row(place, _parse_json(line, place)) for place, line in places if line.strip()]


def _read_json(path: Path) -> list[Row]:
    """One row per element of the file's array."""
    content = _parse_json(_read_text(path).strip() or "[]", path.name)
    if not is_list(content):
        raise SidelightError(
            f"{path.name}: expected one array of objects, got another JSON value. "
            "Write [{...}, {...}], or one object per line in a file that ends in .jsonl."
        )
    return [_row(f"{path.name}, row {n}", cells) for n, cells in enumerate(content, start=1)]


def _parse_json(text: str, place: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SidelightError(
            f"{place}: not valid JSON ({error}). A .jsonl file contains one object per line; a "
            ".json file contains one array of objects."
        ) from error


def _read_parquet(path: Path) -> list[Row]:
    pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    try:
        records = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise SidelightError(
            f"{path.name} is not a complete Parquet file ({error}). Write it again."
        ) from error
    return [Row(f"{path.name}, row {n}", cells) for n, cells in enumerate(records, start=1)]


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".csv": partial(_read_delimited, delimiter=","),
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
    ".tsv": partial(_read_delimited, delimiter="\t"),
}


def _read_hub(source: str, split: str) -> list[Row]:
    """Read all rows of one split of a data set.

    Columns of class numbers become class names if there are three or more classes; with two, they
    stay 0 and 1, so that 1 is the positive class.
    """
    try:
        datasets: Any = import_module("datasets")
    except ImportError as error:
        raise SidelightError(
            f"{_absence(Path(source))} To read a Hugging Face data set, install the datasets "
            f"package. {how_to_install('.[datasets]')}"
        ) from error
    name, _, config = source.partition(":")
    try:
        table = datasets.load_dataset(name, config or None, split=split)
    except (
        OSError,
        ValueError,
        RuntimeError,  # Raised for data sets that are scripts.
        datasets.exceptions.DatasetsError,
        *transport_errors(),
    ) as error:
        raise SidelightError(
            f"{_absence(Path(source))} Nor can '{source}', split '{split}', be read from the "
            f"Hugging Face hub ({str(error)[:300]}). Check the name, the configuration, the "
            "split and the network, or download the data set and name the file."
        ) from error
    # The hub marks an unlabelled row by -1, as in hidden test sets.
    classes: dict[str, dict[int, str | None]] = {
        column: {-1: None, **dict(enumerate(feature.names if len(feature.names) > 2 else ()))}
        for column, feature in table.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    rows = [
        Row(
            f"{source}, row {n}",
            {**cells, **{c: names.get(cells[c], cells[c]) for c, names in classes.items()}},
        )
        for n, cells in enumerate(table, start=1)
    ]
    if not rows:
        raise SidelightError(f"'{source}' has no rows in split '{split}'. Name another split.")
    return rows


def _read_memory(source: InMemory, text: str, label: str) -> list[Row]:
    if not source:
        raise SidelightError("There are no rows. Give at least one example.")
    rows: list[Row] = []
    for number, item in enumerate(source, start=1):
        cells: object = item
        if is_list(cells) and len(cells) == 2:
            cells = {text: cells[0], label: cells[1]}
        rows.append(_row(f"Given rows, row {number}", _plain(cells)))
    return rows


def _row(place: str, cells: object) -> Row:
    if not is_mapping(cells):
        raise SidelightError(
            f'{place}: expected an object such as {{"text": "...", "label": "..."}} (or in Python '
            f"a (text, label) pair), got {str(cells)[:60]}."
        )
    return Row(place, cells)


def _plain(value: object) -> object:
    """Convert NumPy arrays and scalars to plain Python values."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if is_mapping(value):
        return {name: _plain(cell) for name, cell in value.items()}
    return [_plain(item) for item in value] if is_list(value) else value
