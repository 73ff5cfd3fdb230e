"""Cost of the same work in different engines: reading and generating tokens, probes, and memory.

Each model has a separate process. Rounds measure them in turn, with probes and without, so that
other load on the machine affects all of them.
"""

import asyncio
import json
from collections.abc import Awaitable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import psutil
import torch

from sidelight.engines.queue import Limits
from sidelight.engines.transformers.backbone import DtypeName, load_backbone
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.errors import SidelightError
from sidelight.models.conversation import Message, Reads
from sidelight.progress import progress
from sidelight.storage import write_json
from sidelight_lab.bench.measurement import (
    Range,
    Record,
    conditions,
    table,
    untrained_probe,
    write_answers,
)
from sidelight_lab.tables.runs import digest
from sidelight_llama.files import find_gguf, is_gguf

PROBES = 3
TEXTS = (1, 8)
# llama.cpp takes as much memory as in `sidelight serve`, for more texts.
_LLAMA_LIMITS = Limits(running=max(TEXTS), prefill_tokens=256, cache_tokens=3 * 4096)


class Subject:
    """A model and its engine, the only ones in this process.

    Args:
        model: Model, as in ``sidelight serve``.
        dtype: Dtype of a model that is not a GGUF file.
        threads: Number of threads.
    """

    def __init__(self, model: str, dtype: DtypeName, threads: int):
        torch.set_num_threads(threads)
        if is_gguf(model):
            from sidelight_llama.backbone import LlamaBackbone
            from sidelight_llama.engine import LlamaEngine

            self.backbone = LlamaBackbone(find_gguf(model), name=model, threads=threads)
            self._engine = LlamaEngine(self.backbone, [], limits=_LLAMA_LIMITS)
        else:
            self.backbone = load_backbone(model, dtype=dtype, device="cpu")
            self._engine = TransformersEngine(self.backbone, [])
        probe_of = partial(
            untrained_probe,
            self.backbone.fingerprint,
            prompt_format=self.backbone.encoder.prompt_format,
        )
        response_probe = probe_of("late", reads=Reads("response"))
        self._probes = [
            *(probe_of(f"probe-{i}", seed=i) for i in range(PROBES - 1)),
            response_probe,
        ]
        self._runner = asyncio.Runner()
        self._runner.run(self._engine.start())

    def measure(
        self, probes: int, lengths: Sequence[int], written: int
    ) -> list[tuple[float, float]]:
        """CPU seconds and seconds of a token: of prompts by length, then of texts together."""
        return self._runner.run(self._measure(probes, lengths, written))

    async def _measure(
        self, probes: int, lengths: Sequence[int], written: int
    ) -> list[tuple[float, float]]:
        await self._engine.replace_probes(self._probes[:probes])
        spent = [await _timed(self._read(length)) for length in lengths]
        for texts in TEXTS:
            # The first token of each has the time of its prompt.
            first = await _timed(write_answers(self._engine, texts, 1))
            spent.append(await _timed(write_answers(self._engine, texts, 1 + written)) - first)
            if not spent[-1][0]:
                raise SidelightError(
                    f"{self.backbone.name} ends its responses at once, so the generation time "
                    "cannot be measured. Name a model that is trained to chat."
                )
        return [(cpu_s / tokens, wall_s / tokens) for tokens, cpu_s, wall_s in map(list, spent)]

    async def _read(self, length: int) -> int:
        (event,) = await self._engine.classify([[Message("user", " word" * length)]])
        return event.tokens

    def conditions(self) -> dict[str, Any]:
        """What its figures depend on."""
        return conditions(self.backbone, {"engine": self.backbone.engine})

    def close(self) -> float:
        """Close the engine; return the memory of this process in megabytes."""
        megabytes = psutil.Process().memory_info().rss / 1e6
        self._runner.run(self._engine.close())
        self._runner.close()
        return megabytes


async def _timed(work: Awaitable[int]) -> np.ndarray:
    """Tokens, CPU seconds and seconds."""
    cpu_s, wall_s = process_time(), perf_counter()
    tokens = await work
    return np.array([tokens, process_time() - cpu_s, perf_counter() - wall_s])


_subject = cache(Subject)


def _ask(process_key: tuple[str, DtypeName, int], method: str, *arguments: Any) -> Any:
    """The result of a method of the subject of this process."""
    return getattr(_subject(*process_key), method)(*arguments)


def compare_engines(
    models: Sequence[str],
    *,
    dtype: DtypeName,
    threads: int,
    tokens: Sequence[int],
    written: int,
    rounds: int,
    out: Path | None = None,
) -> Record:
    """Measure tokens per CPU second and per second, the overhead of probes, and memory, for each
    model.

    Args:
        models: Models, as in ``sidelight serve``; the others are compared with the first.
        dtype: Dtype of models that are not GGUF files.
        threads: Number of threads of each.
        tokens: Lengths of the prompts, excluding the chat template.
        written: Tokens to generate per text.
        rounds: Rounds over all models with and without probes.
        out: Folder of the finished rounds, for resuming; figures are paired by round.
    """
    pairs = [*product(models, (0, PROBES))]
    with ExitStack() as stack:
        spawn = get_context("spawn")
        processes = {
            model: stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn)) for model in models
        }

        def ask(model: str, method: str, *arguments: Any) -> Any:
            process_key = (model, dtype, threads)
            return processes[model].submit(_ask, process_key, method, *arguments).result()

        for model, probes in pairs:
            ask(model, "measure", probes, tokens[:1], 1)
        wheres = [ask(model, "conditions") for model in models]
        who = [{**where, "load before": None} for where in wheres]
        name = digest({"engines": who, "tokens": tokens, "written": written, "texts": TEXTS})[:12]
        path = None if out is None else out / "engines" / f"{name}.json"
        # [round, pair, work, clock]
        measured: list[Any] = []
        if path is not None and path.exists():
            measured = json.loads(path.read_text("utf-8"))[:rounds]
        with progress("Timing", rounds * len(pairs), unit="sets of probes") as advance:
            advance(len(measured) * len(pairs))
            for number in range(len(measured), rounds):
                first = number % len(pairs)
                spent: dict[tuple[str, int], list[tuple[float, float]]] = {}
                for pair in pairs[first:] + pairs[:first]:
                    model, probes = pair
                    spent[pair] = ask(model, "measure", probes, tokens, written)
                    advance(1)
                measured.append([spent[pair] for pair in pairs])
                if path is not None:
                    write_json(path, measured)
        megabytes = [ask(model, "close") for model in models]
    where = {name: " and ".join(dict.fromkeys(str(w[name]) for w in wheres)) for name in wheres[0]}
    works = [f"reading {n}" for n in tokens] + [f"writing, {n} at once" for n in TEXTS]
    # Seconds of a token: [work, clock, round].
    by_pair = np.array(measured).transpose(1, 2, 3, 0)
    seconds = dict(zip(pairs, by_pair, strict=True))
    results = {
        "works": works,
        "seconds": [
            {
                "model": model,
                "probes": probes,
                "cpu": measured_seconds[:, 0].tolist(),
                "wall": measured_seconds[:, 1].tolist(),
            }
            for (model, probes), measured_seconds in seconds.items()
        ],
        "memory_mb": dict(zip(models, megabytes, strict=True)),
    }
    rates = ["", "probes", *models, *(f"{model}, times {models[0]}" for model in models[1:])]
    sections: list[str] = []
    for clock, name in enumerate(("CPU second", "second")):
        rows: list[list[object]] = []
        for (i, work), probes in product(enumerate(works), (0, PROBES)):
            measured_seconds = [1 / seconds[model, probes][i, clock] for model in models]
            ratios = _cells([each / measured_seconds[0] for each in measured_seconds[1:]], 2)
            rows.append([work, probes, *_cells(measured_seconds, 1), *ratios])
        sections.append(table(f"Tokens a {name}, median (range)", rates, rows))
    costs = {model: seconds[model, PROBES][:, 0] / seconds[model, 0][:, 0] for model in models}
    rows = [[work, *_cells([costs[m][i] for m in models], 3)] for i, work in enumerate(works)]
    rows.append(
        ["MB of the process", *(f"{measured_seconds:.0f}" for measured_seconds in megabytes)]
    )
    sections.append(table(f"CPU time with {PROBES} probes, over that without", ["", *models], rows))
    where |= {"tokens written": written, "rounds": rounds}
    return Record("engines", where, results, sections)


def _cells(values: Sequence[np.ndarray], digits: int) -> list[str]:
    return [Range.of(value_range.tolist()).text(digits) for value_range in values]
