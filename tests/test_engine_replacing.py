"""Other probes at run time: every request keeps those it began with, and none is judged by two."""

import asyncio

import pytest
from transformers import LlamaConfig

from engine_runs import ROUNDING, ask, probabilities, run
from sidelight.artifact import load_probe, save_probe
from sidelight.engines.base import EngineUnavailableError, Finished, Sampling
from sidelight.engines.loading import LoadingEngine
from sidelight.engines.transformers import TransformersEngine
from sidelight.errors import FingerprintMismatchError, SidelightError, VerdictError
from sidelight.prompts import Message, Reads
from tiny import SIZES, tiny_backbone, untrained_probe

LONG = Sampling(temperature=0.0, max_tokens=60)


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


def late(backbone, name):
    return untrained_probe(backbone, name, reads=Reads("both"))


@pytest.mark.slow
def test_new_requests_get_the_new_probes_and_running_ones_keep_theirs(backbone):
    async def replace(engine):
        before = [asyncio.create_task(ask(engine, f"before {i}", LONG)) for i in range(3)]
        while engine.load.running < 3:
            await asyncio.sleep(0)
        await engine.replace_probes([late(backbone, "new")])
        assert engine.load.running == 3
        after = [asyncio.create_task(ask(engine, f"after {i}", LONG)) for i in range(3)]
        return await asyncio.gather(*before), await asyncio.gather(*after)

    before, after = run(backbone, replace, probes=[late(backbone, "old")])
    assert [v.probe for answer in before for v in answer.finished.judgement.verdicts] == ["old"] * 3
    assert [v.probe for answer in after for v in answer.finished.judgement.verdicts] == ["new"] * 3

    async def alone(engine):
        return [await ask(engine, f"before {i}", LONG) for i in range(3)]

    for one, other in zip(
        before, run(backbone, alone, probes=[late(backbone, "old")]), strict=True
    ):
        assert one.text == other.text
        assert probabilities(one.finished.judgement.verdicts) == pytest.approx(
            probabilities(other.finished.judgement.verdicts), abs=ROUNDING
        )


def test_the_probes_are_those_of_the_call_not_of_its_first_step(backbone):
    async def replace(engine):
        events = engine.generate([Message("user", "x")], LONG)
        checked = engine.judge([[Message("user", "x")]])
        await engine.replace_probes([untrained_probe(backbone, "new")])
        judged = await anext(events)
        await events.aclose()
        return judged.judgement.verdicts, (await checked)[0].judgement.verdicts

    for verdicts in run(backbone, replace, probes=[untrained_probe(backbone, "old")]):
        assert [verdict.probe for verdict in verdicts] == ["old"]


def test_probes_replaced_under_load_lose_no_verdict(backbone):
    """Each request is judged by exactly one set, on both sides."""
    sets = [
        [untrained_probe(backbone, f"early-{i}"), late(backbone, f"late-{i}")] for i in range(2)
    ]

    seen = set()

    async def ask_and_replace(engine):
        async def keep_replacing():
            turn = 0
            while turn < 12 or len(seen) < len(sets):
                turn += 1
                await engine.replace_probes(sets[turn % 2])
                await asyncio.sleep(0.01)

        async def keep_asking(text):
            while not replacing.done():
                answer = await ask(engine, text)
                (early,), (later,) = (
                    answer.judged.judgement.verdicts,
                    answer.finished.judgement.verdicts,
                )
                assert early.probe[-1] == later.probe[-1]
                seen.add(early.probe)

        replacing = asyncio.create_task(keep_replacing())
        await asyncio.gather(replacing, *(keep_asking(f"text {i}") for i in range(5)))

    run(backbone, ask_and_replace, probes=sets[0])
    assert seen == {"early-0", "early-1"}


def test_what_cannot_serve_is_refused_and_nothing_changes(backbone):
    other = tiny_backbone(LlamaConfig(**{**SIZES, "rope_theta": 5000.0}))
    broken = late(backbone, "broken")
    broken.mechanism.bias.fill_(float("nan"))
    good = untrained_probe(backbone, "good")
    refused = {
        FingerprintMismatchError: [good, untrained_probe(other, "other")],
        VerdictError: [good, broken],
        SidelightError: [good, good],
    }

    async def replace(engine):
        for error, probes in refused.items():
            with pytest.raises(error):
                await engine.replace_probes(probes)
            assert [probe.name for probe in engine.probes] == ["old"]
        return await ask(engine, "x")

    answer = run(backbone, replace, probes=[untrained_probe(backbone, "old")])
    assert [verdict.probe for verdict in answer.judged.judgement.verdicts] == ["old"]


def test_all_probes_may_go(backbone):
    async def replace(engine):
        await engine.replace_probes([])
        return await ask(engine, "x")

    answer = run(backbone, replace, probes=[untrained_probe(backbone, "old")])
    assert answer.judged.judgement.verdicts == answer.finished.judgement.verdicts == ()
    assert isinstance(answer.finished, Finished)


def test_an_engine_that_does_not_run_refuses(backbone):
    async def main():
        for engine in (
            TransformersEngine(backbone, []),
            LoadingEngine(lambda: TransformersEngine(backbone, [])),
        ):
            with pytest.raises(EngineUnavailableError):
                await engine.replace_probes([untrained_probe(backbone, "new")])

    asyncio.run(main())


def test_a_version_stands_for_the_artifact(backbone, tmp_path):
    probe = untrained_probe(backbone, "a")
    assert probe.version == ""
    first, again = (load_probe(save_probe(probe, tmp_path / n)).version for n in ("a", "b"))
    assert first == again
    assert len(first) == 12
    probe.mechanism.bias.add_(1.0)
    assert load_probe(save_probe(probe, tmp_path / "a")).version != first
    stricter = untrained_probe(backbone, "a", threshold=0.4)
    assert load_probe(save_probe(stricter, tmp_path / "c")).version != first
