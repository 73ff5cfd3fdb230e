"""Two engines under one client: each judges its own requests, and neither changes its probes."""

import asyncio

import numpy as np
import pytest

from sidelight.engines.base import PromptJudged, Sampling
from sidelight.errors import SidelightError
from sidelight.prompts import Message
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
    events = engine.generate([Message("user", text)], Sampling(max_tokens=4, temperature=0))
    return [event async for event in events if isinstance(event, PromptJudged)]


def test_every_rank_judges_and_none_is_left_with_old_probes(tmp_path):
    from sidelight.vllm.engine import load_vllm_engine

    model = tiny_model(tmp_path)

    async def ask():
        engine = await asyncio.to_thread(
            load_vllm_engine, model.path, model.probes, dtype="float32", options=OPTIONS
        )
        await engine.start()
        try:
            answers = [await asyncio.gather(*(judged(engine, t) for t in TEXTS)) for _ in range(2)]
            with pytest.raises(SidelightError, match="data parallel"):
                await engine.replace_probes(model.probes[:1])
            return [*answers, [await judged(engine, TEXTS[0])]]
        finally:
            await engine.close()

    prompts = [model.backbone.encoder.encode([Message("user", text)]) for text in TEXTS]
    wanted = expected(model, prompts)
    early = {probe.name for probe in model.probes if not probe.reads.includes_response}
    for answers in asyncio.run(ask()):
        for (event,), probabilities in zip(answers, wanted, strict=False):
            assert {verdict.probe for verdict in event.judgement.verdicts} == early
            for verdict in event.judgement.verdicts:
                actual = list(verdict.probabilities.values())
                np.testing.assert_allclose(
                    actual, probabilities[verdict.probe], rtol=0, atol=ROUNDING
                )
