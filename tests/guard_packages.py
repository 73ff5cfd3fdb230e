"""A package of small ready guards, whose texts have planted signals."""

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from corpora import rows, span_rows

CARD = """
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
LABELS = 'labels = ["other", "shouting"]'


def texts(count: int, seed: int = 0) -> list[dict[str, object]]:
    """Binary rows of a guard."""
    return [
        {"text": row["text"], "label": int(row["label"] == "toxic"), "source": "planted"}
        for row in rows("binary", count, seed=seed)
    ]


def answers(count: int, seed: int = 0) -> list[dict[str, object]]:
    return [
        {"text": f"Say {n}.", "response": row["text"], "label": row["label"], "source": "planted"}
        for n, row in enumerate(texts(count, seed))
    ]


def spans(count: int, seed: int = 0) -> list[dict[str, object]]:
    return [{**row, "source": "planted"} for row in span_rows(count, seed)]


def install(
    folder: Path, patch: pytest.MonkeyPatch, package: str = "letter_guards", prefix: str = ""
) -> Path:
    """Installs the guards ``shouts``, ``replies`` and ``letters``; returns the package's folder."""
    home, names = folder / package, ""
    for name, reads, labels, made in (
        ("shouts", "prompt", LABELS, texts),
        ("replies", "response", LABELS, answers),
        ("letters", "prompt", "", spans),
    ):
        name = f"{prefix}{name}"
        names += f"{name} = {package}\n"
        (home / name).mkdir(parents=True)
        card = CARD.format(name=name, reads=reads, labels=labels)
        (home / f"{name}.toml").write_text(card)
        write(home / name / "train.jsonl.gz", made(60))
        write(home / name / "test_unseen.jsonl.gz", made(24, 1))
    (home / "__init__.py").touch()
    about = folder / f"{package}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[sidelight.guards]\n{names}")
    patch.syspath_prepend(str(folder))
    return home


def write(path: Path, made: Iterable[Mapping[str, object]]) -> str:
    """Rows as a file of JSON lines."""
    lines = "".join(json.dumps(row) + "\n" for row in made).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)
