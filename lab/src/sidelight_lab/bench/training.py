"""Extraction against a plain forward pass over the same batches, and against another engine.

Training all mechanisms with several seeds against the extraction that feeds them.
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sidelight.backbone import TransformersBackbone
from sidelight.data.examples import Examples
from sidelight.mechanisms.base import mechanism_names, mechanism_spec
from sidelight.prompts import EncodedPrompt, Reads, shared_unread
from sidelight.ragged import by_length
from sidelight.states.cache import ActivationCache, ShardPlan
from sidelight.states.extraction import BackboneSource, StateSource, extract
from sidelight.training.loop import TrainingSet, train_mechanisms
from sidelight.training.settings import TRAINING_MAX_TOKENS, Job, suggested_settings
from sidelight_lab.bench.timing import interleaved, spread


def compare_extraction(
    *,
    backbone: TransformersBackbone,
    examples: Examples,
    repeats: int,
    rival: StateSource | None = None,
) -> dict[str, Any]:
    """Tokens/s of each, and their ratios; what is compared runs back to back.

    The plain pass runs the same batches without a tap and keeps nothing.

    Args:
        backbone: The frozen LLM.
        examples: The texts.
        repeats: Timed rounds.
        rival: Another engine that fills a cache; it is run once before the rounds, untimed.
    """
    prompts = [
        backbone.encoder.encode_any_length(e.messages).shortened(TRAINING_MAX_TOKENS)
        for e in examples.items
    ]
    tokens = sum(len(prompt) for prompt in prompts)
    with tempfile.TemporaryDirectory() as scratch:
        plan = _cache(BackboneSource(backbone), prompts, backbone, Path(scratch)).plan
        fill = partial(_fill, prompts=prompts, backbone=backbone, root=Path(scratch))
        actions: dict[str, Callable[[], object]] = {
            "plain": partial(_plain, backbone, prompts, plan),
            "extract": partial(fill, BackboneSource(backbone)),
        }
        if rival is not None:
            # The first word of an engine's name; its version and options follow.
            name = rival.engine.split()[0]
            actions[name] = partial(fill, rival)
            actions[name]()
        seconds = interleaved(actions, repeats=repeats)
    rates = {name: [tokens / s for s in spent] for name, spent in seconds.items()}
    figures = {f"{name} tokens/s": spread(rate, digits=0) for name, rate in rates.items()}
    ratios = {"extract / plain": _ratio(rates["extract"], rates["plain"])}
    others = rates.keys() - {"plain", "extract"}
    ratios |= {f"{name} / extract": _ratio(rates[name], rates["extract"]) for name in others}
    return {"tokens": tokens, **figures, **ratios}


def _fill(
    source: StateSource,
    *,
    prompts: Sequence[EncodedPrompt],
    backbone: TransformersBackbone,
    root: Path,
) -> None:
    cache = _cache(source, prompts, backbone, root)
    cache.remove()
    extract(source, cache)


def _cache(
    source: StateSource,
    prompts: Sequence[EncodedPrompt],
    backbone: TransformersBackbone,
    root: Path,
) -> ActivationCache:
    return ActivationCache(
        root, prompts, reads=Reads(), fingerprint=backbone.fingerprint, engine=source.engine
    )


def _ratio(rates: Sequence[float], others: Sequence[float]) -> str:
    return spread([own / other for own, other in zip(rates, others, strict=True)])


def _plain(
    backbone: TransformersBackbone, prompts: Sequence[EncodedPrompt], plan: ShardPlan
) -> None:
    shared = shared_unread(prompts, Reads()) if backbone.can_share_prefixes else 0
    for rows in plan.rows:
        for batch in by_length([len(prompts[row]) - shared for row in rows]):
            backbone.run([prompts[rows[i]] for i in batch], after=shared)


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
