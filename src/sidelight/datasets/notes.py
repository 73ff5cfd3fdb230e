"""What a table must say of the data, from the counts found."""

from collections.abc import Iterable

from sidelight.data import Examples, validation_share
from sidelight.datasets.base import Splits
from sidelight.datasets.publication import Part, Subset


def count_notes(name: str, examples: Examples | None, part: Part | None) -> tuple[str, ...]:
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


def overlap_notes(training: Examples, test: Examples) -> tuple[str, ...]:
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


def _rows_read(examples: Examples) -> int:
    skipped = examples.skipped
    return len(examples) + skipped.empty_text + skipped.missing_label


def _left_out(name: str, examples: Examples) -> tuple[str, ...]:
    counts = {
        "without a label": examples.skipped.missing_label,
        "without a text": examples.skipped.empty_text,
    }
    return tuple(
        f"{count:,} {name} rows {reason} are left out." for reason, count in counts.items() if count
    )


def _texts(examples: Examples) -> frozenset[str]:
    return frozenset(_texts_in_order(examples))


def _texts_in_order(examples: Examples) -> list[str]:
    return [" ".join(item.text.split()).casefold() for item in examples.items]
