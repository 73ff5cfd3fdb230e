"""Two engines under one client: each judges its own requests, and both take other probes."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from sidelight.engines.base import GenerationError
from sidelight.errors import SidelightError
from sidelight.prompts import Message
from sidelight.vllm.exchange import saved
from tiny import untrained_probe
from vllm_served import ROUNDING, expected, tiny_model

OPTIONS = {
    "enforce_eager": True,
    "block_size": 32,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "max_model_len": 256,
    "num_gpu_blocks_override": 64,
    "data_parallel_size": 2,
}
TEXTS = [f"{'word ' * (i % 9)}number {i}" for i in range(12)]


async def judged(engine, text):
    return await engine.judge([[Message("user", text)]])


def test_every_rank_judges_and_takes_other_probes(tmp_path):
    from sidelight.vllm.engine import load_vllm_engine

    model = tiny_model(tmp_path)
    others = [replace(probe, name=f"{probe.name}-again") for probe in reversed(model.probes)]

    async def ask():
        engine = await asyncio.to_thread(
            load_vllm_engine, model.path, model.probes, dtype="float32", options=OPTIONS
        )
        await engine.start()
        try:
            answers = [await asyncio.gather(*(judged(engine, t) for t in TEXTS)) for _ in range(2)]
            await engine.replace_probes(others)
            answers.append(await asyncio.gather(*(judged(engine, t) for t in TEXTS)))
            too_wide = [*others, untrained_probe(model.backbone, "more")]
            with pytest.raises(SidelightError, match="SIDELIGHT_COLUMNS="):
                await engine.replace_probes(too_wide)
            answers.append(await asyncio.gather(*(judged(engine, t) for t in TEXTS)))
            # The first rank alone, which nobody has told the others.
            with saved(model.probes) as (old,):
                load = engine._llm.engine_core._call_utility_async
                first = engine._llm.engine_core.core_engines[0]
                arguments = ("sidelight_load", None, (old.folders,))
                await load("collective_rpc", *arguments, engine=first)
                failed = await asyncio.gather(
                    *(judged(engine, text) for text in TEXTS), return_exceptions=True
                )
            return answers, failed
        finally:
            await engine.close()

    prompts = [model.backbone.encoder.encode([Message("user", text)]) for text in TEXTS]
    early = {probe.name for probe in model.probes if not probe.reads.includes_response}
    wanted = [
        {f"{name}{mark}": row[name] for name in early}
        for mark in ("", "-again")
        for row in expected(model, prompts)
    ]
    answers, failed = asyncio.run(ask())
    sets = [wanted[:12], wanted[:12], wanted[12:], wanted[12:]]
    for answer, rows in zip(answers, sets, strict=True):
        for (event,), probabilities in zip(answer, rows, strict=True):
            said = {v.probe: list(v.probabilities.values()) for v in event.judgement.verdicts}
            assert said.keys() == probabilities.keys()
            for name, actual in said.items():
                np.testing.assert_allclose(actual, probabilities[name], rtol=0, atol=ROUNDING)
    # Each rank has read some.
    errors = [one for one in failed if isinstance(one, GenerationError)]
    assert 0 < len(errors) < len(failed)
    assert all("Other probes" in str(error) for error in errors)
