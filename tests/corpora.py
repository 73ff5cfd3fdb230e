"""Small labelled corpora with a planted signal: a capital letter that decides the class."""

import random
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
ALPHABETS = {"": "abcde", "NUMBER": "123456", "SHOUT": "VWXYZ"}


def planted(kind: TaskKind, count: int, *, seed: int) -> tuple[list[str], np.ndarray]:
    """Texts of random small letters, and the labels that their capitals stand for.

    Binary: X is positive. Multi-class: one capital each. Multi-label: any of the three.
    """
    draw = np.random.default_rng(seed)
    chosen = draw.random((count, 3)) < 0.4
    if kind == "binary":
        chosen[:, 1:] = False
    if kind == "multiclass":
        chosen = np.eye(3, dtype=bool)[draw.integers(0, 3, count)]
    texts: list[str] = []
    for row in chosen:
        letters = draw.choice(_LETTERS, draw.integers(4, 9))
        letters = np.concatenate([letters, np.repeat(np.array(list(SIGNALS))[row], 2)])
        texts.append("t" + "".join(draw.permutation(letters)))
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


def examples(kind: TaskKind, count: int, seed: int) -> LabelledExamples:
    texts, labels = planted(kind, count, seed=seed)
    items = tuple(Example((Message("user", text),)) for text in texts)
    return LabelledExamples(items, ({},) * count, task=TASKS[kind], labels=labels)


def split_of(
    backbone: TransformersBackbone,
    root: Path,
    kind: TaskKind,
    count: int,
    seed: int,
    *,
    reads: Reads | None = None,
    is_extracted: bool = True,
    shard_bytes: int = 500_000,
) -> Split:
    """Planted texts, whose states are in a few shards if they are extracted."""
    texts = examples(kind, count, seed)
    prompts = tuple(backbone.encoder.encode(item.messages) for item in texts.items)
    cache = ActivationCache(
        root,
        prompts,
        reads=reads or Reads(),
        fingerprint=backbone.fingerprint,
        shard_bytes=shard_bytes,
    )
    states = extract(BackboneSource(backbone), cache) if is_extracted else cache
    return Split(texts, prompts, states, np.arange(count))


def span_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Words, of which numbers and shouts are labelled."""
    draw = random.Random(seed)
    made: list[dict[str, Any]] = []
    for _ in range(count):
        text, spans = "", []
        for _ in range(draw.randint(2, 6)):
            label = draw.choice(["", "", "", "NUMBER", "SHOUT"])
            word = "".join(draw.choices(ALPHABETS[label], k=draw.randint(2, 5)))
            if label:
                spans.append({"start": len(text), "end": len(text) + len(word), "label": label})
            text += word + draw.choice([" and ", ", or "])
        made.append({"text": text, "spans": spans})
    return made


def with_curves(probe: Probe) -> Probe:
    """The probe with a curve of each label on 200 texts, better than chance."""
    draw = np.random.default_rng(0)
    curves = {}
    for label in probe.label_thresholds:
        scores = draw.random(200)
        curves[label] = asdict(OperatingCurve.of(scores, draw.random(200) < scores))
    return replace(probe, record={"validation": {"curves": curves}})
