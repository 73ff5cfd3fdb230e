"""The engine over vLLM where vLLM refuses: which probes serve then, and who gets in."""

import asyncio
from types import SimpleNamespace

import pytest

from sidelight.artifact import load_probe
from sidelight.engines.base import EngineBusyError
from sidelight.engines.vllm import VllmEngine
from sidelight.engines.vllm.loading import require_options
from sidelight.engines.vllm.places import Places
from sidelight.engines.vllm.shelf import Shelf
from sidelight.errors import SidelightError
from tiny import tiny_backbone, untrained_probe


class Workers:
    """Stands in for vLLM: two workers that load what they are told, and a prefix cache."""

    errored = False
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=100),
        parallel_config=SimpleNamespace(data_parallel_size=1, pipeline_parallel_size=1),
        device_config=SimpleNamespace(device_type="cpu"),
    )

    def __init__(self):
        self.output_processor = SimpleNamespace(request_states={}, process_outputs=None)
        self.loaded = [[], []]
        self.resets = 0
        self.refuses = False
        self.free = asyncio.Event()
        self.waits = asyncio.Event()

    async def collective_rpc(self, method, args):
        assert method == "sidelight_load"
        failures = [None, "The second worker refuses." if self.refuses else None]
        self.refuses = False
        for worker, failure in enumerate(failures):
            if failure is None:
                self.loaded[worker] = args[0]
        return failures

    def shutdown(self):
        pass

    async def reset_prefix_cache(self):
        self.resets += 1
        self.waits.set()
        return self.free.is_set()


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


def replacing(backbone, change):
    """Exchanges a probe; the workers' and the engine's probes after it did not work out."""

    async def main():
        llm = Workers()
        old, new = (untrained_probe(backbone, name) for name in ("old", "new"))
        engine = VllmEngine(
            llm,
            [old],
            name="tiny",
            encoder=backbone.encoder,
            tokenizer=backbone.tokenizer,
            fingerprint=backbone.fingerprint,
            shelf=Shelf(),
        )
        await engine.start()
        await change(engine, llm, new)
        served = [[load_probe(folder).name for folder in folders] for folders in llm.loaded]
        found = [probe.name for probe in engine.probes], served, engine.is_ready
        await engine.close()
        return found

    return asyncio.run(main())


def test_a_worker_that_refuses_puts_all_back(backbone):
    async def change(engine, llm, new):
        llm.refuses = True
        llm.free.set()
        with pytest.raises(SidelightError, match="second worker refuses"):
            await engine.replace_probes([new])

    assert replacing(backbone, change) == (["old"], [["old"], ["old"]], True)


def test_one_who_gives_up_leaves_the_old_probes(backbone):
    async def change(engine, llm, new):
        changing = asyncio.create_task(engine.replace_probes([new]))
        await llm.waits.wait()
        changing.cancel()
        llm.free.set()
        with pytest.raises(asyncio.CancelledError):
            await changing
        async with engine._gate.passing():
            pass

    assert replacing(backbone, change) == (["old"], [["old"], ["old"]], True)


def test_a_cache_that_cannot_be_reset_is_tried_again_and_then_an_error(backbone, monkeypatch):
    monkeypatch.setattr("sidelight.engines.vllm.engine._RESET_AFTER_S", 0)

    async def change(engine, llm, new):
        with pytest.raises(SidelightError, match="still in use"):
            await engine.replace_probes([new])
        assert llm.resets > 2

    names, _, is_ready = replacing(backbone, change)
    # The old probes' columns could not be reset either: nothing is served any more.
    assert (names, is_ready) == (["old"], False)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("model", "--model"),
        ("dtype", "--dtype"),
        ("additional_config", "--probe"),
        ("disable_log_stats", "Leave it out"),
        ("max_num_seq", "Did you mean 'max_num_seqs'"),
    ],
)
def test_an_option_that_is_not_the_users_is_refused_with_the_remedy(name, remedy):
    fields = dict.fromkeys(
        ["model", "dtype", "additional_config", "disable_log_stats", "max_num_seqs"]
    )
    arguments = SimpleNamespace(__dataclass_fields__=fields)
    require_options({"max_num_seqs": 8}, arguments)
    with pytest.raises(SidelightError, match=remedy):
        require_options({name: 1}, arguments)


def test_a_list_takes_all_its_places_at_once_or_none():
    places = Places(waiting=4)
    with places.taken(300) as many:
        busy = pytest.raises(EngineBusyError, match="300 requests are waiting and 4 may")
        with busy, places.taken(1):
            pass
        for place in many[3:]:
            place.is_running = True
        with places.taken(1), pytest.raises(EngineBusyError), places.taken(1):
            pass
        assert (places.load.running, places.load.waiting) == (297, 3)
        places.leave(many[0])
        assert places.load.waiting == 2
    assert (places.load.running, places.load.waiting) == (0, 0)
