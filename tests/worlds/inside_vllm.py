"""What tests inside a real vLLM share; they run in an environment of their own (``make vllm``).

They run on either of its model runners. V2 needs ``VLLM_USE_V2_MODEL_RUNNER=1``, and Triton's
interpreter in place of a GPU: ``TRITON_INTERPRET=1``, and ``packages/vllm/tests/triton_cpu`` in
``PYTHONPATH``.
Tests of one ``xdist_group`` run in one process, one after the other: those that share an engine.
"""

import asyncio
import importlib.util
import os
from contextlib import nullcontext

import pytest

# Must be set before vLLM is imported: little memory for keys and values, and no pinned cores.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    missing = importlib.util.find_spec("vllm") is None
    for item in items:
        if item.path.parent.name in ("vllm", "inside"):
            # vLLM's imports warn of much that is not ours.
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.timeout(600))
            is_shared = "matrix" not in item.path.parts
            if is_shared and item.get_closest_marker("xdist_group") is None:
                item.add_marker(pytest.mark.xdist_group(item.path.stem))
            if missing:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed here"))


@pytest.fixture(scope="session")
def subjects(tmp_path_factory):
    """What the servers of all test files serve."""
    from policy_contract import Subjects

    return Subjects(tmp_path_factory.mktemp("subjects"))


@pytest.fixture(scope="session")
def stock(subjects, tmp_path_factory):
    """vLLM's own server under the policy of the subjects; tests put back the probes they change."""
    from worlds.stock import under_policy

    with under_policy(subjects, tmp_path_factory.mktemp("stock")) as server:
        yield server


@pytest.fixture(scope="session")
def llama_model(tmp_path_factory):
    """A tiny dense model on disk, with probes of every kind."""
    from worlds.vllm import tiny_model

    return tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def gemma_model(tmp_path_factory):
    """A tiny Gemma 3: three layers that keep a window of 64 tokens, and one that keeps all."""
    from worlds.vllm import TESTED, architecture_model

    return architecture_model(TESTED["Gemma3ForCausalLM"], tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="session")
def llama(llama_model):
    """One engine over it for all tests, which leave its probes as they were."""
    from worlds.vllm import IS_INTERPRETED

    yield from started(llama_model, IS_INTERPRETED, max_num_batched_tokens=48)


@pytest.fixture(scope="session")
def gemma(gemma_model):
    """Likewise, without a process of its own for the worker."""
    yield from started(gemma_model, True, max_num_batched_tokens=200, max_num_seqs=16)


def started(model, is_together, **options):
    from engine_contract import Subject
    from sidelight_vllm.engine import VllmEngine, load_vllm_engine
    from sidelight_vllm.settings import ProbeSet
    from worlds.vllm import WARM_UP, together

    defaults = {"enforce_eager": True, "block_size": 32, "max_num_seqs": 8, "max_model_len": 1088}
    with asyncio.Runner() as runner:

        async def start():
            fields = {**defaults, **WARM_UP, **options}
            with together() if is_together else nullcontext():
                engine = load_vllm_engine(model.path, model.probes, dtype="float32", options=fields)
            await engine.start()
            return engine

        engine = runner.run(start())
        unstarted = VllmEngine(
            engine._llm,
            ProbeSet(tuple(model.probes), revision=""),
            name="unstarted",
            encoder=model.backbone.encoder,
            fingerprint=model.backbone.fingerprint,
        )
        yield Subject(engine, model, runner, unstarted)
        runner.run(engine.close())
