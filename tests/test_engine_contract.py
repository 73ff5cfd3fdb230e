"""The transformers engine keeps the laws of every engine."""

import asyncio

import pytest

from engine_contract import EngineContract, Subject
from sidelight.engines.queue import Limits
from sidelight.engines.transformers import TransformersEngine
from worlds.models import tiny_backbone
from worlds.vllm import with_probes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[None, Limits(prefill_tokens=32)], ids=["whole", "parts"])
def subject(request, tmp_path_factory):
    backbone = tiny_backbone()
    model = with_probes(backbone, "", tmp_path_factory.mktemp("probes"))
    engine, unstarted = (
        TransformersEngine(backbone, model.probes, limits=request.param) for _ in range(2)
    )
    with asyncio.Runner() as runner:
        runner.run(engine.start())
        yield Subject(engine, model, runner, unstarted)
        runner.run(engine.close())


class TestTransformers(EngineContract):
    pass
