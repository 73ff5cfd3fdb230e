"""Small labelled corpora with a planted signal: a capital letter that decides the class."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from sidelight.backbone import TransformersBackbone
from sidelight.data.examples import Example, LabelledExamples
from sidelight.probe import Probe
from sidelight.prompts import EncodedPrompt, Message, Reads
from sidelight.states.cache import ActivationCache
from sidelight.states.extraction import BackboneSource, extract
from sidelight.thresholds import OperatingCurve
from sidelight.training.dataset import Split
from sidelight.types import Task, TaskKind

SIGNALS = "XYZ"
TASKS: dict[TaskKind, Task] = {
    "binary": Task("binary", ("fine", "toxic")),
    "multiclass": Task("multiclass", ("x", "y", "z")),
    "multilabel": Task("multilabel", ("x", "y", "z")),
}
_LETTERS = np.array(list("abcdefgh "))


def planted(kind: TaskKind, count: int, *, seed: int) -> tuple[list[str], np.ndarray]:
    """Texts of random small letters, and the labels that their capitals stand for.

    Binary: X is positive. Multi-class: one capital each. Multi-label: any of the three.
    """
    random = np.random.default_rng(seed)
    chosen = random.random((count, 3)) < 0.4
    if kind == "binary":
        chosen[:, 1:] = False
    if kind == "multiclass":
        chosen = np.eye(3, dtype=bool)[random.integers(0, 3, count)]
    texts: list[str] = []
    for row in chosen:
        letters = random.choice(_LETTERS, random.integers(4, 9))
        letters = np.concatenate([letters, np.repeat(np.array(list(SIGNALS))[row], 2)])
        texts.append("t" + "".join(random.permutation(letters)))
    labels = {"binary": chosen[:, 0], "multiclass": chosen.argmax(1), "multilabel": chosen}[kind]
    return texts, labels.astype(np.int64)


def rows(kind: TaskKind, count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """As rows of a file; no two texts are equal."""
    texts, labels = planted(kind, count, seed=seed)
    names = np.array(TASKS[kind].labels)
    named = [names[label.astype(bool) if kind == "multilabel" else label] for label in labels]
    return [
        {"text": f"{text} {number}", "label": name.tolist()}
        for number, (text, name) in enumerate(zip(texts, named, strict=True))
    ]


def encoded(backbone: TransformersBackbone, texts: list[str]) -> list[EncodedPrompt]:
    """Each text as a conversation of one message."""
    return [backbone.encoder.encode([Message("user", text)]) for text in texts]


def training_set(
    backbone: TransformersBackbone,
    root: Path,
    kind: TaskKind,
    count: int,
    *,
    seed: int,
    shard_bytes: int = 500_000,
) -> Split:
    """An extracted corpus in a few shards."""
    texts, labels = planted(kind, count, seed=seed)
    items = tuple(Example((Message("user", text),)) for text in texts)
    examples = LabelledExamples(items, ({},) * count, task=TASKS[kind], labels=labels)
    prompts = encoded(backbone, texts)
    cache = ActivationCache(
        root, prompts, reads=Reads(), fingerprint=backbone.fingerprint, shard_bytes=shard_bytes
    )
    states = extract(BackboneSource(backbone), cache)
    return Split(examples, tuple(prompts), states, np.arange(count))


def with_curves(probe: Probe) -> Probe:
    """The probe with a curve of each label on 200 texts, better than chance."""
    random = np.random.default_rng(0)
    curves = {}
    for label in probe.label_thresholds:
        scores = random.random(200)
        curves[label] = asdict(OperatingCurve.of(scores, random.random(200) < scores))
    return replace(probe, record={"validation": {"curves": curves}})
