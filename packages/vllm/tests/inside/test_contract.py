"""The engine over vLLM keeps the laws of every engine, on a dense and on a hybrid model."""

import pytest

from engine_contract import EngineContract


@pytest.mark.xdist_group("llama")
class TestDense(EngineContract):
    @pytest.fixture
    def subject(self, llama):
        return llama


@pytest.mark.xdist_group("gemma")
class TestHybrid(EngineContract):
    @pytest.fixture
    def subject(self, gemma):
        return gemma
