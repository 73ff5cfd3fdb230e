"""Our own server over a GGUF file keeps the laws of a policy."""

import pytest

from policy_contract import PolicyContract, Subjects, sidelight_server
from sidelight_llama.engine import LlamaEngine
from worlds.gguf import gguf_model, needs_llama
from worlds.vllm import VLLM_SIZES

pytestmark = [pytest.mark.slow, needs_llama]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    # Deep enough that probes say different things of the texts of the contract.
    sizes = {"num_hidden_layers": 6, "num_key_value_heads": 4, "head_dim": 32}
    return gguf_model(tmp_path_factory.mktemp("gguf"), "llama", **{**VLLM_SIZES, **sizes})


@pytest.fixture(scope="module")
def subjects(gguf, tmp_path_factory):
    return Subjects(tmp_path_factory.mktemp("subjects"), gguf.reference)


@pytest.fixture(scope="module")
def server(gguf, subjects, tmp_path_factory):
    engine = LlamaEngine(gguf.backbone, subjects.probes)
    with sidelight_server(engine, subjects, tmp_path_factory.mktemp("server")) as served:
        yield served


class TestLlamaServer(PolicyContract):
    pass
