"""How a published data set is described: what it is called, where it lies, how many rows it has."""

from collections.abc import Callable
from dataclasses import dataclass

from sidelight.data import Examples
from sidelight.data.loading import OnMissingLabel


@dataclass(frozen=True)
class Columns:
    """Where the text and its label stand in a row."""

    text: str
    label: str


@dataclass(frozen=True)
class Part:
    """One published split.

    Attributes:
        split: The file's name without its ending, or the hub's name of the split.
        rows: How many rows the official split has, unlabelled ones among them.
        config: The hub's configuration; None means the only or default one.
    """

    split: str
    rows: int
    config: str | None = None


@dataclass(frozen=True)
class Layout:
    """How one form of a data set, local or on the hub, is laid out.

    Attributes:
        columns: The columns of every split.
        training: The training split.
        test: The test split.
        validation: None where there is no official one.
        notes: What must be known of this form, one sentence each.
    """

    columns: Columns
    training: Part
    test: Part
    validation: Part | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subset:
    """The test rows where a column of truth values holds, or where it does not.

    Attributes:
        name: As tables show it.
        column: The column of 0/1, true/false or yes/no.
        holds: Which of the two values chooses a row.
    """

    name: str
    column: str
    holds: bool = True


def no_remarks(_: Examples) -> tuple[str, ...]:
    """Nothing to say of the training split."""
    return ()


@dataclass(frozen=True)
class Published:
    """A data set as its authors published it.

    Attributes:
        name: As recipes write it.
        title: As tables show it.
        folder: Name of its local folder.
        repository: Its name on the Hugging Face hub.
        local: Layout of the local folder.
        hub: Layout on the hub.
        notes: What must be known of every form, one sentence each.
        positive: The positive class; None where the labels tell.
        on_missing_label: Whether unlabelled rows are an error, or are left out and counted.
        subsets: Parts of the test split that are reported on their own.
        remarks: Notes that depend on the whole training split as read.
    """

    name: str
    title: str
    folder: str
    repository: str
    local: Layout
    hub: Layout
    notes: tuple[str, ...]
    positive: str | None = None
    on_missing_label: OnMissingLabel = "error"
    subsets: tuple[Subset, ...] = ()
    remarks: Callable[[Examples], tuple[str, ...]] = no_remarks
