"""Loads a published data set from its local folder, or else from the Hugging Face hub."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from sidelight.data import Examples, load_examples
from sidelight.data.readers import read_file
from sidelight.data.rows import column_names
from sidelight.datasets.assembling import assemble
from sidelight.datasets.base import DataSet, Splits
from sidelight.datasets.folders import FORMATS, VARIABLE, default_root, split_file
from sidelight.datasets.notes import count_notes
from sidelight.datasets.publication import Columns, Layout, Part, Published
from sidelight.datasets.registry import published
from sidelight.errors import SidelightError
from sidelight.types import Task

_Reader = Callable[[Part, Task | None], Examples]


def load_data_set(name: str, *, root: Path | None = None) -> DataSet:
    """A published data set in its official splits.

    Args:
        name: One of `data_set_names()`.
        root: Folder that has one folder per data set, and then nothing else is tried. None means
            `SIDELIGHT_DATA`, else `../shared/data` beside the checkout; a set that has no folder
            there comes from the Hugging Face hub, through the extra `datasets`.

    Raises:
        SidelightError: The name is unknown, the data is nowhere, or a row is malformed; the message
            names the place and the remedy.
    """
    entry = published(name)
    folder = (default_root() if root is None else root) / entry.folder
    if folder.is_dir():
        return _load(entry, entry.local, _local_reader(entry, folder))
    if root is not None:
        raise SidelightError(f"{_absence(entry, folder)} Put the files there.")
    put = f"Put the files there, or set {VARIABLE} to the folder that holds '{entry.folder}'"
    if find_spec("datasets") is None:
        raise SidelightError(
            f"{_absence(entry, folder)} {put}, or run `pip install 'sidelight[datasets]'` to read "
            "them from the Hugging Face hub."
        )
    try:
        return _load(entry, entry.hub, _hub_reader(entry))
    except SidelightError as error:
        raise SidelightError(
            f"{_absence(entry, folder)} Nor does the hub give it: {error} {put}."
        ) from error


def _absence(entry: Published, folder: Path) -> str:
    layout = entry.local
    parts = [part for part in (layout.training, layout.validation, layout.test) if part]
    names = ", ".join(part.split for part in parts)
    return f"There is no folder '{folder}' with {names}, each as {FORMATS}."


def _load(entry: Published, layout: Layout, read: _Reader) -> DataSet:
    training = read(layout.training, None)
    validation = read(layout.validation, training.task) if layout.validation else None
    splits = Splits(training, validation, read(layout.test, training.task))
    whole = (*layout.notes, *entry.notes)
    return assemble(
        splits,
        name=entry.name,
        title=entry.title,
        subsets=entry.subsets,
        about_training=(
            *count_notes("training", training, layout.training),
            *count_notes("validation", validation, layout.validation),
            *entry.remarks(training),
            *whole,
        ),
        about_test=(*count_notes("test", splits.test, layout.test), *whole),
    )


def _local_reader(entry: Published, folder: Path) -> _Reader:
    def read(part: Part, task: Task | None) -> Examples:
        path = split_file(folder, part.split)
        columns = _columns_of(path, entry.local.columns, entry.hub.columns)
        return _read(path, columns, entry=entry, task=task)

    return read


def _columns_of(path: Path, own: Columns, hub: Columns) -> Columns:
    """The hub's columns where a file has these, as one saved from there does."""
    if own == hub:
        return own
    # Reads the file twice: cheap beside a forward pass over its texts.
    known = set(column_names(read_file(path)))
    return hub if {hub.text, hub.label} <= known and not {own.text, own.label} <= known else own


def _hub_reader(entry: Published) -> _Reader:
    def read(part: Part, task: Task | None) -> Examples:
        source = f"{entry.repository}:{part.config}" if part.config else entry.repository
        return _read(source, entry.hub.columns, entry=entry, task=task, split=part.split)

    return read


def _read(
    source: str | Path,
    columns: Columns,
    *,
    entry: Published,
    task: Task | None,
    split: str | None = None,
) -> Examples:
    return load_examples(
        source,
        text=columns.text,
        label=columns.label,
        split=split,
        positive=entry.positive if task is None else None,
        task=task,
        on_missing_label=entry.on_missing_label,
    )
