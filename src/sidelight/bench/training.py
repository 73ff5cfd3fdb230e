"""Training all mechanisms with several seeds against the extraction that feeds them."""

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sidelight.backbones import TransformersBackbone
from sidelight.bench.timing import interleaved, spread
from sidelight.cache import ActivationCache
from sidelight.data import Examples
from sidelight.extraction import BackboneSource, extract
from sidelight.fitting import TRAINING_MAX_TOKENS
from sidelight.mechanisms import mechanism_names, mechanism_spec
from sidelight.prompts import Reads
from sidelight.training import Job, TrainingSet, suggested_settings, train_mechanisms


def compare_training(
    *, backbone: TransformersBackbone, examples: Examples, repeats: int, seeds: int
) -> dict[str, Any]:
    """Seconds of one extraction, of training each mechanism from it, and of all together."""
    parts = examples.split(0.15, seed=0)
    assert examples.task is not None
    task = examples.task
    with tempfile.TemporaryDirectory() as scratch:
        caches = [_uncached(backbone, part, Path(scratch)) for part in parts]
        training, validation = map(_labelled, caches, parts)

        def extraction() -> None:
            for cache in caches:
                cache.remove()
                extract(BackboneSource(backbone), cache)

        def train(names: Sequence[str]) -> None:
            train_mechanisms(
                _jobs(names, seeds),
                task=task,
                training=training,
                validation=validation,
                device=backbone.device,
            )

        names = mechanism_names()
        each = {name: partial(train, [name]) for name in names}
        seconds = interleaved(
            {"extract": extraction, **each, "all": partial(train, names)}, repeats=repeats
        )
    extracted = seconds.pop("extract")
    return {
        "texts": len(examples),
        "seeds": seeds,
        "extract s": spread(extracted, digits=1),
        **{f"{name} s": spread(own, digits=1) for name, own in seconds.items()},
        **{
            f"{name} / extract": spread([a / b for a, b in zip(own, extracted, strict=True)])
            for name, own in seconds.items()
        },
    }


def _jobs(names: Sequence[str], seeds: int) -> list[Job]:
    return [
        Job(mechanism_spec(name), seed, suggested_settings(name))
        for name in names
        for seed in range(seeds)
    ]


def _uncached(backbone: TransformersBackbone, examples: Examples, root: Path) -> ActivationCache:
    prompts = [
        backbone.encoder.encode_any_length(e.messages).shortened(TRAINING_MAX_TOKENS)
        for e in examples.items
    ]
    return ActivationCache(root, prompts, reads=Reads(), fingerprint=backbone.fingerprint)


def _labelled(cache: ActivationCache, examples: Examples) -> TrainingSet:
    assert examples.labels is not None
    return TrainingSet(cache, examples.labels)
