"""A small table on planted data, and what the tests of tables share."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from planted_texts import examples

from sidelight.backbone import TransformersBackbone
from sidelight.data.examples import LabelledExamples
from sidelight.types import TaskKind
from sidelight_lab.datasets import DataSet
from sidelight_lab.tables.context import RecipeContext
from sidelight_lab.tables.recipes import Recipe, parse_recipe
from sidelight_lab.tables.writing import FinishedTable

TABLE = """
title = "Planted"
kind = "comparison"
data = "planted"
metric = "auprc"
ours = ["readout"]
seeds = 2

[[probe]]
name = "pooling"
mechanism = "pooling"
settings = { epochs = 2 }

[[probe]]
name = "readout"
mechanism = "readout"
options = { heads = 2 }
settings = { epochs = 3, learning_rate = 1e-2 }

[[baseline]]
name = "tfidf"
seeds = 1
"""


def recipe(text: str = TABLE) -> Recipe:
    return parse_recipe(text, name="test")


class Data(DataSet):
    """A data set that says when its test part is read, and may be out of reach then."""

    def __init__(
        self,
        kind: TaskKind = "binary",
        *,
        title: str = "Planted",
        training: LabelledExamples | None = None,
        validation: LabelledExamples | None = None,
        tested: LabelledExamples | None = None,
        parts: Mapping[str, np.ndarray] | None = None,
        on_test: Callable[[], None] = lambda: None,
    ):
        self.__dict__.update(
            name="planted",
            title=title,
            training=training or examples(kind, 100, 1),
            validation=validation or examples(kind, 60, 2),
            notes=("Made up for tests.", "3 test rows have a cold."),
            training_notes=("Made up for tests.",),
            test_notes=("3 test rows have a cold.",),
        )
        self._tested = tested or examples(kind, 70, 3)
        self._parts = parts or {}
        self._on_test = on_test

    @property
    def test(self) -> LabelledExamples:
        self._on_test()
        return self._tested

    @property
    def subsets(self) -> Mapping[str, np.ndarray]:
        self._on_test()
        return self._parts


def no_search(*_: object) -> None:
    raise AssertionError("nothing asked for a search")


def context_of(
    backbone: TransformersBackbone,
    directory: Path,
    cache: Path,
    *,
    text: str = TABLE,
    data: DataSet | None = None,
    **given: object,
) -> RecipeContext:
    """A recipe with the planted data, or other data; what is given replaces the rest."""
    usual = {"recipe": recipe(text), "load": lambda _name: data or Data(), "search": no_search}
    return RecipeContext(
        text=text, directory=directory, backbone=backbone, cache_root=cache, **(usual | given)
    )


def stored(folder: Path) -> dict[str, int]:
    """When each stored result was written."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*.npz")}


def rows_of(table: FinishedTable, number: int = 0) -> dict[str, dict]:
    return {row["name"]: row for row in table.to_dict()["tables"][number]["rows"]}
