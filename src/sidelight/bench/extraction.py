"""Extraction against a plain forward pass over the same batches, and against another engine."""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sidelight.backbones import TransformersBackbone
from sidelight.batching import by_length
from sidelight.bench.timing import interleaved, spread
from sidelight.cache import ActivationCache, ShardPlan
from sidelight.data import Examples
from sidelight.extraction import BackboneSource, StateSource, extract
from sidelight.fitting import TRAINING_MAX_TOKENS
from sidelight.prompts import EncodedPrompt, Reads, shared_unread


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
