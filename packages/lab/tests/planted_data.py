"""Planted texts, whose capitals decide the class, and a small table on them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from sidelight.data.examples import LabelledExamples
from sidelight.engines.transformers.backbone import TransformersBackbone
from sidelight.training.preparing import ProbeDataset
from sidelight.types import TaskKind
from sidelight_lab.datasets import DataSet
from sidelight_lab.tables.recipes import Recipe, parse_recipe
from sidelight_lab.tables.reproduce import RecipeContext
from sidelight_lab.tables.writing import FinishedTable
from worlds.data import examples, planted, split_of


def dataset_without_states(
    backbone: TransformersBackbone,
    root: Path,
    kind: TaskKind = "binary",
    *,
    training: int = 160,
    validation: int = 60,
) -> ProbeDataset:
    """So many texts of each; nothing is extracted."""
    splits = (
        split_of(backbone, root, kind, count, seed, is_extracted=False)
        for seed, count in enumerate((training, validation))
    )
    return ProbeDataset.held_out(backbone, *splits)


def tiny_bert(folder: Path, letters: Sequence[str]) -> str:
    """The folder of a BERT of random weights that reads these letters."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    vocabulary = {word: index for index, word in enumerate(words)}
    BertTokenizerFast(vocab=vocabulary, do_lower_case=False).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), **sizes, **layers)).save_pretrained(folder)
    return str(folder)


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
        splits: Mapping[str, np.ndarray] | None = None,
        on_test: Callable[[], None] = lambda: None,
    ):
        self.__dict__.update(
            title=title,
            training=training or examples(kind, 100, 1),
            validation=validation or examples(kind, 60, 2),
            notes=("Made up for tests.", "3 test rows have a cold."),
        )
        self._tested = tested or examples(kind, 70, 3)
        self._splits = splits or {}
        self._on_test = on_test

    @property
    def test(self) -> LabelledExamples:
        self._on_test()
        return self._tested

    @property
    def subsets(self) -> Mapping[str, np.ndarray]:
        self._on_test()
        return self._splits


def context_of(
    backbone: TransformersBackbone,
    directory: Path,
    cache: Path,
    *,
    text: str = TABLE,
    data: DataSet | None = None,
    **options: object,
) -> RecipeContext:
    """A recipe with the planted data, or other data; what is given replaces the rest."""
    usual = {"recipe": recipe(text), "load": lambda _name: data or Data()}
    return RecipeContext(
        text=text, directory=directory, backbone=backbone, cache_root=cache, **(usual | options)
    )


def stored(folder: Path) -> dict[str, int]:
    """When each stored result was written."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*.npz")}


def rows_of(table: FinishedTable, number: int = 0) -> dict[str, dict]:
    return {row["name"]: row for row in table.to_dict()["tables"][number]["rows"]}
