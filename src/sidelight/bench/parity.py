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

from sidelight.engines import Engine
from sidelight.prompts import Message

Probabilities = Float[np.ndarray, "text label"]


@dataclass(frozen=True)
class Difference:
    """How far the probabilities of one probe on the same texts are apart.

    Attributes:
        probe: Its name.
        between: Two engines, or one engine and two batch sizes.
        largest: Largest difference of a probability, over texts and labels.
        median: Median over texts of each text's largest difference.
        flips: Texts that get another most probable label.
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
) -> dict[int, dict[str, Probabilities]]:
    engine = await asyncio.to_thread(make)
    await engine.start()
    try:
        return {size: await _judge(engine, conversations, size) for size in batch_sizes}
    finally:
        await engine.close()


async def _judge(
    engine: Engine, conversations: Sequence[Sequence[Message]], size: int
) -> dict[str, Probabilities]:
    rows: dict[str, list[list[float]]] = {}
    for start in range(0, len(conversations), size):
        for judged in await engine.judge(conversations[start : start + size]):
            for verdict in judged.verdicts:
                rows.setdefault(verdict.probe, []).append([*verdict.probabilities.values()])
    return {probe: np.array(values) for probe, values in rows.items()}


def _difference(probe: str, between: str, one: Probabilities, other: Probabilities) -> Difference:
    apart = np.abs(one - other).max(1)
    return Difference(
        probe,
        between,
        largest=float(apart.max()),
        median=float(np.median(apart)),
        flips=int((one.argmax(1) != other.argmax(1)).sum()),
        texts=len(one),
    )
