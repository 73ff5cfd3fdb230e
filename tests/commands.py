"""The command line in process, and a backbone and brief trainings for it."""

import gzip
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sidelight.backbone import TransformersBackbone
from sidelight.cli import main
from sidelight.training import background, contexts
from sidelight.training.settings import SUGGESTED, TrainingSettings


def run(*arguments: str) -> int:
    """The exit code of ``sidelight`` with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sidelight", *arguments])
        try:
            main()
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


def saved(backbone: TransformersBackbone, folder: Path) -> str:
    """The folder that the backbone has been saved to, as ``--model`` takes it."""
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return str(folder)


@contextmanager
def brief_trainings(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Little ordinary traffic, and one epoch."""
    lines = gzip.decompress(background.PACKAGED.read_bytes()).splitlines()[:60]
    rows = [row for row in map(json.loads, lines) if isinstance(row["text"], str)]
    traffic = [json.dumps({**row, "text": row["text"][:80]}) for row in rows]
    (folder / "traffic.jsonl").write_text("\n".join(traffic))
    patch.setattr(background, "PACKAGED", folder / "traffic.jsonl")
    patch.setattr(contexts, "_LEAST_CONTEXT_TOKENS", 2_000)
    for mechanism in ("readout", "spans"):
        patch.setitem(SUGGESTED, mechanism, TrainingSettings(epochs=1, least_steps=0))
    background._packaged.cache_clear()
    yield
    background._packaged.cache_clear()
