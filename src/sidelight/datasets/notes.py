"""What a table must say of the data, from the counts found."""

from collections.abc import Iterable

from sidelight.data import Examples, validation_share
from sidelight.datasets.base import Splits
from sidelight.datasets.publication import Layout, Subset


def count_notes(splits: Splits, layout: Layout) -> tuple[str, ...]:
    """Each split whose number of rows is not the official one."""
    pairs = (
        ("training", splits.training, layout.training),
        ("validation", splits.validation, layout.validation),
        ("test", splits.test, layout.test),
    )
    return tuple(
        f"The {name} split has {_rows_read(examples):,} rows; the official one has {part.rows:,}."
        for name, examples, part in pairs
        if examples is not None and part is not None and _rows_read(examples) != part.rows
    )


def split_notes(splits: Splits) -> tuple[str, ...]:
    """What loading left out, a missing validation split, and test texts that training has too."""
    skipped = (*_left_out("training", splits.training), *_left_out("test", splits.test))
    if splits.validation is None:
        percent = 100 * validation_share(len(splits.training))
        held_out = (
            f"There is no validation split: {percent:.0f} % of the training rows are held out."
        )
        return (*skipped, held_out, *_overlap(splits))
    return (*skipped, *_left_out("validation", splits.validation), *_overlap(splits))


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


def _overlap(splits: Splits) -> tuple[str, ...]:
    """Test texts that were trained on, equal but for case and spacing."""
    seen = _texts(splits.training)
    count = sum(text in seen for text in _texts_in_order(splits.test))
    note = f"{count:,} of {len(splits.test):,} test texts are among the training texts too."
    return (note,) if count else ()


def _texts(examples: Examples) -> frozenset[str]:
    return frozenset(_texts_in_order(examples))


def _texts_in_order(examples: Examples) -> list[str]:
    return [" ".join(item.text.split()).casefold() for item in examples.items]
