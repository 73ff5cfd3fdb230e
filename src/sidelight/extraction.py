"""Fills an activation cache: one forward pass over every text of a data set."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sidelight.backbones import Backbone
from sidelight.batching import by_length
from sidelight.cache import ActivationCache, Shard
from sidelight.progress import Progress, progress
from sidelight.prompts import shared_unread


def extract(
    backbone: Backbone,
    cache: ActivationCache,
    *,
    budget_bytes: int | None = None,
    title: str = "Extracting",
) -> ActivationCache:
    """Writes the shards that are missing; a second call after a kill does only the rest.

    Args:
        backbone: What gives the hidden states.
        cache: What is filled.
        budget_bytes: The most that the cache may take; None allows what the disk has.
        title: Of the progress bar.

    Raises:
        SidelightError: The shards would not fit the disk or the budget.
    """
    cache.prepare(budget_bytes=budget_bytes)
    missing = cache.missing()
    if not missing:
        return cache
    shared = shared_unread(cache.prompts, cache.reads) if backbone.can_share_prefixes else 0
    total = sum(len(cache.prompts[row]) for index in missing for row in cache.plan.rows[index])
    # Writing overlaps the next shard's forward passes; one at a time, so two shards are in memory.
    with ThreadPoolExecutor(1) as writer, progress(title, total, unit="tokens") as shown:
        pending: Future[None] | None = None
        for index in missing:
            shard = _extract_shard(backbone, cache, index, shown, shared=shared)
            if pending is not None:
                pending.result()
            pending = writer.submit(cache.write, index, shard)
        if pending is not None:
            pending.result()
    return cache


def _extract_shard(
    backbone: Backbone, cache: ActivationCache, index: int, shown: Progress, *, shared: int
) -> Shard:
    """The shard's texts in the plan's random order, whatever order the batches ran in."""
    rows = cache.plan.rows[index]
    prompts = [cache.prompts[row] for row in rows]
    read = [prompt.mask(cache.reads) for prompt in prompts]
    lengths = torch.tensor([int(mask.sum()) for mask in read])
    starts = (lengths.cumsum(0) - lengths).tolist()
    sizes = backbone.fingerprint
    hidden = torch.empty(sizes.layers, int(lengths.sum()), sizes.width, dtype=torch.bfloat16)
    for batch in by_length([len(prompt) - shared for prompt in prompts]):
        tap = _CopyTap(hidden, [(read[i][shared:], starts[i]) for i in batch])
        with backbone.tapped(tap):
            backbone.run([prompts[i] for i in batch], after=shared)
        shown.advance(sum(len(prompts[i]) for i in batch))
    return Shard(hidden, lengths, torch.tensor(rows))


class _CopyTap:
    """Copies the read tokens of each layer to where they belong in the shard.

    Args:
        target: The shard's states.
        texts: For each text of the batch, which tokens are read and where they go.
    """

    def __init__(
        self,
        target: Float[Tensor, "layer token width"],
        texts: Sequence[tuple[Bool[Tensor, " _"], int]],
    ):
        self._target = target
        self._texts = [(_as_slice(mask.nonzero()[:, 0]), start) for mask, start in texts]

    def __call__(self, layer: int, hidden: Float[Tensor, "batch token width"]) -> None:
        for text, (read, start) in zip(hidden, self._texts, strict=True):
            rows = text[read]
            self._target[layer, start : start + len(rows)].copy_(rows)


def _as_slice(positions: Int[Tensor, " read"]) -> slice | Int[Tensor, " read"]:
    """Neighbouring positions as a slice, which is a view where an index would be a copy."""
    if len(positions) == 0:
        return slice(0, 0)
    first, last = int(positions[0]), int(positions[-1])
    return slice(first, last + 1) if last - first + 1 == len(positions) else positions
