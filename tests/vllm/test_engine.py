"""The engine that judges through vLLM, and replaces its probes."""

import asyncio
from contextlib import asynccontextmanager

import numpy as np
import pytest

from sidelight.engines.base import GenerationError
from sidelight.errors import ContextLengthError, FingerprintMismatchError, SidelightError
from sidelight.prompts import EncodedPrompt, Message, Part, Reads
from sidelight.vllm.exchange import saved
from tiny import tiny_backbone, untrained_probe
from vllm_served import ROUNDING, Model, expected, tiny_model

OPTIONS = {
    "enforce_eager": True,
    "block_size": 32,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "max_model_len": 512,
}
TEXTS = [f"{'word ' * (i % 9)}number {i}" for i in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loop():
    with asyncio.Runner() as runner:
        yield runner


@asynccontextmanager
async def engine_of(model, **options):
    from sidelight.vllm.engine import load_vllm_engine

    engine = await asyncio.to_thread(
        load_vllm_engine,
        model.path,
        model.probes,
        dtype="float32",
        options={**OPTIONS, **options},
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


@pytest.fixture(scope="module")
def engine(loop, model):
    context = engine_of(model)
    yield loop.run(context.__aenter__())
    loop.run(context.__aexit__(None, None, None))


def values(verdicts):
    return {v.probe: np.array(list(v.probabilities.values())) for v in verdicts}


def require_equal(judgement, wanted, names):
    actual = values(judgement.verdicts)
    for name in names:
        if np.isnan(wanted[name]).any():
            assert name in judgement.failed
        else:
            np.testing.assert_allclose(actual[name], wanted[name], rtol=0, atol=ROUNDING)


def names(model, *sides):
    return [probe.name for probe in model.probes if probe.reads.side in sides]


def test_judge_gives_what_a_completion_gives_and_reads_given_responses(engine, loop, model):
    turns = [Message("user", TEXTS[1]), Message("assistant", "no, never")]
    with_response, without = loop.run(engine.judge([turns, turns[:1]]))
    encode = model.backbone.encoder.encode
    both = expected(model, [encode(turns[:1], "no, never"), encode(turns[:1])])
    everything = names(model, "prompt", "both", "response")
    require_equal(with_response.judgement, both[0], everything)
    require_equal(without.judgement, both[1], names(model, "prompt"))
    assert {v.probe for v in without.judgement.verdicts} == set(names(model, "prompt"))


def test_more_texts_than_may_wait_are_judged_if_nobody_else_waits(engine, loop):
    texts = [[Message("user", f"text {i}")] for i in range(150)]
    judged = loop.run(engine.judge(texts))
    assert len(judged) == len(texts)
    assert all(each.judgement.verdicts for each in judged)
    assert (engine.load.running, engine.load.waiting) == (0, 0)


def test_the_longest_text_is_judged_and_a_longer_one_is_refused(engine, loop):
    def text(length):
        return EncodedPrompt((7,) * length, (Part.PROMPT,) * length)

    identity = engine._exchange.identity
    assert loop.run(engine.check(text(engine.max_tokens), identity)).verdicts
    with pytest.raises(ContextLengthError, match=f"judges {engine.max_tokens} at most"):
        loop.run(engine.check(text(engine.max_tokens + 1), identity))


def test_new_probes_take_over_and_old_states_are_not_read(engine, loop, model):
    other = [
        untrained_probe(model.backbone, "other"),
        untrained_probe(model.backbone, "late", reads=Reads("both")),
    ]
    long = [Message("user", "the same long text " * 12)]
    replaced = Model(model.backbone, model.path, other, [])
    prompt = model.backbone.encoder.encode(long)

    async def replace_and_ask():
        (before,) = await engine.judge([long])
        running = asyncio.create_task(engine.judge([long] * 20))
        await asyncio.sleep(0.05)
        replacing = asyncio.create_task(engine.replace_probes(other))
        while engine._exchange._open.is_set():
            await asyncio.sleep(0.001)
        # As a server does: who waits is judged by the new ones.
        await engine.settled()
        assert engine.probes == tuple(other)
        (after,) = await engine.judge([long])
        await replacing
        await engine.replace_probes(model.probes)
        return before, await running, after, (await engine.judge([long]))[0]

    before, running, after, again = loop.run(replace_and_ask())
    assert {v.probe for v in after.judgement.verdicts} == {"other"}
    require_equal(after.judgement, expected(replaced, [prompt])[0], ["other"])
    wanted = expected(model, [prompt])[0]
    for judged in (before, *running, again):
        require_equal(judged.judgement, wanted, names(model, "prompt"))


def test_probes_that_cannot_be_served_leave_the_old_ones(engine, loop, model):
    broken = untrained_probe(model.backbone, "broken")
    broken.mechanism.bias.fill_(float("nan"))
    foreign = untrained_probe(tiny_backbone(), "foreign")

    async def try_both():
        with pytest.raises(SidelightError, match="broken"):
            await engine.replace_probes([broken])
        with pytest.raises(FingerprintMismatchError):
            await engine.replace_probes([foreign])
        return await engine.judge([[Message("user", TEXTS[0])]])

    (judged,) = loop.run(try_both())
    assert {v.probe for v in judged.judgement.verdicts} == set(names(model, "prompt"))
    assert [probe.name for probe in engine.probes] == [probe.name for probe in model.probes]


def test_verdicts_of_probes_that_nobody_has_announced_are_no_verdicts(engine, loop, model):
    with saved(model.probes, [*reversed(model.probes)]) as (own, foreign):

        async def load_and_ask(folders):
            assert not any(await engine._llm.collective_rpc("sidelight_load", args=(folders,)))
            await engine._llm.reset_prefix_cache()
            return await engine.judge([[Message("user", TEXTS[0])]])

        with pytest.raises(GenerationError, match="Other probes have judged"):
            loop.run(load_and_ask(foreign.folders))
        assert loop.run(load_and_ask(own.folders))[0].judgement.verdicts
