"""Labelled rows: given, in files of every format, and from a stand-in for the Hugging Face hub."""

import csv
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet

Rows = Sequence[Mapping[str, object]]

ROWS = [
    {"text": "where is my parcel", "label": "delivery"},
    {"text": "the app closes by itself", "label": "fault"},
    {"text": "still no parcel", "label": "delivery"},
    {"text": "screen stays black", "label": "fault"},
]


def labelled(names: Sequence[object]) -> list[tuple[str, object]]:
    return [(f"text {number}", name) for number, name in enumerate(names)]


def _lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _delimited(path: Path, rows: Rows, delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


WRITERS: dict[str, Callable[[Path, Rows], object]] = {
    ".jsonl": lambda path, rows: path.write_bytes(_lines(rows)),
    ".jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(_lines(rows))),
    ".json": lambda path, rows: path.write_text(json.dumps(list(rows))),
    ".csv": lambda path, rows: _delimited(path, rows, ","),
    ".tsv": lambda path, rows: _delimited(path, rows, "\t"),
    ".parquet": lambda path, rows: pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(list(rows)), path
    ),
}


def write(path: Path, rows: Rows) -> Path:
    """Writes the rows in the format that the path's ending names."""
    WRITERS["".join(path.suffixes)](path, rows)
    return path


class ClassLabel:
    """Stands for the type of the same name in the package `datasets`."""

    def __init__(self, names: Sequence[str]):
        self.names = names


class DatasetsError(Exception):
    """Stands for the base of all errors of the package `datasets`."""


class HubTable(list[Mapping[str, object]]):
    """Stands for a loaded split of the package `datasets`."""

    def __init__(self, rows: Rows, **class_names: Sequence[str]):
        super().__init__(rows)
        self.features = {name: ClassLabel(names) for name, names in class_names.items()}


def stand_in_for_datasets(load_dataset: Callable[..., HubTable]) -> SimpleNamespace:
    exceptions = SimpleNamespace(DatasetsError=DatasetsError)
    return SimpleNamespace(
        load_dataset=load_dataset, ClassLabel=ClassLabel, exceptions=exceptions, __spec__="there"
    )
