"""What probes cost inside vLLM: the same work with and without them, in one worker, round by round.

Two engine processes differ by more than probes cost, so the probes are exchanged in a running
engine. Every round has all sets of probes in an order of its own and is compared with itself; the
intervals are over rounds.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter

import numpy as np
from jaxtyping import Float

from sidelight.backbone import Backbone
from sidelight.engines.base import Event, Finished, Sampling, TextDelta
from sidelight.mechanisms.base import mechanism_spec
from sidelight.probe import Probe
from sidelight.prompts import PlainText
from sidelight.vllm.engine import VllmEngine
from sidelight_lab.bench.timing import untrained_probe

NOTHING = "no probe"
# The first is of a request alone, the others of requests together; the throughput is from the first
# prompt to the last token.
MEASURES = {
    "time to first token": "ms",
    "time per token": "ms",
    "time per prompt": "ms",
    "throughput": "requests/s",
}


@dataclass(frozen=True)
class Work:
    """What each measurement does.

    Attributes:
        tokens: Of a prompt.
        requests: That run together.
        written: Tokens that each of them writes.
    """

    tokens: int = 256
    requests: int = 8
    written: int = 24


@dataclass(frozen=True)
class Cost:
    """What a set of probes adds to one measure.

    Attributes:
        probes: Which set.
        measure: One of ``MEASURES``.
        unit: Of ``without``.
        without: Median without probes.
        added: Mean over rounds, as a share of the same round's value without probes.
        low: Lower end of its 95 % interval (bootstrap over rounds).
        high: Upper end.
    """

    probes: str
    measure: str
    unit: str
    without: float
    added: float
    low: float
    high: float

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def probe_sets(backbone: Backbone) -> dict[str, list[Probe]]:
    """None, some readouts, and an attention probe; their weights are random."""
    readouts = [untrained_probe(backbone, f"readout-{i}", seed=i) for i in range(100)]
    attention = untrained_probe(backbone, "attention", spec=mechanism_spec("attention"))
    return {
        NOTHING: [],
        "1 readout": readouts[:1],
        "10 readouts": readouts[:10],
        "100 readouts": readouts,
        "1 attention": [attention],
    }


async def measure(
    engine: VllmEngine, sets: Mapping[str, Sequence[Probe]], *, work: Work, rounds: int
) -> list[Cost]:
    """The cost of each set.

    Args:
        engine: A running engine, without a prefix cache.
        sets: Probes by name; ``NOTHING`` is among them.
        work: What is measured.
        rounds: How often.
    """
    random = np.random.default_rng(0)
    measured: dict[str, list[list[float]]] = {name: [] for name in sets}
    await _measure_once(engine, work)
    for _ in range(rounds):
        for name in random.permutation(list(sets)):
            await engine.replace_probes(sets[str(name)])
            measured[str(name)].append(await _measure_once(engine, work))
    by_set = {name: np.array(values) for name, values in measured.items()}
    return [
        _cost(name, measure, by_set[NOTHING][:, i], by_set[name][:, i])
        for name in sets
        if name != NOTHING
        for i, measure in enumerate(MEASURES)
    ]


async def _measure_once(engine: VllmEngine, work: Work) -> list[float]:
    """The value of each of ``MEASURES``."""
    prompts = [PlainText(" word" * (work.tokens - 1) + f" {i}") for i in range(work.requests)]
    start = perf_counter()
    for prompt in prompts[:2]:
        await _last(engine.generate(prompt, Sampling(max_tokens=1, temperature=0)))
    first = (perf_counter() - start) / 2
    start = perf_counter()
    await asyncio.gather(
        *(_last(engine.generate(p, Sampling(max_tokens=1, temperature=0))) for p in prompts)
    )
    prompt_time = (perf_counter() - start) / work.requests
    sampling = Sampling(max_tokens=work.written, temperature=0)
    start = perf_counter()
    spans = await asyncio.gather(*(_writing(engine.generate(p, sampling)) for p in prompts))
    elapsed = perf_counter() - start
    times = [first, float(np.mean(spans)), prompt_time]
    return [*(1000 * time for time in times), work.requests / elapsed]


async def _last(events: AsyncGenerator[Event, None]) -> None:
    async for _ in events:
        pass


async def _writing(events: AsyncGenerator[Event, None]) -> float:
    """Seconds for each token after those of the first text."""
    begun, early, tokens = perf_counter(), 0, 0
    async for event in events:
        if isinstance(event, TextDelta) and not early:
            begun, early = perf_counter(), event.tokens
        if isinstance(event, Finished):
            tokens = event.completion_tokens
    return (perf_counter() - begun) / max(1, tokens - early)


def _cost(
    name: str,
    measure: str,
    without: Float[np.ndarray, " round"],
    with_probes: Float[np.ndarray, " round"],
) -> Cost:
    added = with_probes / without - 1
    draws = np.random.default_rng(1).integers(0, len(added), (10_000, len(added)))
    low, high = np.quantile(added[draws].mean(1), [0.025, 0.975])
    return Cost(
        name,
        measure,
        unit=MEASURES[measure],
        without=float(np.median(without)),
        added=float(added.mean()),
        low=float(low),
        high=float(high),
    )
