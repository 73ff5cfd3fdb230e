"""The transformers engine keeps the laws of every engine."""

import asyncio
from functools import partial

import pytest

from engine_contract import EngineContract, Subject
from sidelight.engines.queue import Limits
from sidelight.engines.transformers.engine import TransformersEngine
from worlds.models import tiny_backbone
from worlds.servers import reference
from worlds.vllm import with_probes

pytestmark = pytest.mark.slow


LIMITS = {"whole": Limits(waiting=20), "parts": Limits(waiting=20, prefill_tokens=32)}


@pytest.fixture(scope="module", params=LIMITS)
def subject(request, tmp_path_factory):
    backbone = tiny_backbone()
    model = with_probes(backbone, "", tmp_path_factory.mktemp("probes"))
    engine, unstarted = (
        TransformersEngine(backbone, model.probes, limits=LIMITS[request.param]) for _ in range(2)
    )
    with asyncio.Runner() as runner:
        runner.run(engine.start())
        write_single = partial(reference, backbone)
        yield Subject(engine, model, runner, unstarted, many=30, write_single=write_single)
        runner.run(engine.close())


class TestTransformers(EngineContract):
    pass
