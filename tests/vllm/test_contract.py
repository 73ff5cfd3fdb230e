"""The engine over vLLM keeps the laws of every engine, on a dense and on a hybrid model."""

import pytest

from engine_contract import TEXTS, EngineContract, user
from sidelight.engines.base import GenerationError
from sidelight.errors import SidelightError
from sidelight.vllm.exchange import saved
from tiny import untrained_probe


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


@pytest.mark.xdist_group("llama")
def test_verdicts_of_probes_that_nobody_has_announced_are_no_verdicts(llama):
    with saved(llama.model.probes, [*reversed(llama.model.probes)]) as (own, foreign):

        async def load_and_ask(folders):
            llm = llama.engine._llm
            assert not any(await llm.collective_rpc("sidelight_load", args=(folders,)))
            await llm.reset_prefix_cache()
            return await llama.engine.judge([user(TEXTS[0])])

        with pytest.raises(GenerationError, match="Other probes have judged"):
            llama.run(load_and_ask(foreign.folders))
        assert llama.run(load_and_ask(own.folders))[0].judgement.verdicts


@pytest.mark.xdist_group("llama")
def test_probes_without_room_are_refused_and_the_old_ones_stay(llama):
    wide = [*llama.model.probes, untrained_probe(llama.model.backbone, "more")]
    with pytest.raises(SidelightError, match="SIDELIGHT_COLUMNS="):
        llama.replace(wide)
    llama.require(llama.judge([user(TEXTS[1])]), [user(TEXTS[1])])
