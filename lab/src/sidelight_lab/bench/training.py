"""Compares extraction with a plain forward pass, and training with extraction."""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sidelight.backbone import TransformersBackbone
from sidelight.data.examples import LabelledExamples
from sidelight.mechanisms.base import mechanism_spec
from sidelight.prompts import Reads, shared_unread
from sidelight.ragged import by_length
from sidelight.states.cache import ActivationCache
from sidelight.states.extraction import BackboneSource, StateSource, extract
from sidelight.training.dataset import Split
from sidelight.training.loop import train_mechanisms
from sidelight.training.settings import TRAINING_MAX_TOKENS, Job, suggested_settings
from sidelight_lab.bench.measurement import Range, interleaved, ratios


def compare_extraction(
    backbone: TransformersBackbone,
    examples: LabelledExamples,
    *,
    repeats: int,
    rival: StateSource | None = None,
) -> dict[str, Any]:
    """Tokens/s of extraction and of a plain pass over the same batches, and their ratio.

    The plain pass has no tap and keeps nothing. ``rival`` is another engine that fills a cache; it
    runs once untimed before the rounds.
    """
    with tempfile.TemporaryDirectory() as scratch:
        own = BackboneSource(backbone)
        cache = _cache(own, backbone, examples, scratch)
        prompts = cache.prompts
        shared = shared_unread(prompts, Reads()) if backbone.can_share_prefixes else 0

        def plain() -> None:
            for rows in cache.plan.rows:
                for batch in by_length([len(prompts[row]) - shared for row in rows]):
                    backbone.run([prompts[rows[i]] for i in batch], after=shared)

        actions = {"plain": plain, "extract": partial(_fill, own, [cache])}
        if rival is not None:
            # The engine's name without its version and options.
            name = rival.engine.split()[0]
            actions[name] = partial(_fill, rival, [_cache(rival, backbone, examples, scratch)])
            actions[name]()
        seconds = interleaved(actions, repeats=repeats)
    tokens = sum(map(len, prompts))
    rates = {name: [tokens / s for s in spent] for name, spent in seconds.items()}
    compared = {"extract / plain": ratios(rates["extract"], rates["plain"])}
    for name in rates.keys() - {"plain", "extract"}:
        compared[f"{name} / extract"] = ratios(rates[name], rates["extract"])
    return {
        "tokens": tokens,
        **{f"{name} tokens/s": Range.of(rate).text(0) for name, rate in rates.items()},
        **{name: Range.of(values).text() for name, values in compared.items()},
    }


def compare_training(
    backbone: TransformersBackbone,
    examples: LabelledExamples,
    *,
    repeats: int,
    mechanisms: Sequence[str],
    seeds: int,
) -> dict[str, Any]:
    """Seconds of one extraction, of training each mechanism from it, and of all together."""
    parts = examples.split(0.15, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        source = BackboneSource(backbone)
        caches = [_cache(source, backbone, part, scratch) for part in parts]
        fitted, held_out = (
            Split(part, tuple(cache.prompts), cache, np.arange(len(part)))
            for cache, part in zip(caches, parts, strict=True)
        )

        train = partial(
            train_mechanisms, training=fitted, validation=held_out, device=backbone.device
        )
        jobs = {
            name: [Job(mechanism_spec(name), n, suggested_settings(name)) for n in range(seeds)]
            for name in mechanisms
        }
        # The first round begins with the extraction, so the others find the states.
        actions: dict[str, Callable[[], object]] = {
            "extract": partial(_fill, source, caches),
            **{name: partial(train, own) for name, own in jobs.items()},
            "all": partial(train, [job for own in jobs.values() for job in own]),
        }
        seconds = interleaved(actions, repeats=repeats)
    extracted = seconds.pop("extract")
    return {
        "texts": len(examples),
        "seeds": seeds,
        "extract s": Range.of(extracted).text(1),
        **{f"{name} s": Range.of(own).text(1) for name, own in seconds.items()},
        **{
            f"{name} / extract": Range.of(ratios(own, extracted)).text()
            for name, own in seconds.items()
        },
    }


def _cache(
    source: StateSource, backbone: TransformersBackbone, examples: LabelledExamples, root: str
) -> ActivationCache:
    prompts = [
        backbone.encoder.encode_any_length(item.messages).shortened(TRAINING_MAX_TOKENS)
        for item in examples.items
    ]
    return ActivationCache(
        Path(root), prompts, reads=Reads(), fingerprint=backbone.fingerprint, engine=source.engine
    )


def _fill(source: StateSource, caches: Sequence[ActivationCache]) -> None:
    """Empties the caches and fills them again."""
    for cache in caches:
        cache.remove()
        extract(source, cache)
