"""Labelled texts whose capitals decide the class, with hidden states or without."""

import json
from collections.abc import Sequence
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
