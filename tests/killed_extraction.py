"""Extracts a corpus and kills itself in the middle: run by ``test_extraction.py``."""

import os
import signal
import sys
from pathlib import Path

from sidelight.backbone import load_backbone
from sidelight.prompts import Message, Reads
from sidelight.states.cache import ActivationCache
from sidelight.states.extraction import BackboneSource, extract

TEXTS = [f"text number {i} " + "and so on " * (i % 5) for i in range(40)]
SHARD_BYTES = 50_000
PASSES_BEFORE_DEATH = 5


def cache_at(backbone, root: Path) -> ActivationCache:
    return ActivationCache(
        root,
        [backbone.encoder.encode([Message("user", text)]) for text in TEXTS],
        reads=Reads(),
        fingerprint=backbone.fingerprint,
        shard_bytes=SHARD_BYTES,
    )


def main(model: str, root: str) -> None:
    backbone = load_backbone(model, device="cpu")
    passes = 0

    def die(*_: object) -> None:
        nonlocal passes
        passes += 1
        if passes > PASSES_BEFORE_DEATH:
            os.kill(os.getpid(), signal.SIGKILL)

    backbone.model.base_model.register_forward_pre_hook(die)
    extract(BackboneSource(backbone), cache_at(backbone, Path(root)))


if __name__ == "__main__":
    main(*sys.argv[1:])
