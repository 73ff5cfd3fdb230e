"""Where local data sets lie: the folder of all, and the file of one split.

What a table must say of the data, from the counts found.

A data set from its splits: holds out validation rows where there are none.

A data set from any labelled files.

Loads a published data set from its local folder, or else from the Hugging Face hub.
"""

import os
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

from sidelight.data.examples import LabelledExamples
from sidelight.data.loading import load_examples
from sidelight.data.readers import is_readable, read_file
from sidelight.data.splitting import validation_share
from sidelight.errors import SidelightError
from sidelight.types import Task
from sidelight_lab.datasets.published import (
    Columns,
    DataSet,
    Layout,
    Part,
    Published,
    Splits,
    Subset,
    find_subsets,
    published,
)

VARIABLE = "SIDELIGHT_DATA"
FORMATS = ".jsonl, .jsonl.gz, .csv or .parquet"

_CHECKOUT = Path(__file__).parents[4]


def default_root() -> Path:
    """The folder that `SIDELIGHT_DATA` names, else `../shared/data` beside the checkout.

    The latter need not exist.

    Raises:
        SidelightError: The variable names something that is no folder.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return _CHECKOUT.parent / "shared" / "data"
    root = Path(named).expanduser()
    if not root.is_dir():
        raise SidelightError(
            f"{VARIABLE} is '{named}', but there is no such folder. Set it to the folder that has "
            "one folder per data set, or unset it."
        )
    return root


def split_file(folder: Path, split: str) -> Path:
    """The one readable file of a split, whatever its format.

    Raises:
        SidelightError: There is none, or more than one.
    """
    files = sorted(path for path in folder.iterdir() if is_readable(path))
    matches = [path for path in files if path.name.partition(".")[0] == split]
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = ", ".join(path.name for path in matches)
        raise SidelightError(f"'{folder}' has several files for '{split}': {names}. Keep one.")
    names = ", ".join(path.name for path in files) or "no readable file"
    raise SidelightError(
        f"'{folder}' lacks the split '{split}': it has {names}. Add it as {split} with the ending "
        f"{FORMATS}."
    )


def count_notes(name: str, examples: LabelledExamples | None, part: Part | None) -> tuple[str, ...]:
    """A split whose number of rows is not the official one."""
    if examples is None or part is None or _rows_read(examples) == part.rows:
        return ()
    rows = _rows_read(examples)
    return (f"The {name} split has {rows:,} rows; the official one has {part.rows:,}.",)


def training_notes(splits: Splits) -> tuple[str, ...]:
    """What loading left out of training and validation, and a missing validation split."""
    skipped = _left_out("training", splits.training)
    if splits.validation is not None:
        return (*skipped, *_left_out("validation", splits.validation))
    percent = 100 * validation_share(len(splits.training))
    held_out = f"There is no validation split: {percent:.0f} % of the training rows are held out."
    return (*skipped, held_out)


def test_notes(splits: Splits) -> tuple[str, ...]:
    """What loading left out of the test."""
    return _left_out("test", splits.test)


def overlap_notes(training: LabelledExamples, test: LabelledExamples) -> tuple[str, ...]:
    """Test texts that were trained on, equal but for case and spacing."""
    seen = _texts(training)
    count = sum(text in seen for text in _texts_in_order(test))
    note = f"{count:,} of {len(test):,} test texts are among the training texts too."
    return (note,) if count else ()


def absence_notes(wanted: Iterable[Subset], found: Iterable[str]) -> tuple[str, ...]:
    """Each subset that the test rows cannot give."""
    known = set(found)
    return tuple(
        f"No test row is known to be of the subset '{subset.name}' (column '{subset.column}')."
        for subset in wanted
        if subset.name not in known
    )


def _rows_read(examples: LabelledExamples) -> int:
    skipped = examples.skipped
    return len(examples) + skipped.empty_text + skipped.missing_label


def _left_out(name: str, examples: LabelledExamples) -> tuple[str, ...]:
    counts = {
        "without a label": examples.skipped.missing_label,
        "without a text": examples.skipped.empty_text,
    }
    return tuple(
        f"{count:,} {name} rows {reason} are left out." for reason, count in counts.items() if count
    )


def _texts(examples: LabelledExamples) -> frozenset[str]:
    return frozenset(_texts_in_order(examples))


def _texts_in_order(examples: LabelledExamples) -> list[str]:
    return [" ".join(item.text.split()).casefold() for item in examples.items]


def assemble(
    splits: Splits,
    *,
    name: str,
    title: str,
    subsets: Iterable[Subset] = (),
    about_training: tuple[str, ...] = (),
    about_test: tuple[str, ...] = (),
) -> DataSet:
    """The data set, with notes on its splits and subsets after the given ones.

    Args:
        splits: As read.
        name: As recipes write it.
        title: As tables show it.
        subsets: Of the test, to look for.
        about_training: Notes on training and validation, and on the set as a whole.
        about_test: Notes on the test, and on the set as a whole.

    Raises:
        SidelightError: Validation rows cannot be held out, or a subset's column holds something
            else than truth values.
    """
    wanted = tuple(subsets)
    found = find_subsets(splits.test, wanted)
    training, validation = splits.training, splits.validation
    if validation is None:
        training, validation = training.split(validation_share(len(training)), seed=0)
    on_training = (*about_training, *training_notes(splits))
    on_test = (*about_test, *test_notes(splits), *absence_notes(wanted, found))
    shared = overlap_notes(splits.training, splits.test)
    return DataSet(
        name=name,
        title=title,
        training=training,
        validation=validation,
        test=splits.test,
        subsets=found,
        notes=tuple(dict.fromkeys((*on_training, *on_test, *shared))),
        training_notes=on_training,
        test_notes=on_test,
    )


def from_files(
    training: str | Path,
    test: str | Path,
    validation: str | Path | None = None,
    *,
    text: str = "text",
    label: str = "label",
    subset: str | None = None,
    positive: str | None = None,
    name: str | None = None,
) -> DataSet:
    """A data set from files that `load_examples` can read; all splits share their columns.

    Args:
        training: File of the training rows, whose labels make the task.
        test: File of the test rows.
        validation: File of the validation rows; None holds some training rows out.
        text: Column of the text.
        label: Column of the label, or names of several columns with commas between them.
        subset: Column of truth values in the test file; the rows where it holds become the subset
            of that name.
        positive: Positive class of a binary task; None infers it as `load_examples` does.
        name: Name and title; None takes them from the names of the files, without endings.

    Raises:
        SidelightError: A file is absent or malformed, has a label that training lacks, or lacks the
            subset's column.
    """
    path = Path(training).expanduser()
    learned = load_examples(path, text=text, label=label, positive=positive)

    def read(file: str | Path) -> LabelledExamples:
        return load_examples(Path(file).expanduser(), text=text, label=label, task=learned.task)

    tested = read(test)
    if subset is not None:
        tested.column(subset)
    splits = Splits(learned, None if validation is None else read(validation), tested)
    own, other = (Path(file).name.partition(".")[0] for file in (training, test))
    title = name or f"{own}, tested on {other}"
    subsets = () if subset is None else (Subset(subset, subset),)
    return assemble(
        splits, name=name or own, title=title, subsets=subsets, about_training=learned.warnings
    )


_Reader = Callable[[Part, Task | None], LabelledExamples]


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
    def read(part: Part, task: Task | None) -> LabelledExamples:
        path = split_file(folder, part.split)
        columns = _columns_of(path, entry.local.columns, entry.hub.columns)
        return _read(path, columns, entry=entry, task=task)

    return read


def _columns_of(path: Path, own: Columns, hub: Columns) -> Columns:
    """The hub's columns where a file has these, as one saved from there does."""
    if own == hub:
        return own
    # Reads the file twice: cheap beside a forward pass over its texts.
    known = {name for row in read_file(path) for name in row.cells}
    return hub if {hub.text, hub.label} <= known and not {own.text, own.label} <= known else own


def _hub_reader(entry: Published) -> _Reader:
    def read(part: Part, task: Task | None) -> LabelledExamples:
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
) -> LabelledExamples:
    return load_examples(
        source,
        text=columns.text,
        label=columns.label,
        split=split,
        positive=entry.positive if task is None else None,
        task=task,
        on_missing_label=entry.on_missing_label,
    )
