"""The labelled data that a table needs. Training and validation come first, the test part last.

Which texts each run of a table is fitted to: all of them, or a few-shot draw.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from sidelight.data.examples import Examples
from sidelight.errors import SidelightError
from sidelight.training.dataset import ProbeDataset, Split
from sidelight_lab.datasets.loading import overlap_notes
from sidelight_lab.tables.recipes import Recipe


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


@dataclass(frozen=True)
class Round:
    """Runs that are fitted to the same texts, so that one read of the cache trains them all.

    Attributes:
        study: The texts.
        seeds: Of the runs.
    """

    dataset: ProbeDataset
    seeds: tuple[int, ...]


def make_rounds(recipe: Recipe, dataset: ProbeDataset) -> tuple[Round, ...]:
    """One round with every seed, or a round for each few-shot draw.

    A draw has the same number of texts of each class, at most ``labels_per_class``, in training
    and, drawn from the validation split, in validation: a few-shot user has no more to choose by.

    Raises:
        SidelightError: A few-shot table of a multi-label task, or of a class without a text.
    """
    if recipe.kind != "few-shot":
        return (Round(dataset, tuple(range(recipe.seeds))),)
    if dataset.task.kind == "multilabel":
        raise SidelightError(
            "A few-shot table draws so many texts of each class, and the texts of a multi-label "
            "task have several. Choose a data set with one label a text."
        )
    return tuple(
        Round(_drawn(dataset, recipe.labels_per_class, seed=draw), (draw,))
        for draw in range(recipe.draws)
    )


def _drawn(dataset: ProbeDataset, count: int, *, seed: int) -> ProbeDataset:
    random = np.random.default_rng(seed)
    training, validation = (
        split.select(_balanced(split, count, random))
        for split in (dataset.training, dataset.validation)
    )
    return ProbeDataset(dataset.backbone, training, validation)


def _balanced(split: Split, count: int, random: np.random.Generator) -> Int[np.ndarray, " text"]:
    by_class = [np.flatnonzero(split.labels == label) for label in range(len(split.task.labels))]
    smallest = min(map(len, by_class))
    if smallest == 0:
        raise SidelightError("A class has no text to draw. Use more rows (--limit).")
    drawn = [random.choice(rows, min(count, smallest), replace=False) for rows in by_class]
    return random.permutation(np.concatenate(drawn))
