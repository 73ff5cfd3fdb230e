"""Fills an activation cache: one forward pass over every text of a data set."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from sidelight.backbones import Backbone
from sidelight.batching import by_length
from sidelight.cache import ActivationCache, Shard
from sidelight.progress import Progress, progress


def extract(
    backbone: Backbone, cache: ActivationCache, *, budget_bytes: int | None = None
) -> ActivationCache:
    """Writes the shards that are missing; a second call after a kill does only the rest.

    Raises:
        SidelightError: The shards would not fit the disk or the budget.
    """
    cache.prepare(budget_bytes=budget_bytes)
    missing = cache.missing()
    total = sum(len(cache.prompts[row]) for index in missing for row in cache.plan.rows[index])
    # Writing overlaps the next shard's forward passes; one at a time, so two shards are in memory.
    with ThreadPoolExecutor(1) as writer, progress("Extracting", total, unit="tokens") as shown:
        pending: Future[None] | None = None
        for index in missing:
            shard = _extract_shard(backbone, cache, index, shown)
            if pending is not None:
                pending.result()
            pending = writer.submit(cache.write, index, shard)
        if pending is not None:
            pending.result()
    return cache


def _extract_shard(
    backbone: Backbone, cache: ActivationCache, index: int, shown: Progress
) -> Shard:
    rows = cache.plan.rows[index]
    sizes = backbone.fingerprint
    hidden = torch.empty(sizes.layers, cache.plan.tokens[index], sizes.width, dtype=torch.bfloat16)
    lengths: list[int] = []
    order: list[int] = []
    start = 0
    for batch in by_length([len(cache.prompts[row]) for row in rows]):
        chosen = [cache.prompts[rows[i]] for i in batch]
        read = [prompt.mask(cache.reads) for prompt in chosen]
        tokens = int(sum(mask.sum() for mask in read))
        tap = _CopyTap(hidden[:, start : start + tokens], _positions(read))
        with backbone.tapped(tap):
            backbone.run(chosen)
        start += tokens
        order += [rows[i] for i in batch]
        lengths += [int(mask.sum()) for mask in read]
        shown.advance(sum(len(prompt) for prompt in chosen))
    return Shard(hidden, torch.tensor(lengths), torch.tensor(order))


class _CopyTap:
    """Copies the read tokens of each layer to where they belong in the shard."""

    def __init__(
        self, target: BFloat16[Tensor, "layer read width"], positions: Int[Tensor, " read"]
    ):
        self._target = target
        self._positions = positions

    def __call__(self, layer: int, hidden: Float[Tensor, "batch token width"]) -> None:
        flat = hidden.flatten(0, 1)
        self._target[layer].copy_(flat[self._positions.to(flat.device)])


def _positions(masks: Sequence[Tensor]) -> Int[Tensor, " read"]:
    """Where the read tokens are in the flattened right-padded batch."""
    padded = torch.nn.utils.rnn.pad_sequence(list(masks), batch_first=True, padding_value=0)
    return padded.flatten().nonzero()[:, 0]
