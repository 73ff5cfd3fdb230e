"""The engine over vLLM where vLLM refuses: which probes serve then, and who gets in."""

import asyncio
import re
import sys
from types import ModuleType, SimpleNamespace

import click
import pytest

from sidelight.artifact import load_probe
from sidelight.cli import app
from sidelight.engines.base import EngineBusyError, EngineUnavailableError, PromptJudged, Sampling
from sidelight.errors import SidelightError
from sidelight.prompts import Message
from sidelight.vllm.engine import _SET_HERE, VllmEngine, require_options
from sidelight.vllm.exchange import Gate, ProbeFolder
from sidelight.vllm.requests import Capacity
from sidelight.vllm.settings import KEY
from tiny import tiny_backbone, untrained_probe


class Workers:
    """Stands in for vLLM: two workers that load what they are told, and a prefix cache.

    It writes one token of each text, and no end of it unless that is all that is asked for.
    """

    errored = False
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=100),
        parallel_config=SimpleNamespace(data_parallel_size=1, pipeline_parallel_size=1),
        device_config=SimpleNamespace(device_type="cpu"),
    )

    def __init__(self):
        self.output_processor = SimpleNamespace(
            request_states={}, process_outputs=lambda outputs: None
        )
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

    async def generate(self, tokens, params, request_id):
        state = SimpleNamespace(external_req_id=request_id, request_index=0)
        self.output_processor.request_states[request_id] = state
        said = SimpleNamespace(
            request_id=request_id, new_token_ids=[7], kv_transfer_params={KEY: {"verdicts": {}}}
        )
        self.output_processor.process_outputs([said])
        text = SimpleNamespace(token_ids=[7], text="", finish_reason=None)
        yield SimpleNamespace(outputs=[text])
        if params.max_tokens > 1:
            await asyncio.Event().wait()

    def shutdown(self):
        pass

    async def reset_prefix_cache(self):
        self.resets += 1
        self.waits.set()
        return self.free.is_set()


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


@pytest.fixture
def names_of_vllm(monkeypatch):
    """The names that the engine imports from vLLM when it writes."""
    names = {
        "vllm": {"SamplingParams": SimpleNamespace},
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(DELTA=None)},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: True)},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.exceptions": {
            name: type(name, (Exception,), {})
            for name in ("EngineDeadError", "EngineGenerateError")
        },
    }
    for path, found in names.items():
        module = ModuleType(path)
        module.__dict__.update(found)
        monkeypatch.setitem(sys.modules, path, module)


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
            folder=ProbeFolder(),
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
        async with engine._exchange.passing(engine.probes):
            pass

    assert replacing(backbone, change) == (["old"], [["old"], ["old"]], True)


def test_texts_of_one_request_do_not_hold_up_a_change_that_comes_between_them(
    backbone, names_of_vllm
):
    """A server takes nothing more from the first text before it has the second one's verdicts."""

    async def change(engine, llm, new):
        llm.free.set()
        first, second = (
            engine.generate([Message("user", "hello")], Sampling(max_tokens=9)) for _ in range(2)
        )
        assert isinstance(await anext(first), PromptJudged)
        changing = asyncio.create_task(engine.replace_probes([new]))
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            with pytest.raises(EngineUnavailableError, match="being replaced"):
                await anext(second)
            await first.aclose()
            await changing

    assert replacing(backbone, change) == (["new"], [["new"], ["new"]], True)


def test_a_cache_that_cannot_be_reset_is_tried_again_and_then_an_error(backbone, monkeypatch):
    monkeypatch.setattr("sidelight.vllm.exchange._RESET_AFTER_S", 0)

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
        ("additional_config", "Leave it out"),
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


def commands(group):
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        yield from commands(command) if isinstance(command, click.Group) else [command]


# Each section of the check of a GPU has a dtype of its own.
TAKERS = [
    one
    for one in commands(app)
    if "engine_option" in {p.name for p in one.params} and one.name != "gpu"
]


@pytest.mark.parametrize("command", TAKERS, ids=lambda command: command.name)
def test_an_option_to_give_instead_is_one_of_every_command_that_takes_vllms(command):
    known = {word for parameter in command.params for word in parameter.opts}
    assert set(re.findall(r"--[a-z-]+", " ".join(_SET_HERE.values()))) <= known


def test_every_command_that_can_run_vllm_takes_its_options():
    assert {"serve", "train", "predict", "parity", "extract"} <= {one.name for one in TAKERS}


def test_a_list_takes_all_its_places_at_once_or_none():
    async def outputs():
        yield "one"

    async def main():
        places = Capacity(waiting=4)
        with places.taken(300) as many:
            busy = pytest.raises(EngineBusyError, match="300 waiting, the limit is 4")
            with busy, places.taken(1):
                pass
            running = [places.followed(place, outputs()) for place in many[3:]]
            for each in running:
                await anext(each)
            with places.taken(1), pytest.raises(EngineBusyError), places.taken(1):
                pass
            assert (places.load.running, places.load.waiting) == (297, 3)
            # One has written all, one is given up, and three never came so far.
            assert [each async for each in running[0]] == []
            await running[1].aclose()
            assert (places.load.running, places.load.waiting) == (295, 3)
            for each in running[2:]:
                await each.aclose()
        assert (places.load.running, places.load.waiting) == (0, 0)

    asyncio.run(main())


async def settled(task):
    """Lets the task go as far as it can."""
    for _ in range(5):
        await asyncio.sleep(0)
    return task


def test_one_who_gives_up_waiting_leaves_the_gate_open():
    async def main():
        gate, leave = Gate(), asyncio.Event()

        async def stay():
            async with gate.passing():
                await leave.wait()

        async def close():
            async with gate.closed():
                pytest.fail("somebody is inside")

        inside = await settled(asyncio.create_task(stay()))
        closing = await settled(asyncio.create_task(close()))
        closing.cancel()
        await asyncio.wait({closing})
        async with gate.passing():
            leave.set()
        await inside

    asyncio.run(main())


def test_who_waits_for_it_to_open_goes_on_when_it_does():
    async def main():
        gate = Gate()
        async with gate.closed():
            waiting = await settled(asyncio.create_task(gate.opened()))
            assert not waiting.done()
        await asyncio.wait_for(waiting, 5)

    asyncio.run(main())


def test_nobody_enters_while_it_is_closed_or_waits_for_it():
    async def main():
        gate = Gate()
        async with gate.closed():
            with pytest.raises(EngineUnavailableError, match="being replaced"):
                async with asyncio.timeout(5), gate.passing():
                    pytest.fail("it is closed")
        async with gate.passing():
            pass

    asyncio.run(main())


def test_who_is_inside_is_waited_for():
    async def main():
        gate, order = Gate(), []

        async def close():
            async with gate.closed():
                order.append("closed")

        async with gate.passing():
            closing = await settled(asyncio.create_task(close()))
            order.append("inside")
        await closing
        assert order == ["inside", "closed"]

    asyncio.run(main())
