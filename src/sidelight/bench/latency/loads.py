"""The prompts of a cell of the table, in batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sidelight.backbones import TransformersBackbone
from sidelight.errors import ContextLengthError
from sidelight.prompts import EncodedPrompt, Part

Prompts = tuple[EncodedPrompt, ...]


@dataclass(frozen=True)
class Load:
    """Prompts that are run batch by batch.

    Attributes:
        title: What they are, for example ``512 tokens``.
        batch_size: Prompts of a batch; the last one may be smaller.
        batches: The prompts.
    """

    title: str
    batch_size: int
    batches: tuple[Prompts, ...]

    @property
    def texts(self) -> int:
        """Prompts in all."""
        return sum(map(len, self.batches))

    @property
    def mean_tokens(self) -> float:
        """Of a prompt."""
        return sum(len(prompt) for batch in self.batches for prompt in batch) / self.texts


def synthetic_load(
    backbone: TransformersBackbone, *, batch_size: int, tokens: int, seed: int = 0
) -> Load:
    """One batch of random token ids, all prompts of the same length.

    Args:
        backbone: Gives the vocabulary and the longest prompt.
        batch_size: Prompts.
        tokens: Of each prompt.
        seed: Of the ids.

    Raises:
        ContextLengthError: Longer than the backbone reads.
    """
    limit = backbone.encoder.max_tokens
    if tokens > limit:
        raise ContextLengthError(
            f"A prompt of {tokens} tokens is longer than {backbone.name} reads ({limit}). "
            f"Ask for up to {limit} (--lengths, or 'tokens' in a recipe's [latency])."
        )
    vocabulary = backbone.model.config.get_text_config().vocab_size
    ids = np.random.default_rng(seed).integers(vocabulary, size=(batch_size, tokens))
    parts = (Part.PROMPT,) * tokens
    batch = tuple(EncodedPrompt(tuple(row), parts) for row in ids.tolist())
    return Load(f"{tokens} tokens", batch_size, (batch,))


def prompt_load(prompts: Sequence[EncodedPrompt], *, batch_size: int, title: str) -> Load:
    """Prompts in the given order, as a server meets them: a batch is padded to its longest.

    Args:
        prompts: One or more.
        batch_size: Prompts of a batch.
        title: What they are.
    """
    starts = range(0, len(prompts), batch_size)
    batches = tuple(tuple(prompts[start : start + batch_size]) for start in starts)
    return Load(title, batch_size, batches)
