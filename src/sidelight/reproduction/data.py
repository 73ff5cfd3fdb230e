"""The labelled data that a table needs. Training and validation come first, the test part last."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from sidelight.data import Examples
from sidelight.datasets.notes import overlap_notes


@runtime_checkable
class LabelledData(Protocol):
    """A data set in its official splits; ``datasets.DataSet`` is one."""

    @property
    def title(self) -> str:
        """As tables show it."""
        ...

    @property
    def training(self) -> Examples:
        """What parameters are fitted to."""
        ...

    @property
    def validation(self) -> Examples:
        """What everything is chosen on."""
        ...

    @property
    def test(self) -> Examples:
        """What is measured on, once."""
        ...

    @property
    def subsets(self) -> Mapping[str, Int[np.ndarray, " row"]]:
        """Rows of the test part that are reported as well, by name."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What a reader of the table must know of this copy, one sentence each."""
        ...

    @property
    def training_notes(self) -> Sequence[str]:
        """Those of training and validation, and of the set as a whole."""
        ...

    @property
    def test_notes(self) -> Sequence[str]:
        """Those of the test, and of the set as a whole."""
        ...


@dataclass(frozen=True)
class Sampled:
    """Some rows of each part of a data set, for a quick try; see ``Examples.draw``.

    Attributes:
        whole: The data set.
        limit: Rows of each part.
    """

    whole: LabelledData
    limit: int

    @property
    def title(self) -> str:
        """That of the whole."""
        return self.whole.title

    @property
    def training(self) -> Examples:
        """See ``LabelledData``."""
        return self._sample(self.whole.training)

    @property
    def validation(self) -> Examples:
        """See ``LabelledData``."""
        return self._sample(self.whole.validation)

    @property
    def test(self) -> Examples:
        """See ``LabelledData``."""
        return self._sample(self.whole.test)

    @property
    def subsets(self) -> Mapping[str, Int[np.ndarray, " row"]]:
        """Where their rows that were drawn are now."""
        drawn = self.whole.test.draw(self.limit, seed=0)
        left = {
            name: np.flatnonzero(np.isin(drawn, rows)) for name, rows in self.whole.subsets.items()
        }
        return {name: rows for name, rows in left.items() if len(rows)}

    @property
    def notes(self) -> Sequence[str]:
        """Those of the whole, and the limit."""
        return (*self.whole.notes, self._limit)

    @property
    def training_notes(self) -> Sequence[str]:
        """See ``LabelledData``; and the limit."""
        return (*self.whole.training_notes, self._limit)

    @property
    def test_notes(self) -> Sequence[str]:
        """See ``LabelledData``; and the limit."""
        return (*self.whole.test_notes, self._limit)

    @property
    def _limit(self) -> str:
        return f"At most {self.limit} rows of each part were used, drawn at random, class by class."

    def _sample(self, examples: Examples) -> Examples:
        return examples.select(examples.draw(self.limit, seed=0))


def transfer_notes(data: LabelledData, measured: LabelledData) -> tuple[str, ...]:
    """What to know where training texts are of one data set and test texts of another.

    Args:
        data: Trained on.
        measured: Tested on.
    """
    return (
        *(f"{data.title}: {note}" for note in data.training_notes),
        *(f"{measured.title}: {note}" for note in measured.test_notes),
        *overlap_notes(data.training, measured.test),
    )
