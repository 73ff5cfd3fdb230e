"""A data set from its splits: holds out validation rows where there are none."""

from collections.abc import Iterable

from sidelight.data import validation_share
from sidelight.datasets.base import DataSet, Splits
from sidelight.datasets.notes import absence_notes, overlap_notes, test_notes, training_notes
from sidelight.datasets.publication import Subset
from sidelight.datasets.subsets import find_subsets


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
