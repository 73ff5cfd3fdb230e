"""A failure is the concern of the requests it hit; the engine goes on."""

import asyncio
import logging

import pytest
import torch

from engine_runs import ask, count_passes, run, until_idle
from sidelight.engines.base import (
    EngineBusyError,
    EngineUnavailableError,
    GenerationError,
    Sampling,
    TextDelta,
)
from sidelight.engines.loading import LoadingEngine
from sidelight.engines.queue import Limits
from sidelight.engines.transformers import TransformersEngine
from sidelight.prompts import Message
from tiny import three_probes, tiny_backbone

LONG = Sampling(temperature=0.0, max_tokens=200)
PROMPT = "a secret"
HELLO = [Message("user", "hello")]


@pytest.fixture
def backbone():
    return tiny_backbone()


def fail_once(backbone, *, is_prefill):
    """Makes the next forward pass of a kind fail, with text in its message."""

    def note(_module, _args, kwargs):
        if (kwargs["input_ids"].shape[1] > 1) is is_prefill:
            hook.remove()
            raise RuntimeError(f"out of memory while reading {PROMPT}")

    hook = backbone.model.register_forward_pre_hook(note, with_kwargs=True)


@pytest.mark.parametrize("is_prefill", [True, False])
def test_a_failed_step_is_the_concern_of_its_request_only(backbone, is_prefill, caplog):
    async def ask_some(engine):
        fail_once(backbone, is_prefill=is_prefill)
        with pytest.raises(GenerationError) as lost:
            await ask(engine, "a")
        return str(lost.value), await ask(engine, "b")

    message, answer = run(backbone, ask_some)
    assert answer.text
    assert "RuntimeError" in message
    # Places are logged; what an error says may quote a prompt.
    assert "decoder.py" in caplog.text
    assert PROMPT not in message + str([record.getMessage() for record in caplog.records])


@pytest.mark.slow
def test_a_failed_prefill_leaves_the_running_requests_alone(backbone):
    passes = count_passes(backbone)

    async def ask_some(engine):
        running = asyncio.create_task(ask(engine, "a", LONG))
        # The first one reads the prompt.
        while len(passes) < 2:
            await asyncio.sleep(0)
        fail_once(backbone, is_prefill=True)
        with pytest.raises(GenerationError):
            await ask(engine, "b")
        return await running

    assert run(backbone, ask_some).finished.completion_tokens == 200


def test_logits_that_are_not_numbers_fail_the_request(backbone):
    backbone.model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(GenerationError, match="float16"):
        run(backbone, lambda engine: ask(engine, "hi"))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logit_that_overflowed_fails_the_request(backbone, temperature):
    backbone.model.lm_head.register_forward_hook(
        lambda _module, _inputs, logits: logits.index_fill(-1, torch.tensor([5]), torch.inf)
    )
    with pytest.raises(GenerationError, match="float16"):
        run(backbone, lambda engine: ask(engine, "hi", Sampling(temperature=temperature)))


def test_logits_that_rule_tokens_out_are_drawn_from(backbone):
    backbone.model.lm_head.register_forward_hook(
        lambda _module, _inputs, logits: logits.index_fill(-1, torch.tensor([5]), -torch.inf)
    )
    assert run(backbone, lambda engine: ask(engine, "hi")).finished


def test_leaving_frees_the_row(backbone):
    async def leave(engine):
        events = engine.generate(HELLO, LONG)
        async for event in events:
            if isinstance(event, TextDelta):
                break
        assert engine.load.running == 1
        await events.aclose()
        await until_idle(engine)
        return await ask(engine, "b")

    steps = count_passes(backbone)
    run(backbone, leave)
    # The second request's passes, and few of the first's 200.
    assert len(steps) < 16 + 30


@pytest.mark.slow
def test_leaving_while_waiting_frees_the_place_in_line(backbone):
    async def leave(engine):
        running = asyncio.create_task(ask(engine, "a", LONG))
        while not engine.load.running:
            await asyncio.sleep(0)
        waiting = asyncio.create_task(ask(engine, "b"))
        while not engine.load.waiting:
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert engine.load.waiting == 0
        await running

    run(backbone, leave, limits=Limits(running=1))


def test_a_full_line_refuses(backbone):
    async def ask_many(engine):
        return await asyncio.gather(
            *(ask(engine, str(i)) for i in range(8)), return_exceptions=True
        )

    answers = run(backbone, ask_many, limits=Limits(running=1, waiting=2))
    refused = [answer for answer in answers if isinstance(answer, EngineBusyError)]
    assert refused
    assert all(a.text for a in answers if not isinstance(a, EngineBusyError))


def test_requests_in_a_closed_engine_fail(backbone):
    async def main():
        engine = TransformersEngine(backbone, [])
        with pytest.raises(EngineUnavailableError):
            await ask(engine, "too early")
        await engine.start()
        running = asyncio.create_task(ask(engine, "a", LONG))
        while not engine.load.running:
            await asyncio.sleep(0)
        await engine.close()
        assert not engine.is_ready
        with pytest.raises(EngineUnavailableError):
            await running
        with pytest.raises(EngineUnavailableError):
            await ask(engine, "too late")

    asyncio.run(main())


def test_a_loading_engine_refuses_until_it_is_loaded(backbone):
    async def main():
        loaded = asyncio.Event()
        loop = asyncio.get_running_loop()

        def load():
            asyncio.run_coroutine_threadsafe(loaded.wait(), loop).result()
            return TransformersEngine(backbone, three_probes(backbone))

        engine = LoadingEngine(load)
        await engine.start()
        assert not engine.is_ready
        with pytest.raises(EngineUnavailableError, match="still loading"):
            await engine.judge([HELLO])
        loaded.set()
        async with asyncio.timeout(5):
            while not engine.is_ready:
                await asyncio.sleep(0.01)
        assert len((await engine.judge([HELLO]))[0].judgement.verdicts) == len(engine.probes) == 3
        await engine.close()

    asyncio.run(main())


def test_a_failure_to_load_is_told():
    def load():
        raise OSError("no such model")

    async def main():
        failed = asyncio.Event()
        engine = LoadingEngine(load, on_failure=failed.set)
        await engine.start()
        await asyncio.wait_for(failed.wait(), timeout=5)
        assert isinstance(engine.failure, OSError)
        await engine.close()

    logging.getLogger("asyncio").setLevel(logging.ERROR)
    asyncio.run(main())
