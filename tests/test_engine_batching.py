"""Who goes next, and that a batch writes what the model alone would write."""

import asyncio

import pytest
from transformers import Gemma3TextConfig, GemmaConfig

from engine_runs import (
    GREEDY,
    ask,
    count_passes,
    events_of,
    reference,
    run,
    until_idle,
    written_alone,
)
from sidelight.bank import Panel
from sidelight.engines.base import EngineBusyError, Finished, PromptJudged, Sampling
from sidelight.engines.queue import Limits, Request, RequestQueue
from sidelight.engines.transformers import TransformersEngine
from sidelight.errors import ContextLengthError, SidelightError
from sidelight.prompts import EncodedPrompt, Message, Part, Reads
from tiny import SIZES, three_probes, tiny_backbone, untrained_probe

GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
# Beyond the families that backbones are tested on: windows narrower than the prompts.
MORE_CONFIGS = [GemmaConfig(**GROUPED), Gemma3TextConfig(**GROUPED, sliding_window=8)]
TEXTS = ["hi", "a longer text than the others, so that they are padded", "of middle length"]


@pytest.fixture(scope="module")
def llama():
    return tiny_backbone()


def check_batches(backbone):
    async def ask_all(engine):
        # Together first; then one enters and leaves while another is being written.
        together = await asyncio.gather(*(ask(engine, text) for text in TEXTS))
        staggered = (ask(engine, text, delay_s=i / 100) for i, text in enumerate(TEXTS))
        return [together, await asyncio.gather(*staggered)]

    expected = [reference(backbone, text) for text in TEXTS]
    for answers in run(backbone, ask_all):
        assert [(a.text, a.finished.completion_tokens) for a in answers] == expected


@pytest.mark.slow
def test_a_batch_writes_what_the_model_alone_writes(family):
    check_batches(family)


@pytest.mark.slow
@pytest.mark.parametrize("config", MORE_CONFIGS, ids=lambda config: config.model_type)
def test_windows_move_with_the_rows(config):
    check_batches(tiny_backbone(config))


def test_tokens_are_counted(llama):
    answer = run(llama, lambda engine: ask(engine, "hi"))
    assert answer.finished.prompt_tokens == len(llama.encoder.encode([Message("user", "hi")]))
    assert answer.finished.completion_tokens == 16
    assert answer.finished.reason == "length"


def test_a_stop_string_ends_the_text(llama):
    async def ask_both(engine):
        whole = await ask(engine, TEXTS[0])
        stop = whole.text[5:7]
        sampling = Sampling(temperature=0.0, max_tokens=16, stop=("never", stop))
        return whole.text, stop, await ask(engine, TEXTS[0], sampling)

    whole, stop, answer = run(llama, ask_both)
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finished.reason == "stop"
    assert answer.finished.completion_tokens < 16


def test_an_end_of_turn_token_ends_the_text(llama):
    backbone = tiny_backbone()
    _, (first,) = written_alone(backbone, "hi", max_tokens=1)
    backbone.model.generation_config.eos_token_id = [first, 2]
    answer = run(backbone, lambda engine: ask(engine, "hi"))
    assert (answer.text, answer.finished.reason) == ("", "stop")
    assert answer.finished.completion_tokens == 1


def test_a_seed_gives_the_same_text_beside_any_neighbours(llama):
    seeded = Sampling(temperature=1.0, top_p=0.9, max_tokens=16, seed=3)

    async def ask_twice(engine):
        alone = await ask(engine, TEXTS[0], seeded)
        neighbours = [ask(engine, text, Sampling(max_tokens=9)) for text in TEXTS[1:]]
        beside, *_ = await asyncio.gather(ask(engine, TEXTS[0], seeded), *neighbours)
        other = await ask(engine, TEXTS[0], Sampling(max_tokens=16, seed=4))
        return alone.text, beside.text, other.text

    alone, beside, other = run(llama, ask_twice)
    assert alone == beside
    assert alone != other


def test_text_ends_with_the_context(llama):
    text = "x" * 240
    answer = run(llama, lambda engine: ask(engine, text, Sampling(temperature=0.0)))
    in_all = answer.finished.prompt_tokens + answer.finished.completion_tokens
    assert in_all == llama.encoder.max_tokens
    assert answer.finished.reason == "length"


@pytest.mark.parametrize("length", [253, 400])
def test_a_prompt_without_room_for_an_answer_is_refused(llama, length):
    with pytest.raises(ContextLengthError, match="Shorten it"):
        run(llama, lambda engine: ask(engine, "x" * length))


@pytest.mark.slow
def test_a_line_longer_than_the_limits_is_worked_off(llama):
    limits = Limits(running=2, prefill_tokens=64, cache_tokens=256)

    async def ask_many(engine):
        return await asyncio.gather(*(ask(engine, text) for text in TEXTS * 4))

    answers = run(llama, ask_many, limits=limits)
    assert [a.text for a in answers] == [reference(llama, text)[0] for text in TEXTS] * 4


def test_a_model_with_another_kind_of_state_is_refused():
    backbone = tiny_backbone()
    backbone.model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(SidelightError, match="linear_attention"):
        TransformersEngine(backbone, [])


def test_two_probes_of_one_name_are_refused(llama):
    probes = three_probes(llama)
    with pytest.raises(SidelightError, match="distinct names"):
        TransformersEngine(llama, [*probes, probes[0]])


def test_nothing_is_written_for_what_is_not_admitted(llama):
    seen: list[PromptJudged] = []

    def refuse(judged):
        seen.append(judged)
        return False

    async def refused(engine):
        events = await events_of(engine, "hello", admits=refuse)
        assert engine.load.running == engine.load.waiting == 0
        return events

    passes = count_passes(llama)
    probes = [
        untrained_probe(llama, "early"),
        untrained_probe(llama, "late", reads=Reads("response")),
    ]
    events = run(llama, refused, probes=probes)
    assert events == seen
    assert [verdict.probe for verdict in seen[0].judgement.verdicts] == ["early"]
    assert len(passes) == 1


@pytest.mark.slow
def test_admission_is_decided_for_each_request_by_itself(llama):
    async def some(engine):
        gate = [engine.generate([Message("user", "first")], GREEDY)]
        await anext(gate[0])
        # All in one prefill, beside a row that is being written.
        events = await asyncio.gather(
            *(events_of(engine, f"text {i}", admits=lambda _, i=i: i % 2 == 0) for i in range(6))
        )
        async for _ in gate[0]:
            pass
        await until_idle(engine)
        return events, [await ask(engine, f"text {i}") for i in range(6)]

    events, alone = run(llama, some, probes=[untrained_probe(llama, "early")])
    for i, (own, answer) in enumerate(zip(events, alone, strict=True)):
        assert own[0].judgement.verdicts[0].label == answer.judged.judgement.verdicts[0].label
        if i % 2:
            assert len(own) == 1
        else:
            assert isinstance(own[-1], Finished)
            assert "".join(event.text for event in own[1:-1]) == answer.text


def request(length=10, max_tokens=10):
    prompt = EncodedPrompt((1,) * length, (Part.PROMPT,) * length)
    panel = Panel([])
    return Request(prompt, Sampling(), max_tokens, panel)


def check(length=10):
    return request(length, max_tokens=0)


def taken(line, running=()):
    return line.take_next(list(running))


def test_first_come_first_served():
    line = RequestQueue(Limits(running=2))
    requests = [request() for _ in range(3)]
    line.join(requests)
    assert taken(line) == requests[:2]
    assert taken(line, [requests[0]]) == requests[2:]


def test_a_full_line_refuses():
    line = RequestQueue(Limits(waiting=2))
    line.join([request(), request()])
    with pytest.raises(EngineBusyError, match="2 waiting, the limit is 2") as busy:
        line.join([request()])
    assert busy.value.retry_after_s > 0
    assert len(line) == 2


def test_a_prefill_batch_counts_its_padding():
    line = RequestQueue(Limits(prefill_tokens=100))
    requests = [request(10), request(10), request(60)]
    line.join(requests)
    assert taken(line) == requests[:2]


def test_a_prompt_beyond_the_budget_goes_alone():
    line = RequestQueue(Limits(prefill_tokens=50))
    requests = [request(80), request(10)]
    line.join(requests)
    assert taken(line) == requests[:1]


def test_the_cache_has_room_for_what_is_still_to_be_written():
    line = RequestQueue(Limits(cache_tokens=100))
    requests = [request(10, 30), request(10, 30), request(10, 30)]
    line.join(requests)
    assert taken(line) == requests[:2]


def test_checks_pass_while_every_place_is_taken():
    line = RequestQueue(Limits(running=1))
    running, waiting, small = request(), request(), check()
    line.join([waiting, small])
    assert taken(line, [running]) == [small]
    assert taken(line) == [waiting]


def test_nobody_overtakes_a_request_that_does_not_fit_yet():
    line = RequestQueue(Limits(cache_tokens=100))
    large, small = request(10, 80), request(1, 1)
    line.join([large, small])
    assert taken(line, [request(10, 30)]) == []
    assert taken(line) == [large]


def test_those_who_leave_are_not_admitted():
    line = RequestQueue(Limits())
    stays, leaves = request(), request()
    line.join([stays, leaves])
    line.leave([leaves])
    assert taken(line) == [stays]
