"""A failure is the concern of the requests it hit; the engine goes on."""

import asyncio

import pytest
import torch

from sidelight.engines.base import (
    EngineBusyError,
    EngineUnavailableError,
    GenerationError,
    Sampling,
)
from sidelight.engines.queue import Limits
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.models.conversation import Message
from worlds.models import tiny_backbone
from worlds.servers import ask, count_passes, run_engine

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
def test_failed_step_affects_only_its_request(backbone, is_prefill, caplog):
    passes = count_passes(backbone)

    async def ask_some(engine):
        running = []
        if is_prefill:
            # It is being written meanwhile.
            running = [asyncio.create_task(ask(engine, "a", LONG))]
            while len(passes) < 2:
                await asyncio.sleep(0)
        fail_once(backbone, is_prefill=is_prefill)
        with pytest.raises(GenerationError) as lost:
            await ask(engine, "b")
        return str(lost.value), [await ask(engine, "c"), *[await task for task in running]]

    message, answers = run_engine(backbone, ask_some)
    assert [a.finished.completion_tokens for a in answers] == [16, 200][: len(answers)]
    assert "RuntimeError" in message
    # Places are logged; what an error says may quote a prompt.
    assert "transformers/engine.py" in caplog.text
    assert PROMPT not in message + str([record.getMessage() for record in caplog.records])


@pytest.mark.parametrize(
    ("logit", "temperature", "fails"),
    [(torch.nan, 0.0, True), (torch.inf, 1.0, True), (-torch.inf, 1.0, False)],
)
def test_nan_and_inf_logits_fail_request_but_masked_logits_pass(
    backbone, logit, temperature, fails
):
    backbone.model.lm_head.register_forward_hook(
        lambda _module, _inputs, logits: logits.index_fill(-1, torch.tensor([5]), logit)
    )

    def work():
        return run_engine(backbone, lambda engine: ask(engine, "hi", Sampling(16, temperature)))

    if fails:
        with pytest.raises(GenerationError, match="float16"):
            work()
    else:
        assert work().finished


def test_requests_waiting_for_encoding_are_bounded(backbone):
    """A client whose long texts are encoded one after the other fills no memory."""

    async def crowd(engine):
        texts = [ask(engine, "a" * 50) for _ in range(7)] + [engine.classify([HELLO])]
        answers = await asyncio.gather(*texts, return_exceptions=True)
        busy = [str(answer) for answer in answers if isinstance(answer, EngineBusyError)]
        # Not by the queue, which has room for two.
        assert sum("3 waiting, the limit is 3" in text for text in busy) == 5
        assert (await ask(engine, "b")).finished

    run_engine(backbone, crowd, limits=Limits(running=1, waiting=2))


def test_requests_fail_when_engine_is_closed(backbone):
    async def main():
        engine = TransformersEngine(backbone, [])
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
