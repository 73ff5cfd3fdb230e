"""Extraction against a plain forward pass over the same batches."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sidelight.backbones import TransformersBackbone
from sidelight.batching import by_length
from sidelight.bench.timing import interleaved, spread
from sidelight.cache import ActivationCache
from sidelight.data import Examples
from sidelight.extraction import extract
from sidelight.fitting import TRAINING_MAX_TOKENS
from sidelight.prompts import EncodedPrompt, Reads


def compare_extraction(
    *, backbone: TransformersBackbone, examples: Examples, repeats: int
) -> dict[str, Any]:
    """Tokens/s of both, and their ratio; each pair runs back to back.

    The plain pass runs the same batches without a tap and keeps nothing.
    """
    prompts = [
        backbone.encoder.encode_any_length(e.messages).shortened(TRAINING_MAX_TOKENS)
        for e in examples.items
    ]
    tokens = sum(len(prompt) for prompt in prompts)
    with tempfile.TemporaryDirectory() as scratch:
        cache = ActivationCache(
            Path(scratch), prompts, reads=Reads(), fingerprint=backbone.fingerprint
        )

        def extraction() -> None:
            cache.remove()
            extract(backbone, cache)

        seconds = interleaved(
            {"plain": lambda: _plain(backbone, prompts, cache), "extract": extraction},
            repeats=repeats,
        )
    pairs = zip(seconds["plain"], seconds["extract"], strict=True)
    return {
        "tokens": tokens,
        "plain tokens/s": spread([tokens / s for s in seconds["plain"]], digits=0),
        "extract tokens/s": spread([tokens / s for s in seconds["extract"]], digits=0),
        "extract / plain": spread([plain / own for plain, own in pairs]),
    }


def _plain(
    backbone: TransformersBackbone, prompts: Sequence[EncodedPrompt], cache: ActivationCache
) -> None:
    for rows in cache.plan.rows:
        for batch in by_length([len(prompts[row]) for row in rows]):
            backbone.run([prompts[rows[i]] for i in batch])
