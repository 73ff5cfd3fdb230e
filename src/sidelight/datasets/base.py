"""What a data set is once loaded. Reads nothing."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from sidelight.data import Examples


@dataclass(frozen=True, eq=False)
class DataSet:
    """Examples to train on, to choose by and to measure on, all with the task of the first.

    Attributes:
        name: As recipes write it.
        title: As tables show it.
        training: What probes learn from.
        validation: The official validation split, or training rows that were held out.
        test: Touched once, at the end.
        subsets: Row positions of `test`, by the subset's name; may be empty.
        notes: What is partial, deviates, or must be known of the licence; one sentence each.
        training_notes: Those of training and validation, and of the set as a whole.
        test_notes: Those of the test, and of the set as a whole.
    """

    name: str
    title: str
    training: Examples
    validation: Examples
    test: Examples
    subsets: Mapping[str, Int[np.ndarray, " row"]]
    notes: tuple[str, ...]
    training_notes: tuple[str, ...]
    test_notes: tuple[str, ...]


@dataclass(frozen=True)
class Splits:
    """The splits as read.

    Attributes:
        training: The whole training split.
        validation: None where there is no official one.
        test: The test split.
    """

    training: Examples
    validation: Examples | None
    test: Examples
