"""What probes cost inside vLLM: the same work with and without them, in one worker, round by round.

Two engine processes differ by more than what probes cost, so the probes are exchanged in a running
engine. Every round measures all sets of probes in a random order, and costs are compared within a
round; the intervals are over rounds.
"""

# pyright: reportMissingImports=false, reportPrivateUsage=false

import os
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from sidelight.data.evaluation import Estimate
from sidelight.engines.transformers.backbone import load_backbone
from sidelight.models.conversation import Message, Reads
from sidelight.models.fingerprint import Fingerprint
from sidelight.probes.artifact import save_probe
from sidelight.probes.mechanisms.base import mechanism_spec
from sidelight.probes.probe import Probe
from sidelight.progress import progress
from sidelight_lab.bench.measurement import offline_engine, untrained_guards, untrained_probe

NOTHING = "no probe"
# With their units. The first is of a single request, the others of requests that run together; the
# throughput counts from the first prompt to the last token. CPU time is that of the steps and of
# the thread that classifies beside them.
MEASURES = {
    "time to first token": "ms",
    "time per prompt": "ms",
    "time per token": "ms",
    "throughput": "requests/s",
    "CPU time per prompt": "ms",
    "CPU time per token": "ms",
}
_RESAMPLES = 10_000


def probe_sets(who: Fingerprint) -> dict[str, list[Probe]]:
    """No probes, readouts, an attention probe, two of responses, and guards; random weights."""
    readouts = [untrained_probe(who, f"readout-{i}", seed=i) for i in range(100)]
    attention = untrained_probe(who, "attention", spec=mechanism_spec("attention"))
    response_reads = Reads("response", template=False)
    return {
        NOTHING: [],
        "1 readout": readouts[:1],
        "10 readouts": readouts[:10],
        "100 readouts": readouts,
        "1 attention": [attention],
        "1 of responses": [untrained_probe(who, "late", reads=Reads("response"))],
        "1 of spans": [untrained_probe(who, "spans", labels_spans=True, reads=response_reads)],
        "5 guards": untrained_guards(who),
    }


def measure_costs(
    model: str,
    *,
    dtype: str,
    options: Mapping[str, Any],
    rounds: int,
    tokens: int,
    requests: int,
    written: int,
) -> Generator[dict[str, Any]]:
    """``costs`` of all sets of probes.

    Yields them after each round, with the number of ``rounds`` so far. Each measurement runs
    ``requests`` chats of about ``tokens`` together; each writes ``written``.
    """
    # vLLM's workers count their CPU time by functions of this file.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    backbone = load_backbone(model, device="cpu")
    chats = [
        list(backbone.encoder.encode([Message("user", " word" * tokens + f" {i}")]).token_ids)
        for i in range(requests)
    ]
    values: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {
            name: [str(save_probe(probe, Path(scratch) / probe.name)) for probe in probes]
            for name, probes in probe_sets(backbone.fingerprint).items()
        }
        path = backbone.model.config._name_or_path  # pyright: ignore[reportPrivateUsage]
        del backbone
        config = {"probes": folders["100 readouts"]}
        # With a prefix cache, later rounds would not compute the same prompts again.
        with offline_engine(path, config, options, dtype=dtype, enable_prefix_caching=False) as llm:
            llm.collective_rpc(count_cpu_time)
            measure = partial(_measure_once, llm, chats, written)
            measure()
            random = np.random.default_rng(0)
            with progress("Timing", rounds * len(folders), unit="sets of probes") as advance:
                for done in range(1, rounds + 1):
                    for name in map(str, random.permutation(list(folders))):
                        llm.collective_rpc(fit_probes, args=(folders[name],))
                        values.setdefault(name, []).append(measure())
                        advance(1)
                    yield {"rounds": done, "costs": costs_of(values)}


def fit_probes(_worker: Any, folders: list[str]) -> None:
    """Give vLLM's worker these probes, with room for their columns alone."""
    from sidelight_vllm.worker import Worker, current_worker

    old = current_worker()
    store = old._store
    assert store is not None
    new = Worker(
        replace(old._served, folders=tuple(folders)),
        layers=old._layers,
        tokens=old._staging.rows.shape[1],
        device=old._device,
    )
    block_size = store._block_size
    blocks = (len(store.rows) - 1) // block_size
    new.allocate(blocks=blocks, block_size=block_size, attention=old._attention)


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
        for i, (measure, segment) in enumerate(MEASURES.items()):
            share = Estimate.of(means[:, i])
            costs.append(
                {
                    "probes": name,
                    "measure": measure,
                    "unit": segment,
                    "without": float(np.median(without[:, i])),
                    "added": share.value,
                    "low": share.low,
                    "high": share.high,
                }
            )
    return costs


def _measure_once(llm: Any, chats: Sequence[list[int]], written: int) -> list[float]:
    """The value of each of ``MEASURES``."""
    first, _ = _timed(llm, chats[:1], 1)
    prompts, prompts_cpu = _timed(llm, chats, 1)
    texts, texts_cpu = _timed(llm, chats, written)
    steps, count = written - 1, len(chats)
    times = [first, prompts / count, (texts - prompts) / steps]
    cpu_times = [prompts_cpu / count, (texts_cpu - prompts_cpu) / steps / count]
    in_ms = [1000 * seconds for seconds in (*times, *cpu_times)]
    return [*in_ms[:3], count / texts, *in_ms[3:]]


def _timed(llm: Any, chats: Sequence[list[int]], written: int) -> tuple[float, float]:
    """Seconds until all texts are written, and the CPU seconds of the workers."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=written, temperature=0, ignore_eos=True, detokenize=False)
    inputs = [{"prompt_token_ids": chat} for chat in chats]
    before, start = _cpu_seconds(llm), perf_counter()
    outputs = llm.generate(inputs, params, use_tqdm=False)
    seconds = perf_counter() - start
    assert all(len(output.outputs[0].token_ids) == written for output in outputs)
    return seconds, _cpu_seconds(llm) - before


def _cpu_seconds(llm: Any) -> float:
    return sum(llm.collective_rpc(cpu_seconds))


_STEPS = {"seconds": 0.0}


def count_cpu_time(worker: Any) -> None:
    """Have a worker of vLLM count the CPU time of its steps; between them its thread spins."""
    inner = getattr(worker, "worker", worker)

    def counted(step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return step(*args, **kwargs)
            finally:
                _STEPS["seconds"] += time.thread_time() - start

        return run

    for name in ("execute_model", "sample_tokens"):
        setattr(inner, name, counted(getattr(inner, name)))


def cpu_seconds(_worker: Any) -> float:
    """The CPU time of the steps so far, and of the threads that judge."""
    total = _STEPS["seconds"]
    for thread in threading.enumerate():
        # It may have ended.
        with suppress(ProcessLookupError, OSError):
            if thread.ident is not None and thread.name.startswith("sidelight-judge"):
                total += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return total
