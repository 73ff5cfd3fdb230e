"""Which test rows belong to a named subset, by a column of truth values."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from sidelight.data import Examples
from sidelight.data.truth_values import Truth, truth_values
from sidelight.datasets.publication import Subset


def find_subsets(test: Examples, subsets: Iterable[Subset]) -> dict[str, Int[np.ndarray, " row"]]:
    """Row positions of each subset; those whose column is absent, or that are empty, are left out.

    Raises:
        SidelightError: A cell of the column is neither empty nor a truth value.
    """
    rows = {subset.name: _rows(test, subset) for subset in subsets}
    return {name: positions for name, positions in rows.items() if len(positions)}


def _rows(test: Examples, subset: Subset) -> Int[np.ndarray, " row"]:
    values = truth_values(test, subset.column) or ()
    return np.flatnonzero([value is Truth(subset.holds) for value in values])
