"""Training all mechanisms with several seeds against the extraction that feeds them."""

import tempfile
from pathlib import Path
from typing import Any

from sidelight.backbones import TransformersBackbone
from sidelight.bench.timing import interleaved, spread
from sidelight.cache import ActivationCache
from sidelight.data import Examples
from sidelight.extraction import extract
from sidelight.mechanisms import mechanism_names, mechanism_spec
from sidelight.prompts import Reads
from sidelight.training import Job, TrainingSet, suggested_settings, train_mechanisms


def compare_training(
    *, backbone: TransformersBackbone, examples: Examples, repeats: int, seeds: int
) -> dict[str, Any]:
    """Seconds of one extraction and of training everything from it, and their ratio."""
    jobs = [
        Job(mechanism_spec(name), seed, suggested_settings(name))
        for name in mechanism_names()
        for seed in range(seeds)
    ]
    parts = examples.split(0.15, seed=0)
    assert examples.task is not None
    task = examples.task
    with tempfile.TemporaryDirectory() as scratch:
        training, validation = (_uncached(backbone, part, Path(scratch)) for part in parts)

        def extraction() -> None:
            for one in (training, validation):
                one.cache.remove()
                extract(backbone, one.cache)

        def train() -> None:
            train_mechanisms(
                jobs, task=task, training=training, validation=validation, device=backbone.device
            )

        seconds = interleaved({"extract": extraction, "train": train}, repeats=repeats)
    pairs = zip(seconds["extract"], seconds["train"], strict=True)
    return {
        "probes": f"{len(jobs)}: {', '.join(mechanism_names())} x {seeds} seeds",
        "extract s": spread(seconds["extract"], digits=1),
        "train s": spread(seconds["train"], digits=1),
        "train / extract": spread([own / other for other, own in pairs]),
    }


def _uncached(backbone: TransformersBackbone, examples: Examples, root: Path) -> TrainingSet:
    assert examples.labels is not None
    prompts = [
        backbone.encoder.encode_any_length(e.messages).shortened(1024) for e in examples.items
    ]
    cache = ActivationCache(root, prompts, reads=Reads(), fingerprint=backbone.fingerprint)
    return TrainingSet(cache, examples.labels)
