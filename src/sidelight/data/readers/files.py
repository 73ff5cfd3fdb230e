"""Finds the reader for a file by its ending, and helps where there is none."""

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from sidelight.data.readers.delimited_files import read_csv, read_tsv
from sidelight.data.readers.json_files import read_json, read_json_lines
from sidelight.data.readers.parquet_files import read_parquet
from sidelight.data.rows import Row
from sidelight.errors import SidelightError, did_you_mean

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
