"""The labelled data that a table needs. Training and validation come first, the test part last."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from sidelight.data import Examples


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


@dataclass(frozen=True)
class FirstRows:
    """The first rows of each part of a data set, for a quick try.

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
        return self._first(self.whole.training)

    @property
    def validation(self) -> Examples:
        """See ``LabelledData``."""
        return self._first(self.whole.validation)

    @property
    def test(self) -> Examples:
        """See ``LabelledData``."""
        return self._first(self.whole.test)

    @property
    def subsets(self) -> Mapping[str, Int[np.ndarray, " row"]]:
        """Their rows that are left."""
        cut = {name: rows[rows < self.limit] for name, rows in self.whole.subsets.items()}
        return {name: rows for name, rows in cut.items() if len(rows)}

    @property
    def notes(self) -> Sequence[str]:
        """Those of the whole, and the limit."""
        return (*self.whole.notes, f"Only the first {self.limit} rows of each part were used.")

    def _first(self, examples: Examples) -> Examples:
        return examples.select(range(min(self.limit, len(examples))))
