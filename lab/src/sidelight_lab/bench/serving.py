"""What probes cost inside vLLM: the same work with and without them, in one worker, round by round.

Two engine processes differ by more than what probes cost, so the probes are exchanged in a running
engine. Every round measures all sets of probes in a random order, and costs are compared within a
round; the intervals are over rounds.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np

from sidelight.backbone import TransformersBackbone, load_backbone
from sidelight.engines.base import Event, Finished, Sampling, TextDelta
from sidelight.evaluation import Estimate
from sidelight.mechanisms.base import mechanism_spec
from sidelight.probe import Probe
from sidelight.prompts import PlainText
from sidelight.vllm.engine import VllmEngine, load_vllm_engine
from sidelight_lab.bench.subjects import untrained_probe

NOTHING = "no probe"
# With their units. The first is of a single request, the others of requests that run together; the
# throughput counts from the first prompt to the last token.
MEASURES = {
    "time to first token": "ms",
    "time per token": "ms",
    "time per prompt": "ms",
    "throughput": "requests/s",
}
_RESAMPLES = 10_000


def probe_sets(backbone: TransformersBackbone) -> dict[str, list[Probe]]:
    """No probes, some readouts, and an attention probe, all with random weights."""
    readouts = [untrained_probe(backbone, f"readout-{i}", seed=i) for i in range(100)]
    attention = untrained_probe(backbone, "attention", spec=mechanism_spec("attention"))
    return {
        NOTHING: [],
        "1 readout": readouts[:1],
        "10 readouts": readouts[:10],
        "100 readouts": readouts,
        "1 attention": [attention],
    }


async def measure_costs(
    model: str,
    *,
    dtype: str,
    options: Mapping[str, Any],
    rounds: int,
    tokens: int,
    requests: int,
    written: int,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The costs of all sets of probes, and the share of the KV cache's memory that each takes.

    Each measurement runs ``requests`` prompts of ``tokens`` together; each writes ``written``.
    """
    sets = probe_sets(load_backbone(model, device="cpu"))
    # With a prefix cache, later rounds would not compute the same prompts again.
    options = {"enable_prefix_caching": False, **options}
    engine = await asyncio.to_thread(load_vllm_engine, model, [], dtype=dtype, options=options)
    random = np.random.default_rng(0)
    values: dict[str, list[list[float]]] = {name: [] for name in sets}
    memory: dict[str, float] = {}
    measure = partial(_measure_once, engine, tokens, requests, written)
    await engine.start()
    try:
        await measure()
        for _ in range(rounds):
            for name in map(str, random.permutation(list(sets))):
                await engine.replace_probes(sets[name])
                values[name].append(await measure())
        for name, probes in sets.items():
            await engine.replace_probes(probes)
            memory[name] = await engine.memory_share()
    finally:
        await engine.close()
    return costs_of(values), memory


def costs_of(values: Mapping[str, Sequence[Sequence[float]]]) -> list[dict[str, Any]]:
    """What each set adds to each of ``MEASURES``, from the values of each round.

    ``without`` is the median without probes; ``added``, with its 95 % interval over rounds, is a
    share of the same round's value without probes.
    """
    without = np.array(values[NOTHING])  # (round, measure)
    rounds = len(without)
    drawn = np.random.default_rng(1).integers(0, rounds, (_RESAMPLES, rounds))
    costs: list[dict[str, Any]] = []
    for name in [name for name in values if name != NOTHING]:
        added = np.array(values[name]) / without - 1
        means = np.concatenate([added.mean(0)[None], added[drawn].mean(1)])
        for i, (measure, unit) in enumerate(MEASURES.items()):
            share = Estimate.of(means[:, i])
            costs.append(
                {
                    "probes": name,
                    "measure": measure,
                    "unit": unit,
                    "without": float(np.median(without[:, i])),
                    "added": share.value,
                    "low": share.low,
                    "high": share.high,
                }
            )
    return costs


async def _measure_once(
    engine: VllmEngine, tokens: int, requests: int, written: int
) -> list[float]:
    """The value of each of ``MEASURES``."""
    prompts = [PlainText(" word" * (tokens - 1) + f" {i}") for i in range(requests)]
    one = Sampling(max_tokens=1, temperature=0)
    start = perf_counter()
    for prompt in prompts[:2]:
        await _s_per_token(engine.generate(prompt, one))
    first = (perf_counter() - start) / 2
    start = perf_counter()
    await asyncio.gather(*(_s_per_token(engine.generate(prompt, one)) for prompt in prompts))
    prompt_time = (perf_counter() - start) / requests
    many = Sampling(max_tokens=written, temperature=0)
    start = perf_counter()
    spans = await asyncio.gather(*(_s_per_token(engine.generate(p, many)) for p in prompts))
    elapsed = perf_counter() - start
    times = [first, float(np.mean(spans)), prompt_time]
    return [*(1000 * time for time in times), requests / elapsed]


async def _s_per_token(events: AsyncGenerator[Event, None]) -> float:
    """Reads to the end; seconds per token, from the first piece of text on."""
    begun, early, tokens = perf_counter(), 0, 0
    async for event in events:
        if isinstance(event, TextDelta) and not early:
            begun, early = perf_counter(), event.tokens
        if isinstance(event, Finished):
            tokens = event.completion_tokens
    return (perf_counter() - begun) / max(1, tokens - early)
