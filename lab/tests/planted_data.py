"""Planted texts, whose capitals decide the class, and a small table on them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from corpora import TASKS, planted
from sidelight.backbone import TransformersBackbone
from sidelight.data.examples import Example, LabelledExamples
from sidelight.prompts import Message, Reads
from sidelight.states.cache import ActivationCache
from sidelight.training.dataset import ProbeDataset, Split, make_split
from sidelight.training.settings import FitOptions
from sidelight.types import TaskKind
from sidelight_lab.datasets import DataSet
from sidelight_lab.tables.recipes import Recipe, parse_recipe
from sidelight_lab.tables.reproduce import RecipeContext
from sidelight_lab.tables.writing import FinishedTable


def examples(kind: TaskKind, count: int, seed: int) -> LabelledExamples:
    texts, labels = planted(kind, count, seed=seed)
    items = tuple(Example((Message("user", text),)) for text in texts)
    rows = tuple({"text": text} for text in texts)
    return LabelledExamples(items, rows, task=TASKS[kind], labels=labels)


def split_of(
    backbone: TransformersBackbone,
    root: Path,
    kind: TaskKind,
    count: int,
    seed: int,
    *,
    reads: Reads | None = None,
) -> Split:
    """Extracted texts."""
    options = FitOptions(reads=reads or Reads(), max_tokens=256, cache_root=root)
    return make_split(backbone, examples(kind, count, seed), options)


def dataset_without_states(
    backbone: TransformersBackbone,
    root: Path,
    kind: TaskKind = "binary",
    *,
    training: int = 160,
    validation: int = 60,
) -> ProbeDataset:
    """So many texts of each; nothing is extracted."""

    def split(count: int, seed: int) -> Split:
        texts = examples(kind, count, seed)
        prompts = tuple(backbone.encoder.encode(item.messages) for item in texts.items)
        states = ActivationCache(root, prompts, reads=Reads(), fingerprint=backbone.fingerprint)
        return Split(texts, prompts, states, np.arange(count))

    return ProbeDataset(backbone, split(training, 0), split(validation, 1))


def write_rows(
    path: Path,
    count: int,
    seed: int,
    *,
    columns: tuple[str, str] = ("text", "toxic"),
    labels: Sequence[object] = (0, 1),
) -> str:
    """The path of a file of binary texts, which are labelled so."""
    texts, numbers = planted("binary", count, seed=seed)
    cells = [(text, labels[int(n)]) for text, n in zip(texts, numbers, strict=True)]
    lines = (json.dumps(dict(zip(columns, row, strict=True))) for row in cells)
    path.write_text("\n".join(lines))
    return str(path)


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
            title=title,
            training=training or examples(kind, 100, 1),
            validation=validation or examples(kind, 60, 2),
            notes=("Made up for tests.", "3 test rows have a cold."),
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
    usual = {"recipe": recipe(text), "load": lambda _name: data or Data()}
    return RecipeContext(
        text=text, directory=directory, backbone=backbone, cache_root=cache, **(usual | given)
    )


def stored(folder: Path) -> dict[str, int]:
    """When each stored result was written."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*.npz")}


def rows_of(table: FinishedTable, number: int = 0) -> dict[str, dict]:
    return {row["name"]: row for row in table.to_dict()["tables"][number]["rows"]}
