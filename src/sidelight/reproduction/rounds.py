"""Which texts each run of a table is fitted to: all of them, or a few-shot draw."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from sidelight.errors import SidelightError
from sidelight.reproduction.recipe import Recipe
from sidelight.study import Split, Study


@dataclass(frozen=True)
class Round:
    """Runs that are fitted to the same texts, so that one read of the cache trains them all.

    Attributes:
        study: The texts.
        seeds: Of the runs.
    """

    study: Study
    seeds: tuple[int, ...]


def make_rounds(recipe: Recipe, study: Study) -> tuple[Round, ...]:
    """One round with every seed, or a round for each few-shot draw.

    A draw has the same number of texts of each class, at most ``labels_per_class``, in training
    and, drawn from the validation split, in validation: a few-shot user has no more to choose by.

    Raises:
        SidelightError: A few-shot table of a multi-label task, or of a class without a text.
    """
    if recipe.kind != "few-shot":
        return (Round(study, tuple(range(recipe.seeds))),)
    if study.task.kind == "multilabel":
        raise SidelightError(
            "A few-shot table draws so many texts of each class, and the texts of a multi-label "
            "task have several. Choose a data set with one label a text."
        )
    return tuple(
        Round(_drawn(study, recipe.labels_per_class, seed=draw), (draw,))
        for draw in range(recipe.draws)
    )


def _drawn(study: Study, count: int, *, seed: int) -> Study:
    random = np.random.default_rng(seed)
    training, validation = (
        split.select(_balanced(split, count, random))
        for split in (study.training, study.validation)
    )
    return Study(study.backbone, training, validation)


def _balanced(split: Split, count: int, random: np.random.Generator) -> Int[np.ndarray, " text"]:
    by_class = [np.flatnonzero(split.labels == label) for label in range(len(split.task.labels))]
    smallest = min(map(len, by_class))
    if smallest == 0:
        raise SidelightError("A class has no text to draw. Use more rows (--limit).")
    drawn = [random.choice(rows, min(count, smallest), replace=False) for rows in by_class]
    return random.permutation(np.concatenate(drawn))
