"""Rows from Parquet, through the package pyarrow."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

from sidelight.data.rows import Row
from sidelight.errors import SidelightError


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
