"""Who goes next, and that a batch writes what the model alone would write."""

import asyncio
from functools import partial
from itertools import chain

import pytest
from transformers import Gemma3TextConfig, LlamaConfig

from engine_runs import (
    GREEDY,
    ROUNDING,
    ask,
    count_passes,
    events_of,
    probabilities,
    reference,
    run,
    until_idle,
    written_alone,
)
from families import family_backbone
from sidelight.bank import Panel
from sidelight.engines.base import (
    EngineBusyError,
    Finished,
    PromptJudged,
    Sampling,
    TextDelta,
    admit_all,
)
from sidelight.engines.queue import Limits, Request, RequestQueue
from sidelight.engines.transformers import TransformersEngine
from sidelight.errors import ContextLengthError, SidelightError
from sidelight.prompts import EncodedPrompt, Message, Part, Reads
from tiny import SIZES, three_probes, tiny_backbone, untrained_probe

GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
# One of each kind of cache and of positions, two of them with windows narrower than the prompts.
BACKBONES = {
    **{name: partial(family_backbone, name) for name in ("llama", "mistral", "gpt2", "gemma2")},
    "gemma3": lambda: tiny_backbone(Gemma3TextConfig(**GROUPED, sliding_window=8)),
}
TEXTS = ["hi", "a longer text than the others, so that they are padded", "of middle length"]


@pytest.fixture(scope="module")
def llama():
    return tiny_backbone()


@pytest.mark.slow
@pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES)
def test_a_batch_writes_what_the_model_alone_writes_also_of_prompts_in_parts(make):
    backbone = make()
    check_batches(backbone)
    check_parts(backbone)


def check_batches(backbone):
    async def ask_all(engine):
        # Together first; then one enters and leaves while another is being written.
        together = await asyncio.gather(*(ask(engine, text) for text in TEXTS))
        staggered = (ask(engine, text, delay_s=i / 100) for i, text in enumerate(TEXTS))
        return [together, await asyncio.gather(*staggered)]

    expected = [reference(backbone, text) for text in TEXTS]
    for limits in (Limits(), Limits(running=2, prefill_tokens=64, cache_tokens=256)):
        for answers in run(backbone, ask_all, limits=limits):
            assert [(a.text, a.finished.completion_tokens) for a in answers] == expected


def test_a_text_ends_with_its_length_a_stop_string_its_turn_or_the_context(llama):
    async def ask_all(engine):
        whole = await ask(engine, TEXTS[0])
        stop = whole.text[5:7]
        sampling = Sampling(temperature=0.0, max_tokens=16, stop=("never", stop))
        cut = await ask(engine, TEXTS[0], sampling)
        return whole, stop, cut, await ask(engine, "x" * 240, Sampling(temperature=0.0))

    whole, stop, cut, longest = run(llama, ask_all)
    assert (whole.finished.completion_tokens, whole.finished.reason) == (16, "length")
    assert whole.finished.prompt_tokens == len(llama.encoder.encode([Message("user", TEXTS[0])]))
    assert (cut.text, cut.finished.reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert cut.finished.completion_tokens < 16
    tokens = longest.finished.prompt_tokens + longest.finished.completion_tokens
    assert (tokens, longest.finished.reason) == (llama.encoder.max_tokens, "length")
    for length in (253, 400):
        with pytest.raises(ContextLengthError, match="Shorten it"):
            run(llama, lambda engine, length=length: ask(engine, "x" * length))
    backbone = tiny_backbone()
    _, (first,) = written_alone(backbone, "hi", max_tokens=1)
    backbone.model.generation_config.eos_token_id = [first, 2]
    ended = run(backbone, lambda engine: ask(engine, "hi"))
    assert (ended.text, ended.finished.reason, ended.finished.completion_tokens) == ("", "stop", 1)


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


def test_another_kind_of_state_and_two_probes_of_one_name_are_refused(llama):
    probes = three_probes(llama)
    with pytest.raises(SidelightError, match="distinct names"):
        TransformersEngine(llama, [*probes, probes[0]])
    backbone = tiny_backbone()
    backbone.model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(SidelightError, match="linear_attention"):
        TransformersEngine(backbone, [])


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
    return Request(prompt, Sampling(), max_tokens, Panel([]))


def check(length=10):
    return request(length, max_tokens=0)


@pytest.mark.parametrize(
    ("limits", "joining", "running", "taken"),
    [
        (Limits(running=2), [request(), request(), request()], [], [0, 1]),
        (Limits(running=2), [request(), request()], [request()], [0]),
        # A prefill batch counts its padding, and a prompt beyond the budget goes alone.
        (Limits(prefill_tokens=100), [request(10), request(10), request(60)], [], [0, 1]),
        (Limits(prefill_tokens=50), [request(80), request(10)], [], [0]),
        # The cache has room for what is still to be written.
        (Limits(cache_tokens=100), [request(10, 30) for _ in range(3)], [], [0, 1]),
        # Checks overtake; nobody else overtakes a request that does not fit yet.
        (Limits(running=1), [request(), check()], [request()], [1]),
        (Limits(cache_tokens=100), [request(10, 80), request(1, 1)], [request(10, 30)], []),
        # Long prompts that are only judged keep keys and values too.
        (Limits(prefill_tokens=50, cache_tokens=200), [check(80)], [check(80), check(80)], []),
    ],
)
def test_the_next_prefill_takes_who_came_first_and_fits(limits, joining, running, taken):
    queue = RequestQueue(limits)
    queue.join(joining)
    assert queue.find_next(running) == [joining[i] for i in taken]


def test_a_list_of_texts_is_one_place_in_line():
    queue = RequestQueue(Limits(prefill_tokens=20, waiting=2))
    texts, other = [check() for _ in range(5)], check()
    queue.join(texts)
    queue.join([other])
    order = []
    while batch := queue.find_next([]):
        queue.take(batch)
        queue.serve(batch)
        order.append(batch)
    assert order == [texts[:2], [other, texts[2]], texts[3:]]


def test_a_full_queue_refuses():
    queue = RequestQueue(Limits(waiting=2))
    queue.join([request(), request()])
    queue.join([request()])
    with pytest.raises(EngineBusyError, match="2 waiting, the limit is 2") as busy:
        queue.join([request()])
    assert busy.value.retry_after_s > 0
    assert len(queue) == 3


def test_who_leaves_the_queue_is_not_taken():
    queue = RequestQueue(Limits())
    stays, leaves = request(), request()
    queue.join([stays, leaves])
    queue.leave([leaves])
    assert queue.find_next([]) == [stays]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refused", "answered", "lists of texts"])
@pytest.mark.parametrize(
    ("others", "text", "tokens"), [(1, "hi", 16), (2, "x" * 60, 3), (5, "hi", 3), (5, "x" * 60, 3)]
)
def test_looping_clients_share_the_passes_with_a_victim(llama, kind, others, text, tokens):
    """At most n + 1 times the passes of the answer alone, beside n clients."""
    sampling = Sampling(temperature=0.0, max_tokens=tokens)
    shapes = count_passes(llama)

    async def passes(engine):
        before = len(shapes)
        answer = await ask(engine, text, sampling)
        return len(shapes) - before, answer.text

    async def beside_others(engine):
        alone = await passes(engine)

        async def loop(i):
            while True:
                if kind == "lists of texts":
                    await engine.judge([[Message("user", f"text {j}")] for j in range(30)])
                else:
                    admits = {"refused": lambda _: False, "answered": admit_all}[kind]
                    await events_of(engine, f"client {i}", GREEDY, admits=admits)

        loops = [asyncio.create_task(loop(i)) for i in range(others)]
        await asyncio.sleep(0.05)
        try:
            async with asyncio.timeout(20):
                return alone, await passes(engine)
        finally:
            for task in loops:
                task.cancel()
            await asyncio.wait(loops)

    limits = Limits(prefill_tokens=16)
    (alone, answer), (beside, own) = run(llama, beside_others, limits=limits)
    assert own == answer
    # One pass has begun when it comes, and one may begin before its last token is handed over.
    assert beside <= (others + 1) * alone + 2


def passes_of(backbone, work, **limits):
    shapes = count_passes(backbone)
    outcome = run(backbone, work, probes=every_probe(backbone), limits=Limits(**limits))
    return outcome, shapes


def every_probe(backbone):
    """Probes whose states are merged in every way, of all sides."""
    return [
        *three_probes(backbone),
        untrained_probe(backbone, "turns", reads=Reads(scope="each_turn")),
        untrained_probe(backbone, "late", reads=Reads("response")),
        untrained_probe(backbone, "both", reads=Reads("both"), mechanism="attention"),
    ]


LONG_TEXTS = ["hi", "a text of three parts, " * 3, "and one of more, to be read in turns. " * 4]
TURNS = [
    [Message("user", text), Message("assistant", "so " * 20), Message("user", text), *reply]
    for text in LONG_TEXTS[:2]
    for reply in ([], [Message("assistant", "an answer that is judged too")])
]


def check_parts(backbone):
    """Prompts that are read in parts have the texts and verdicts of those that are read whole."""

    async def ask_all(engine):
        together = await asyncio.gather(*(ask(engine, text) for text in LONG_TEXTS))
        watched = await asyncio.gather(
            *(events_of(engine, text, watch=["late", "both"]) for text in LONG_TEXTS)
        )
        return together, watched, await engine.judge(TURNS)

    (answers, *wanted), whole = passes_of(backbone, ask_all)
    (own_answers, *own), parts = passes_of(backbone, ask_all, prefill_tokens=7)
    assert max(shape.numel() for shape in parts if shape[1] > 1) <= 7
    assert max(shape.numel() for shape in whole) > 100
    texts = [reference(backbone, text)[0] for text in LONG_TEXTS]
    assert [a.text for a in own_answers] == [a.text for a in answers] == texts
    for mine, theirs in zip(events_in(own_answers, *own), events_in(answers, *wanted), strict=True):
        assert type(mine) is type(theirs)
        if isinstance(mine, TextDelta):
            continue
        require_equal(mine.judgement, theirs.judgement)
        if isinstance(mine, PromptJudged):
            assert mine.tokens == theirs.tokens


def events_in(answers, watched, judged):
    ends = [event for answer in answers for event in (answer.judged, answer.finished)]
    return [*ends, *chain.from_iterable(watched), *judged]


def require_equal(judgement, wanted):
    told = [[(v.probe, v.turn) for v in own.verdicts] for own in (judgement, wanted)]
    assert (told[0], judgement.failed) == (told[1], wanted.failed)
    assert probabilities(judgement.verdicts) == pytest.approx(
        probabilities(wanted.verdicts), abs=ROUNDING
    )


@pytest.mark.slow
def test_others_are_read_and_written_between_the_parts_of_a_prompt(llama):
    async def ask_some(engine):
        long = asyncio.create_task(ask(engine, "x" * 200))
        while not engine.load.running:
            await asyncio.sleep(0)
        short = await ask(engine, "hi")
        assert not long.done()
        return short, await long

    limits = Limits(prefill_tokens=4)
    short, long = run(llama, ask_some, limits=limits)
    assert (short.text, long.text) == (reference(llama, "hi")[0], reference(llama, "x" * 200)[0])


def test_a_prompt_that_is_given_up_is_not_read_on(llama):
    async def leave(engine):
        events = engine.generate([Message("user", "x" * 200)], GREEDY)
        asking = asyncio.ensure_future(anext(events))
        while not engine.load.running:
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait({asking})
        await until_idle(engine)
        return await ask(engine, "hi")

    passes = count_passes(llama)
    run(llama, leave, limits=Limits(prefill_tokens=16))
    # Some of the 14 parts of the long prompt, and the 16 tokens of the short text.
    assert len(passes) < 14 + 16


def test_a_short_text_is_not_padded_to_the_length_of_a_long_one():
    backbone = tiny_backbone(LlamaConfig(**{**SIZES, "max_position_embeddings": 1024}))
    backbone.encoder.max_tokens = 1024
    widths = []

    def note(_module, _args, kwargs):
        widths.append(tuple(kwargs["attention_mask"].shape))

    backbone.model.register_forward_pre_hook(note, with_kwargs=True)

    async def ask_both(engine):
        return await asyncio.gather(ask(engine, "x" * 700), ask(engine, "hi"))

    long, short = run(backbone, ask_both)
    assert (long.finished.completion_tokens, short.finished.completion_tokens) == (16, 16)
    assert all(rows == 1 for rows, columns in widths if columns > 512)
