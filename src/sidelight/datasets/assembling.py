"""A data set from its splits: holds out validation rows where there are none."""

from collections.abc import Iterable

from sidelight.data import validation_share
from sidelight.datasets.base import DataSet, Splits
from sidelight.datasets.notes import absence_notes, split_notes
from sidelight.datasets.publication import Subset
from sidelight.datasets.subsets import find_subsets


def assemble(
    splits: Splits,
    *,
    name: str,
    title: str,
    subsets: Iterable[Subset] = (),
    notes: tuple[str, ...] = (),
) -> DataSet:
    """The data set, with notes on its splits and subsets after the given ones.

    Raises:
        SidelightError: Validation rows cannot be held out, or a subset's column holds something
            else than truth values.
    """
    wanted = tuple(subsets)
    found = find_subsets(splits.test, wanted)
    training, validation = splits.training, splits.validation
    if validation is None:
        training, validation = training.split(validation_share(len(training)), seed=0)
    return DataSet(
        name=name,
        title=title,
        training=training,
        validation=validation,
        test=splits.test,
        subsets=found,
        notes=(*notes, *split_notes(splits), *absence_notes(wanted, found)),
    )
