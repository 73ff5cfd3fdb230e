"""The task that a column of label names makes. Knows no rows and no files."""

from collections import Counter
from collections.abc import Iterable, Sequence

from sidelight.data.label_names import TRUTH, label_index, sorted_labels
from sidelight.errors import SidelightError, did_you_mean
from sidelight.types import Task

MOST_LABELS = 200
_SIGNS = {"-1", "1"}


def infer_task(names: Sequence[str], *, column: str, positive: str | None) -> Task:
    """A binary task from two distinct names, a multi-class one from more.

    Args:
        names: The label of each row.
        column: Where they stood, for error messages.
        positive: The positive class; None means 1 (of 0/1 or -1/1), true or yes, else the rarer
            name, else the last in the alphabet.

    Raises:
        SidelightError: There is one name only, there are too many to be classes, or `positive` is
            none of two.
    """
    if set(names) <= TRUTH.keys():
        pair = _truth_pair(set(names))
        names = [pair[TRUTH[name]] for name in names]
    counts = Counter(names)
    _require_classes(counts, column)
    labels = sorted_labels(counts)
    if len(labels) == 2:
        return Task("binary", _ordered_pair(labels, counts, positive))
    if positive is not None:
        raise SidelightError(
            f"positive='{positive}' is for two classes, but column '{column}' has {len(labels)}: "
            f"{', '.join(labels)}. Leave it out."
        )
    return Task("multiclass", labels)


def guess_warning(task: Task) -> tuple[str, ...]:
    """What to tell the user whose positive class was chosen by count; nothing otherwise."""
    if task.kind != "binary" or _says_truth(task.labels):
        return ()
    negative, positive = task.labels
    return (
        f"No positive class was named: '{positive}' is taken (the rarer label; of two equal ones "
        f"the last in the alphabet). --positive {negative} (positive= in Python) chooses the "
        "other.",
    )


def _says_truth(labels: tuple[str, ...]) -> bool:
    """Whether two names say by themselves which is positive; -1 does so beside 1 only."""
    return set(labels) <= TRUTH.keys() or set(labels) == _SIGNS


def _truth_pair(names: Iterable[str]) -> tuple[str, str]:
    """The pair of names that the column spells; 0 and 1 where it mixes spellings."""
    pairs = (("0", "1"), ("false", "true"), ("no", "yes"))
    return next((pair for pair in pairs if set(names) <= set(pair)), pairs[0])


def _ordered_pair(
    labels: tuple[str, ...], counts: Counter[str], positive: str | None
) -> tuple[str, ...]:
    if positive is not None:
        return _with_positive(labels, positive)
    if _says_truth(labels):
        return labels
    # The sort is stable and labels are in order: of two equal counts the last one is positive.
    return tuple(sorted(labels, key=lambda name: -counts[name]))


def _with_positive(labels: tuple[str, ...], positive: str) -> tuple[str, ...]:
    index = label_index(Task("binary", labels))
    name = positive if positive in index else positive.lower()
    if name not in index:
        raise SidelightError(f"positive='{positive}' is no label.{did_you_mean(positive, labels)}")
    return labels if index[name] == 1 else labels[::-1]


def _require_classes(counts: Counter[str], column: str) -> None:
    rows = counts.total()
    if len(counts) == 1:
        raise SidelightError(
            f"Column '{column}' holds one label only, '{next(iter(counts))}', in all {rows} rows. "
            "Add examples of another class."
        )
    if len(counts) > min(MOST_LABELS, max(2, rows / 2)):
        shown = ", ".join(repr(name[:20]) for name in list(counts)[:3])
        raise SidelightError(
            f"Column '{column}' holds {len(counts)} distinct values in {rows} rows ({shown}, ...): "
            "that looks like free text or a measurement, not classes. Name the column of labels, "
            f"and give at least two examples of each, at most {MOST_LABELS} labels."
        )
