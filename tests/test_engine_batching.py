"""Who goes next, and that a batch writes what the model alone would write."""

import asyncio
from functools import partial

import pytest
from transformers import Gemma3TextConfig, LlamaConfig

import wordings
from sidelight.engines.base import (
    EngineBusyError,
    Finished,
    Sampling,
    admit_all,
)
from sidelight.engines.batch import Batch
from sidelight.engines.queue import Limits, Request, RequestQueue
from sidelight.engines.text import TextCodec
from sidelight.engines.transformers.engine import TransformersDecoder, TransformersEngine
from sidelight.errors import ContextLengthError, SidelightError
from sidelight.models.conversation import EncodedPrompt, Message, Reads, TokenRole
from sidelight.probes.bank import ProbeBanks
from worlds.models import SIZES, family_backbone, three_probes, tiny_backbone, untrained_probe
from worlds.servers import (
    GREEDY,
    ask,
    count_passes,
    events_of,
    reference,
    require_alike,
    run_engine,
    until_idle,
    written_singly,
)

GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
# One of each kind of cache and of positions, two of them with windows narrower than the prompts.
BACKBONES = {
    **{name: partial(family_backbone, name) for name in ("llama", "mistral", "gpt2", "gemma2")},
    "gemma3": lambda: tiny_backbone(Gemma3TextConfig(**GROUPED, sliding_window=8)),
}
TEXTS = ["hi", "a longer text than the others, so that they are padded", "of middle length"]
TURNS = [
    [Message("user", text), Message("assistant", "so " * 20), Message("user", text), *reply]
    for text in TEXTS[:2]
    for reply in ([], [Message("assistant", "an answer that is judged too")])
]
CHECKS = [[Message("user", text)] for text in TEXTS]


@pytest.fixture(scope="module")
def llama():
    return tiny_backbone()


@pytest.mark.slow
@pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES)
def test_batched_and_chunked_output_matches_bare_model(make):
    backbone = make()
    # Their states are merged in every way.
    probes = [
        *three_probes(backbone),
        untrained_probe(backbone, "turns", reads=Reads(scope="each_turn")),
        untrained_probe(backbone, "last", reads=Reads(scope="last_turn")),
        untrained_probe(backbone, "late", reads=Reads("response")),
        untrained_probe(backbone, "both", reads=Reads("both"), mechanism="attention"),
    ]

    async def ask_all(engine):
        # Together first; then one enters and leaves while another is being written.
        together = await asyncio.gather(*(ask(engine, text) for text in TEXTS))
        staggered = (ask(engine, text, delay_s=i / 100) for i, text in enumerate(TEXTS))
        written = [together, await asyncio.gather(*staggered)]
        return written, await engine.classify(TURNS), await engine.classify(CHECKS)

    expected, told = [reference(backbone, text) for text in TEXTS], []
    passes = count_passes(backbone)
    roomy, small = Limits(), Limits(running=2, prefill_tokens=64, cache_tokens=256)
    for limits in (roomy, small, Limits(prefill_tokens=7)):
        passes.clear()
        written, checks, checked = run_engine(backbone, ask_all, probes=probes, limits=limits)
        for answers in written:
            assert [(a.text, a.finished.completion_tokens) for a in answers] == expected
            events = [*(a.finished for a in answers), *checks]
            told.append([event.verdicts for event in (*events, *(a.classified for a in answers))])
            told.append([event.verdicts for event in (*events, *checked)])
    assert max(shape.numel() for shape in passes if shape[1] > 1) <= 7
    for batch_verdicts in told[1:]:
        for verdicts, wanted in zip(batch_verdicts, told[0], strict=True):
            assert verdicts.failed == wanted.failed
            assert [(v.probe, v.turn) for v in verdicts.verdicts] == [
                (v.probe, v.turn) for v in wanted.verdicts
            ]
            require_alike(verdicts.verdicts, wanted.verdicts)


def test_generation_ends_at_length_stop_string_eos_or_context_limit(llama):
    async def ask_all(engine):
        uncut = await ask(engine, TEXTS[0])
        stop = uncut.text[5:7]
        sampling = Sampling(temperature=0.0, max_tokens=16, stop=("never", stop))
        cut = await ask(engine, TEXTS[0], sampling)
        return uncut, stop, cut, await ask(engine, "x" * 240, Sampling(temperature=0.0))

    uncut, stop, cut, longest = run_engine(llama, ask_all)
    assert (uncut.finished.completion_tokens, uncut.finished.reason) == (16, "length")
    assert uncut.finished.prompt_tokens == len(llama.encoder.encode([Message("user", TEXTS[0])]))
    assert (cut.text, cut.finished.reason) == (uncut.text[: uncut.text.index(stop)], "stop")
    assert cut.finished.completion_tokens < 16
    tokens = longest.finished.prompt_tokens + longest.finished.completion_tokens
    assert (tokens, longest.finished.reason) == (llama.encoder.max_tokens, "length")
    for length in (253, 400):
        with pytest.raises(ContextLengthError, match=wordings.SHORTEN):
            run_engine(llama, lambda engine, length=length: ask(engine, "x" * length))
    backbone = tiny_backbone()
    _, (first,) = written_singly(backbone, "hi", max_tokens=1)
    backbone.model.generation_config.eos_token_id = [first, 2]
    ended = run_engine(backbone, lambda engine: ask(engine, "hi"))
    assert (ended.text, ended.finished.reason, ended.finished.completion_tokens) == ("", "stop", 1)


def test_seeded_text_does_not_depend_on_batch(llama):
    seeded = Sampling(temperature=1.0, top_p=0.9, max_tokens=16, seed=3)

    async def ask_twice(engine):
        single = await ask(engine, TEXTS[0], seeded)
        neighbours = [ask(engine, text, Sampling(max_tokens=9)) for text in TEXTS[1:]]
        beside, *_ = await asyncio.gather(ask(engine, TEXTS[0], seeded), *neighbours)
        reseeded = await ask(engine, TEXTS[0], Sampling(max_tokens=16, seed=4))
        return single.text, beside.text, reseeded.text

    single, beside, reseeded = run_engine(llama, ask_twice)
    assert single == beside
    assert single != reseeded


@pytest.mark.parametrize("kind", ["linear_attention", "chunked_attention"])
def test_unbatchable_layer_kinds_are_refused(kind):
    backbone = tiny_backbone()
    backbone.model.config.layer_types = ["full_attention", kind, "full_attention"]
    with pytest.raises(SidelightError, match=wordings.LAYERS_OF_KIND.format(kind=kind)) as raised:
        TransformersEngine(backbone, [])
    # Chunked attention keeps keys and values, too.
    assert "keys and values" not in str(raised.value)


@pytest.mark.slow
def test_admission_is_decided_per_request(llama):
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

    events, single = run_engine(llama, some, probes=[untrained_probe(llama, "early")])
    for i, (request_events, answer) in enumerate(zip(events, single, strict=True)):
        assert (
            request_events[0].verdicts.verdicts[0].label
            == answer.classified.verdicts.verdicts[0].label
        )
        if i % 2:
            assert len(request_events) == 1
        else:
            assert isinstance(request_events[-1], Finished)
            assert "".join(event.text for event in request_events[1:-1]) == answer.text


def request(length=10, max_tokens=10):
    prompt = EncodedPrompt((1,) * length, (TokenRole.PROMPT,) * length)
    return Request(prompt, Sampling(), max_tokens, ProbeBanks([]))


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
        (Limits(prefill_texts=2), [request(10), request(10), request(10)], [], [0, 1]),
        # The cache has room for what is still to be written.
        (Limits(cache_tokens=100), [request(10, 30) for _ in range(3)], [], [0, 1]),
        # Checks overtake; nothing else overtakes a request that does not fit yet.
        (Limits(running=1), [request(), check()], [request()], [1]),
        (Limits(cache_tokens=100), [request(10, 80), request(1, 1)], [request(10, 30)], []),
        # Long prompts that are only judged keep keys and values too.
        (Limits(prefill_tokens=50, cache_tokens=200), [check(80)], [check(80), check(80)], []),
    ],
)
def test_next_prefill_takes_first_requests_that_fit(limits, joining, running, taken):
    queue = RequestQueue(limits)
    queue.join(joining)
    assert queue.find_next(running) == [joining[i] for i in taken]


def test_list_of_texts_occupies_one_queue_position():
    queue = RequestQueue(Limits(prefill_tokens=20, waiting=2))
    texts, next_check = [check() for _ in range(5)], check()
    queue.join(texts)
    queue.join([next_check])
    order = []
    while batch := queue.find_next([]):
        queue.take(batch)
        queue.serve(batch)
        order.append(batch)
    assert order == [texts[:2], [next_check, texts[2]], texts[3:]]


def test_full_queue_rejects_requests_and_skips_departed_ones():
    queue = RequestQueue(Limits(waiting=2))
    stays, leaves, joins = request(), request(), request()
    queue.join([stays, leaves])
    queue.join([joins])
    with pytest.raises(EngineBusyError, match=wordings.QUEUE_FULL.format(waiting=2, limit=2)):
        queue.join([request()])
    assert len(queue) == 3
    queue.leave([leaves])
    assert queue.find_next([]) == [stays, joins]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refused", "answered", "lists of texts"])
@pytest.mark.parametrize(
    ("loopers", "text", "tokens"), [(1, "hi", 16), (2, "x" * 60, 3), (5, "hi", 3), (5, "x" * 60, 3)]
)
def test_looping_clients_cannot_starve_a_request(llama, monkeypatch, kind, loopers, text, tokens):
    """At most n + 1 times the passes of the answer alone, beside n clients."""
    sampling = Sampling(temperature=0.0, max_tokens=tokens)
    shapes, joined = count_passes(llama), []
    join = RequestQueue.join

    def noting_the_victim(queue, requests):
        # Passes that others had while its text was still being encoded are not its turns.
        if requests[0].sampling is sampling:
            joined.append(len(shapes))
        join(queue, requests)

    monkeypatch.setattr(RequestQueue, "join", noting_the_victim)

    async def passes(engine):
        answer = await ask(engine, text, sampling)
        return len(shapes) - joined[-1], answer.text

    async def beside_loops(engine):
        passes_without = await passes(engine)

        async def loop(i):
            while True:
                if kind == "lists of texts":
                    await engine.classify([[Message("user", f"text {j}")] for j in range(30)])
                else:
                    admits = {"refused": lambda _: False, "answered": admit_all}[kind]
                    await events_of(engine, f"client {i}", GREEDY, admits=admits)

        loops = [asyncio.create_task(loop(i)) for i in range(loopers)]
        await asyncio.sleep(0.05)
        try:
            async with asyncio.timeout(20):
                return passes_without, await passes(engine)
        finally:
            for task in loops:
                task.cancel()
            await asyncio.wait(loops)

    limits = Limits(prefill_tokens=16)
    (passes_without, answer), (beside, answer_beside) = run_engine(
        llama, beside_loops, limits=limits
    )
    assert answer_beside == answer
    # One pass was under way when it joined, and one begins before its last token is handed over.
    assert beside <= (loopers + 1) * passes_without + 2


@pytest.mark.slow
def test_other_requests_proceed_between_prefill_chunks(llama):
    async def ask_some(engine):
        events = []

        def admits(event):
            events.append(event)
            return True

        long = asyncio.create_task(events_of(engine, "x" * 200, admits=admits))
        while not engine.load.running:
            await asyncio.sleep(0)
        short = await ask(engine, "hi")
        # The other prompt is still being read.
        assert not events
        return short, await long

    limits = Limits(prefill_tokens=4)
    short, long = run_engine(llama, ask_some, limits=limits)
    assert short.text == reference(llama, "hi")[0]
    assert "".join(event.text for event in long[1:-1]) == reference(llama, "x" * 200)[0]


@pytest.mark.parametrize(
    "work",
    [lambda engine, text: anext(engine.generate(text, GREEDY)), lambda e, text: e.classify([text])],
    ids=["answer", "check"],
)
def test_cancelled_prompt_stops_prefill(llama, work):
    async def leave(engine):
        asking = asyncio.ensure_future(work(engine, [Message("user", "x" * 200)]))
        while not engine.load.running:
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait({asking})
        await until_idle(engine)
        return await ask(engine, "hi")

    passes = count_passes(llama)
    run_engine(llama, leave, limits=Limits(prefill_tokens=16))
    # Some of the 13 parts of the long prompt, and the 16 tokens of the short text.
    assert len(passes) < 13 + 16


def test_short_text_is_not_padded_to_long_one():
    backbone = tiny_backbone(LlamaConfig(**{**SIZES, "max_position_embeddings": 1024}))
    backbone.encoder.max_tokens = 1024
    widths = []

    def note(_module, _args, kwargs):
        widths.append(tuple(kwargs["attention_mask"].shape))

    backbone.model.register_forward_pre_hook(note, with_kwargs=True)

    async def ask_both(engine):
        return await asyncio.gather(ask(engine, "x" * 700), ask(engine, "hi"))

    long, short = run_engine(backbone, ask_both)
    assert (long.finished.completion_tokens, short.finished.completion_tokens) == (16, 16)
    assert all(rows == 1 for rows, width in widths if width > 512)


def test_requests_are_readable_while_model_thread_adds_rows(llama):
    batch = Batch(TransformersDecoder(llama), TextCodec(llama.encoder), prefill_tokens=64)

    class Entering:
        @property
        def requests(self):
            batch.rows["another"] = self
            return ["a request"]

    batch.rows["one"] = Entering()
    assert batch.requests == ["a request"]
