"""A data set from any labelled files."""

from pathlib import Path

from sidelight.data import Examples, load_examples
from sidelight.datasets.assembling import assemble
from sidelight.datasets.base import DataSet, Splits
from sidelight.datasets.publication import Subset


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

    def read(file: str | Path) -> Examples:
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
