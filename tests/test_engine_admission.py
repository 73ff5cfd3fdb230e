"""A prompt that is not admitted costs its prefill and nothing more."""

import asyncio

import pytest

from sidelight.engines.base import Finished, PromptJudged
from sidelight.prompts import Message, Reads
from test_engine_decoding import GREEDY, ask, run
from test_engine_failures import count_passes, until_idle
from tiny import tiny_backbone, untrained_probe


@pytest.fixture
def backbone():
    return tiny_backbone()


async def events_of(engine, text, admits):
    conversation = [Message("user", text)]
    return [event async for event in engine.generate(conversation, GREEDY, admits=admits)]


def test_nothing_is_written_for_what_is_not_admitted(backbone):
    seen: list[PromptJudged] = []

    def refuse(judged):
        seen.append(judged)
        return False

    async def refused(engine):
        events = await events_of(engine, "hello", refuse)
        assert engine.load.running == engine.load.waiting == 0
        return events

    passes = count_passes(backbone)
    probes = [
        untrained_probe(backbone, "early"),
        untrained_probe(backbone, "late", reads=Reads("response")),
    ]
    events = run(backbone, refused, probes=probes)
    assert events == seen
    assert [verdict.probe for verdict in seen[0].verdicts] == ["early"]
    assert len(passes) == 1


def test_admission_is_decided_for_each_request_by_itself(backbone):
    async def some(engine):
        gate = [engine.generate([Message("user", "first")], GREEDY)]
        await anext(gate[0])
        # All in one prefill, beside a row that is being written.
        events = await asyncio.gather(
            *(events_of(engine, f"text {i}", lambda _, i=i: i % 2 == 0) for i in range(6))
        )
        async for _ in gate[0]:
            pass
        await until_idle(engine)
        return events, [await ask(engine, f"text {i}") for i in range(6)]

    events, alone = run(backbone, some, probes=[untrained_probe(backbone, "early")])
    for i, (own, answer) in enumerate(zip(events, alone, strict=True)):
        assert own[0].verdicts[0].label == answer.judged.verdicts[0].label
        if i % 2:
            assert len(own) == 1
        else:
            assert isinstance(own[-1], Finished)
            assert "".join(event.text for event in own[1:-1]) == answer.text
