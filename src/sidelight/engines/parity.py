"""Do two engines give the same verdicts? Differences, flips, and the jitter within each engine.

An engine batches as load comes, and each shape of a batch rounds in another way. So every engine
judges the same texts one at a time and together; what differs between engines is read beside what
differs within one.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float

from sidelight.engines.base import Engine
from sidelight.prompts import Message
from sidelight.types import Verdict

Judged = Mapping[str, Sequence[Verdict]]


@dataclass(frozen=True)
class Difference:
    """How far apart the probabilities of one probe on the same texts are.

    Attributes:
        between: Two engines, or one engine and two batch sizes.
        largest: Largest difference of a probability, over texts and labels.
        median: Median over texts of each text's largest difference.
        flips: Texts that get other labels at the probe's thresholds, or are flagged by one only.
        texts: How many were judged.
    """

    probe: str
    between: str
    largest: float
    median: float
    flips: int
    texts: int

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def compare_engines(
    engines: Mapping[str, Callable[[], Engine]],
    conversations: Sequence[Sequence[Message]],
    *,
    batch_sizes: Sequence[int] = (1, 4, 16),
) -> list[Difference]:
    """Differences between engines, then within each.

    Args:
        engines: How to make each; one is closed before the next is made.
        conversations: Texts to judge, two or more.
        batch_sizes: Texts that are judged together; engines are compared at the first.
    """
    judged = {
        name: asyncio.run(_judge_in_batches(make, conversations, batch_sizes))
        for name, make in engines.items()
    }
    first = batch_sizes[0]
    pairs = [
        (f"{one} - {other}", judged[one][first], judged[other][first])
        for one, other in combinations(engines, 2)
    ]
    pairs += [
        (f"{name}, batch {size} - {first}", judged[name][size], judged[name][first])
        for name in engines
        for size in batch_sizes[1:]
    ]
    return [
        _difference(probe, between, one[probe], other[probe])
        for between, one, other in pairs
        for probe in one
    ]


async def _judge_in_batches(
    make: Callable[[], Engine],
    conversations: Sequence[Sequence[Message]],
    batch_sizes: Sequence[int],
) -> dict[int, Judged]:
    engine = await asyncio.to_thread(make)
    await engine.start()
    try:
        return {size: await _judge(engine, conversations, size) for size in batch_sizes}
    finally:
        await engine.close()


async def _judge(engine: Engine, conversations: Sequence[Sequence[Message]], size: int) -> Judged:
    found: dict[str, list[Verdict]] = {}
    for start in range(0, len(conversations), size):
        for judged in await engine.judge(conversations[start : start + size]):
            for verdict in judged.verdicts:
                found.setdefault(verdict.probe, []).append(verdict)
    return found


def _difference(
    probe: str, between: str, one: Sequence[Verdict], other: Sequence[Verdict]
) -> Difference:
    apart = np.abs(_probabilities(one) - _probabilities(other)).max(1)
    pairs = zip(one, other, strict=True)
    return Difference(
        probe,
        between,
        largest=float(apart.max()),
        median=float(np.median(apart)),
        flips=sum((a.labels, a.flagged) != (b.labels, b.flagged) for a, b in pairs),
        texts=len(one),
    )


def _probabilities(verdicts: Sequence[Verdict]) -> Float[np.ndarray, "text label"]:
    return np.array([[*verdict.probabilities.values()] for verdict in verdicts])
