"""The tests of ``test_clients.py``, with vLLM as the engine.

One vLLM serves all three policies: starting one takes most of the time.
"""

from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager

import pytest
from fastapi import FastAPI

from commands import saved
from live import MODEL, listening
from sidelight.engines.base import Engine
from sidelight.policy.rules import Policy, Rule
from sidelight.prompts import Reads
from sidelight.server.app import create_app
from test_clients import (
    CUTTING,
    Servers,
    test_an_unknown_probe_is_an_error_in_each_client,
    test_each_client_keeps_what_the_documentation_says,
    test_openais_stream_helper_merges_the_verdicts,
    test_openais_stream_helper_raises_if_a_text_is_cut,
)
from tiny import three_probes, untrained_probe
from vllm_served import tiny_llama

__all__ = [
    "test_an_unknown_probe_is_an_error_in_each_client",
    "test_each_client_keeps_what_the_documentation_says",
    "test_openais_stream_helper_merges_the_verdicts",
    "test_openais_stream_helper_raises_if_a_text_is_cut",
]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Three servers on one vLLM, whose model is a folder with the name that the clients use."""
    from sidelight.vllm.engine import load_vllm_engine

    folder = tmp_path_factory.mktemp("clients")
    backbone = tiny_llama()
    saved(backbone, folder / MODEL)
    probes = [*three_probes(backbone), untrained_probe(backbone, "late", reads=Reads("response"))]
    options = {"enforce_eager": True, "max_num_seqs": 4, "max_model_len": 256}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        engine = load_vllm_engine(MODEL, probes, dtype="float32", options=options)
        with listening(mounted(engine)) as address:
            yield Servers(f"{address}/scoring", f"{address}/blocking", f"{address}/cutting")


def mounted(engine: Engine) -> FastAPI:
    """One server that has three, each under a path of its own."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        await engine.start()
        try:
            yield
        finally:
            await engine.close()

    app = FastAPI(lifespan=lifespan)
    always = Rule("block", threshold=0.0)
    app.mount("/scoring", create_app(engine))
    app.mount("/blocking", create_app(engine, policy=Policy(input={"toxicity": always})))
    app.mount("/cutting", create_app(engine, policy=Policy(output={"late": CUTTING})))
    return app
