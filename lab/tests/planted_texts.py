"""Labelled texts whose capitals decide the class, for baselines that read no hidden states."""

from pathlib import Path

import numpy as np

from corpora import TASKS, planted
from sidelight.backbone import TransformersBackbone
from sidelight.data.examples import Example, LabelledExamples
from sidelight.prompts import Message, Reads
from sidelight.states.cache import ActivationCache
from sidelight.training.dataset import ProbeDataset, Split
from sidelight.types import TaskKind


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
        texts, labels = planted(kind, count, seed=seed)
        items = tuple(Example((Message("user", text),)) for text in texts)
        examples = LabelledExamples(
            items, tuple({} for _ in items), task=TASKS[kind], labels=labels
        )
        prompts = tuple(backbone.encoder.encode(item.messages) for item in items)
        states = ActivationCache(root, prompts, reads=Reads(), fingerprint=backbone.fingerprint)
        return Split(examples, prompts, states, np.arange(count))

    return ProbeDataset(backbone, split(training, 0), split(validation, 1))
