"""Small labelled texts with planted signals: as examples, files, states, and ready guards.

And tables of the docs.
"""

import csv
import gzip
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from sidelight.data.examples import Example, LabelledExamples
from sidelight.engines.transformers.backbone import TransformersBackbone
from sidelight.models.conversation import EncodedPrompt, Message, Reads
from sidelight.probes.card import CalibrationTexts, TrainingRecord
from sidelight.probes.probe import Probe
from sidelight.states.cache import ActivationCache
from sidelight.states.extraction import extract
from sidelight.statistics.thresholds import OperatingCurve
from sidelight.training import background, contexts
from sidelight.training.dataset import Split
from sidelight.training.settings import SUGGESTED, TrainingSettings
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


def planted_rows(kind: TaskKind, count: int, *, seed: int = 0) -> list[dict[str, Any]]:
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
    states = extract(backbone, cache) if is_extracted else cache
    return Split(texts, states)


def span_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Words, of which numbers and shouts are labelled."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        text, spans = "", []
        for _ in range(draw.randint(2, 6)):
            label = draw.choice(["", "", "", "NUMBER", "SHOUT"])
            word = "".join(draw.choices(ALPHABETS[label], k=draw.randint(2, 5)))
            if label:
                spans.append({"start": len(text), "end": len(text) + len(word), "label": label})
            text += word + draw.choice([" and ", ", or "])
        rows.append({"text": text, "spans": spans})
    return rows


def with_curves(probe: Probe) -> Probe:
    """The probe with a curve of each label on 200 texts, better than chance."""
    draw = np.random.default_rng(0)
    curves = {}
    for label in probe.card.label_thresholds:
        scores = draw.random(200)
        curves[label] = OperatingCurve.of(scores, draw.random(200) < scores)
    training = TrainingRecord(validation=CalibrationTexts(curves=curves))
    return probe.changed(training=training)


Rows = Sequence[Mapping[str, object]]

ROWS = [
    {"text": "where is my parcel", "label": "delivery"},
    {"text": "the app closes by itself", "label": "fault"},
    {"text": "still no parcel", "label": "delivery"},
    {"text": "screen stays black", "label": "fault"},
]


def labelled(names: Sequence[object]) -> list[tuple[str, object]]:
    return [(f"text {number}", name) for number, name in enumerate(names)]


def _lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _delimited(path: Path, rows: Rows, delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


WRITERS: dict[str, Callable[[Path, Rows], object]] = {
    ".jsonl": lambda path, rows: path.write_bytes(_lines(rows)),
    ".jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(_lines(rows))),
    ".json": lambda path, rows: path.write_text(json.dumps(list(rows))),
    ".csv": lambda path, rows: _delimited(path, rows, ","),
    ".tsv": lambda path, rows: _delimited(path, rows, "\t"),
    ".parquet": lambda path, rows: pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(list(rows)), path
    ),
}


def write(path: Path, rows: Rows) -> Path:
    """Writes the rows in the format that the path's ending names."""
    WRITERS["".join(path.suffixes)](path, rows)
    return path


class ClassLabel:
    """Stands for the type of the same name in the package `datasets`."""

    def __init__(self, names: Sequence[str]):
        self.names = names


class DatasetsError(Exception):
    """Stands for the base of all errors of the package `datasets`."""


class HubTable(list[Mapping[str, object]]):
    """Stands for a loaded split of the package `datasets`."""

    def __init__(self, rows: Rows, **class_names: Sequence[str]):
        super().__init__(rows)
        self.features = {name: ClassLabel(names) for name, names in class_names.items()}


def stand_in_for_datasets(load_dataset: Callable[..., HubTable]) -> SimpleNamespace:
    exceptions = SimpleNamespace(DatasetsError=DatasetsError)
    return SimpleNamespace(
        load_dataset=load_dataset, ClassLabel=ClassLabel, exceptions=exceptions, __spec__="there"
    )


GUARD_CARD = """
title = "{name}"
positive = "The text has an X."
reads = "{reads}"
{labels}
noise = "None."
languages = "None."
limits = ["Letters of other alphabets."]
[sources]
planted = {{ licence = "CC0-1.0", where = "written for this test" }}
[tests.unseen]
title = "Other letters"
licence = "CC0-1.0"
where = "written for this test"
"""
GUARD_LABELS = 'labels = ["other", "shouting"]'


def guard_texts(count: int, seed: int = 0) -> list[dict[str, object]]:
    """Binary rows of a guard."""
    return [
        {"text": row["text"], "label": int(row["label"] == "toxic"), "source": "planted"}
        for row in planted_rows("binary", count, seed=seed)
    ]


def guard_answers(count: int, seed: int = 0) -> list[dict[str, object]]:
    return [
        {"text": f"Say {n}.", "response": row["text"], "label": row["label"], "source": "planted"}
        for n, row in enumerate(guard_texts(count, seed))
    ]


def guard_spans(count: int, seed: int = 0) -> list[dict[str, object]]:
    return [{**row, "source": "planted"} for row in span_rows(count, seed)]


def install_guards(
    folder: Path, patch: pytest.MonkeyPatch, package: str = "letter_guards", prefix: str = ""
) -> Path:
    """Installs the guards ``shouts``, ``replies`` and ``letters``; returns the package's folder."""
    home, names = folder / package, ""
    for name, reads, labels, rows_of in (
        ("shouts", "prompt", GUARD_LABELS, guard_texts),
        ("replies", "response", GUARD_LABELS, guard_answers),
        ("letters", "prompt", "", guard_spans),
    ):
        name = f"{prefix}{name}"
        names += f"{name} = {package}\n"
        (home / name).mkdir(parents=True)
        card = GUARD_CARD.format(name=name, reads=reads, labels=labels)
        (home / f"{name}.toml").write_text(card)
        write(home / name / "train.jsonl.gz", rows_of(60))
        write(home / name / "test_unseen.jsonl.gz", rows_of(24, 1))
    (home / "__init__.py").touch()
    about = folder / f"{package}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[sidelight.guards]\n{names}")
    patch.syspath_prepend(str(folder))
    return home


def documented_table(page: str, *columns: str) -> list[dict[str, str]]:
    """The rows of the table of the docs that begins with these columns."""
    head = f"| {' | '.join(columns)} |"
    text = (Path(__file__).parents[2] / "docs" / page).read_text()
    lines = (head + text.split(head)[1].split("\n\n")[0]).splitlines()
    names, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(names, row, strict=True)) for row in rows]


@contextmanager
def little_traffic(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """A few short conversations are packaged, and texts are shown in them a few times."""
    lines = gzip.decompress(background.PACKAGED.read_bytes()).splitlines()[:80]
    rows = [row for row in map(json.loads, lines) if isinstance(row["text"], str)]
    traffic = [json.dumps({**row, "text": row["text"][:80]}) for row in rows]
    (folder / "traffic.jsonl").write_text("\n".join(traffic))
    patch.setattr(background, "PACKAGED", folder / "traffic.jsonl")
    patch.setattr(contexts, "_LEAST_CONTEXT_TOKENS", 2_000)
    yield


@contextmanager
def brief_trainings(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Little background traffic, and one epoch."""
    for mechanism in ("readout", "spans"):
        patch.setitem(SUGGESTED, mechanism, TrainingSettings(epochs=1, least_steps=0))
    with little_traffic(folder, patch):
        yield
