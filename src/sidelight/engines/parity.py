"""Comparison of the verdicts of two engines: differences, flips, and the jitter within each engine.

An engine batches whatever is waiting, and each batch shape rounds differently. Every engine
therefore classifies the same texts one at a time and in batches, so that the difference between
engines can be compared with the difference within one.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from sidelight.engines.base import Engine, verdict_failure
from sidelight.models.conversation import Message
from sidelight.types import Verdict


@dataclass(frozen=True)
class Difference:
    """The difference between a probe's probabilities on the same texts.

    Attributes:
        between: Two engines, or one engine and two batch sizes.
        largest: Largest difference of a probability, over texts and labels.
        mean: Mean over texts of each text's largest difference.
        median: Median of the same.
        flips: Number of texts with different labels at the probe's thresholds, or flagged on only
            one side.
        texts: Number of classified texts.
        is_of_engines: Whether this compares two engines rather than two batch sizes.
    """

    probe: str
    between: str
    largest: float
    mean: float
    median: float
    flips: int
    texts: int
    is_of_engines: bool


def compare_engines(
    engines: Mapping[str, Callable[[], Engine]],
    conversations: Sequence[Sequence[Message]],
    *,
    batch_sizes: Sequence[int] = (1, 4, 16),
) -> list[Difference]:
    """Compare engines with each other, then each engine across batch sizes.

    Args:
        engines: Factory of each engine; one is closed before the next is created.
        conversations: Two or more texts to classify.
        batch_sizes: Numbers of texts per batch. Engines are compared at the first size.

    Raises:
        VerdictError: A probe gives no verdict on a text.
    """
    probabilities = {
        name: asyncio.run(_classify_in_batches(make, conversations, batch_sizes))
        for name, make in engines.items()
    }
    first = batch_sizes[0]
    pairs = [
        (f"{left} - {right}", probabilities[left][first], probabilities[right][first], True)
        for left, right in combinations(engines, 2)
    ]
    pairs += [
        (
            f"{name}, batch {size} - {first}",
            probabilities[name][size],
            probabilities[name][first],
            False,
        )
        for name in engines
        for size in batch_sizes[1:]
    ]
    return [
        _difference(probe, between, left[probe], right[probe], is_of_engines=is_of_engines)
        for between, left, right, is_of_engines in pairs
        for probe in left
    ]


async def _classify_in_batches(
    make: Callable[[], Engine],
    conversations: Sequence[Sequence[Message]],
    batch_sizes: Sequence[int],
) -> dict[int, dict[str, list[Verdict]]]:
    """Classify the texts; return the verdict on each by batch size and probe."""
    verdicts = {size: defaultdict[str, list[Verdict]](list) for size in batch_sizes}
    engine = await asyncio.to_thread(make)
    await engine.start()
    try:
        for size, by_probe in verdicts.items():
            for start in range(0, len(conversations), size):
                for event in await engine.classify(conversations[start : start + size]):
                    if event.verdicts.failed:
                        raise verdict_failure(event.verdicts.failed)
                    for verdict in event.verdicts.verdicts:
                        by_probe[verdict.probe].append(verdict)
    finally:
        await engine.close()
    return {size: dict(by_probe) for size, by_probe in verdicts.items()}


def _difference(
    probe: str,
    between: str,
    left: Sequence[Verdict],
    right: Sequence[Verdict],
    *,
    is_of_engines: bool,
) -> Difference:
    probabilities = (
        np.array([[*verdict.probabilities.values()] for verdict in verdicts])
        for verdicts in (left, right)
    )
    apart = np.abs(np.subtract(*probabilities)).max(1)
    pairs = zip(left, right, strict=True)
    return Difference(
        probe,
        between,
        largest=float(apart.max()),
        mean=float(apart.mean()),
        median=float(np.median(apart)),
        flips=sum((a.labels, a.flagged) != (b.labels, b.flagged) for a, b in pairs),
        texts=len(left),
        is_of_engines=is_of_engines,
    )
