"""The engine behind our server: events, verdicts, replacing probes, and shutting down."""

import asyncio
import itertools
import json
import os
import signal
import time
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx
import numpy as np
import pytest
import torch

from live import openai_client, served
from sidelight.engines.base import (
    EngineUnavailableError,
    Finished,
    GenerationError,
    PromptJudged,
    ResponseScored,
    Sampling,
    TextDelta,
)
from sidelight.engines.text import Speller
from sidelight.errors import ContextLengthError, FingerprintMismatchError, SidelightError
from sidelight.prompts import EncodedPrompt, Message, Part, PlainText, Reads
from sidelight.types import Judgement
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
GREEDY = Sampling(max_tokens=12, temperature=0)
LONG = Sampling(max_tokens=24, temperature=0)
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


async def events_of(engine, text, sampling=GREEDY, watch=()):
    return [
        event async for event in engine.generate([Message("user", text)], sampling, watch=watch)
    ]


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


def test_on_plain_text_probes_of_chats_alone_give_no_verdict(engine, loop, model):
    asked = []

    def admits(judged):
        asked.append(judged)
        return True

    async def written():
        watch = names(model, "response", "both")
        events = engine.generate(PlainText(TEXTS[5]), GREEDY, watch=watch, admits=admits)
        return [event async for event in events]

    events = loop.run(written())
    chats = {probe.name for probe in model.probes if probe.prompt_format == "chat"}
    assert events[0].is_plain
    assert asked == events[:1]
    prompt = model.backbone.encoder.encode(PlainText(TEXTS[5]))
    written = greedy_tokens(model, prompt, events[-1].completion_tokens)
    judged = [event for event in events if not isinstance(event, TextDelta)]
    assert len(judged) == len(written) + 2
    for event, tokens in zip(judged, (0, *range(1, len(written) + 1), len(written)), strict=True):
        sides = ("response", "both") if tokens else ("prompt",)
        assert set(event.judgement.failed) == chats & set(names(model, *sides))
        own = replace(
            prompt,
            token_ids=(*prompt.token_ids, *written[:tokens]),
            parts=prompt.parts + (Part.RESPONSE,) * tokens,
        )
        require_equal(event.judgement, expected(model, [own])[0], {*names(model, *sides)} - chats)


def test_concurrent_requests_get_their_own_verdicts_before_their_text(engine, loop, model):
    async def ask_all():
        return await asyncio.gather(*(events_of(engine, text) for text in TEXTS))

    prompts = [model.backbone.encoder.encode([Message("user", text)]) for text in TEXTS]
    for events, prompt, wanted in zip(
        loop.run(ask_all()), prompts, expected(model, prompts), strict=True
    ):
        judged, finished = events[0], events[-1]
        assert isinstance(judged, PromptJudged)
        assert isinstance(finished, Finished)
        assert judged.tokens == len(prompt) == finished.prompt_tokens
        assert min(judged.judging_s, finished.judging_s) > 0
        require_equal(judged.judgement, wanted, names(model, "prompt"))
        assert finished.completion_tokens <= GREEDY.max_tokens
        late = finished.judgement
        assert {v.probe for v in late.verdicts} | set(late.failed) == set(
            names(model, "response", "both")
        )


def test_a_watched_probe_is_scored_after_every_token(engine, loop, model):
    late = names(model, "response", "both")
    events = loop.run(events_of(engine, TEXTS[3], watch=late))
    prompt = model.backbone.encoder.encode([Message("user", TEXTS[3])])
    finished = events[-1]
    scored = [event for event in events if isinstance(event, ResponseScored)]
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert [event.tokens for event in scored] == list(range(1, finished.completion_tokens + 1))
    written = greedy_tokens(model, prompt, finished.completion_tokens)
    # A character that is not whole at the end is not sent.
    whole_text = model.backbone.tokenizer.decode(written, skip_special_tokens=True)
    assert whole_text.rstrip("\ufffd") == text.rstrip("\ufffd")
    for event in (scored[0], scored[4], scored[-1]):
        read = tuple(written[: event.tokens])
        whole = EncodedPrompt(
            prompt.token_ids + read, prompt.parts + (Part.RESPONSE,) * event.tokens
        )
        require_equal(event.judgement, expected(model, [whole])[0], late)
    assert (
        values(finished.judgement.verdicts).keys() == values(scored[-1].judgement.verdicts).keys()
    )


def test_a_slow_reader_gets_a_score_of_every_token(engine, loop, model):
    """VLLM goes on while nobody reads its outputs, and then gives several tokens at once."""
    late = names(model, "response", "both")

    async def read_slowly():
        events = []
        async for event in engine.generate([Message("user", TEXTS[3])], LONG, watch=late):
            events.append(event)
            if isinstance(event, PromptJudged | TextDelta):
                # Not asyncio's: nothing of vLLM's can run in this process meanwhile.
                time.sleep(0.5)
        return events

    events = loop.run(read_slowly())
    quick = loop.run(events_of(engine, TEXTS[3], LONG, watch=late))
    scored = {
        e.tokens: values(e.judgement.verdicts) for e in events if isinstance(e, ResponseScored)
    }
    assert list(scored) == list(range(1, events[-1].completion_tokens + 1))
    deltas = [event for event in events if isinstance(event, TextDelta)]
    assert len(deltas) < len([event for event in quick if isinstance(event, TextDelta)])
    for event in quick:
        if isinstance(event, ResponseScored):
            for name, probabilities in values(event.judgement.verdicts).items():
                np.testing.assert_allclose(
                    scored[event.tokens][name], probabilities, rtol=0, atol=ROUNDING
                )


def greedy_tokens(model, prompt, count):
    ids = torch.tensor([prompt.token_ids])
    written = model.backbone.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        pad_token_id=0,
    )
    return written[0, len(prompt) :].tolist()


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


def test_a_watched_text_that_fills_the_context_is_scored_to_its_end(engine, loop, model):
    late = names(model, "response", "both")
    content = "word " * 95
    unbounded = Sampling(temperature=0)
    events = loop.run(events_of(engine, content, unbounded, watch=late))
    finished, scored = events[-1], [e for e in events if isinstance(e, ResponseScored)]
    assert finished.reason == "length"
    assert finished.prompt_tokens + finished.completion_tokens == engine.max_tokens
    assert scored[-1].tokens == finished.completion_tokens


def test_the_longest_text_is_judged_and_a_longer_one_is_refused(engine, loop):
    def text(length):
        return EncodedPrompt((7,) * length, (Part.PROMPT,) * length)

    assert loop.run(engine.check(text(engine.max_tokens))).verdicts
    with pytest.raises(ContextLengthError, match=f"judges {engine.max_tokens} at most"):
        loop.run(engine.check(text(engine.max_tokens + 1)))


def test_one_token_and_stop_strings(engine, loop, model):
    first = loop.run(events_of(engine, TEXTS[5], Sampling(max_tokens=1, temperature=0)))
    assert isinstance(first[0], PromptJudged)
    assert first[-1].completion_tokens == 1
    text = "".join(
        e.text for e in loop.run(events_of(engine, TEXTS[5])) if isinstance(e, TextDelta)
    )
    stop = text[3:5]
    cut = loop.run(
        events_of(engine, TEXTS[5], Sampling(max_tokens=12, temperature=0, stop=(stop,)))
    )
    assert "".join(e.text for e in cut if isinstance(e, TextDelta)) == text[: text.index(stop)]
    assert cut[-1].reason == "stop"


@pytest.mark.parametrize("count", [0, 3])
def test_log_probabilities_are_the_models_own(engine, loop, model, count):
    """They are reported before temperature, though the tokens are drawn with it."""
    sampling = Sampling(max_tokens=20, temperature=1.5, top_p=0.9, logprobs=count)

    async def ask_all():
        return await asyncio.gather(*(events_of(engine, text, sampling) for text in TEXTS[:6]))

    compared = 0
    for text, events in zip(TEXTS, loop.run(ask_all()), strict=False):
        reported = [t for e in events if isinstance(e, TextDelta | Finished) for t in e.logprobs]
        is_ended = events[-1].reason == "stop"
        assert len(reported) == events[-1].completion_tokens - is_ended
        prompt = model.backbone.encoder.encode([Message("user", text)])
        written = known_tokens(model, reported)
        compared += len(written)
        wanted = log_probabilities(model, prompt, written)
        for token, drawn, row in zip(reported, written, wanted, strict=False):
            best = row.topk(count).values.tolist()
            assert token.drawn.logprob == pytest.approx(row[drawn].item(), abs=ROUNDING)
            assert [o.logprob for o in token.likeliest] == pytest.approx(best, abs=ROUNDING)
    assert compared > 10


def test_the_reported_tokens_are_those_that_were_sent(engine, loop):
    """With a stop string, whose tokens are not reported, and without."""
    whole = reported_text(loop.run(events_of(engine, TEXTS[5], replace(GREEDY, logprobs=0))))
    text = "".join(
        e.text for e in loop.run(events_of(engine, TEXTS[5])) if isinstance(e, TextDelta)
    )
    assert whole.startswith(text)
    place = next(i for i in range(3, len(text)) if "\ufffd" not in text[i : i + 2])
    stopped = replace(GREEDY, logprobs=0, stop=(text[place : place + 2],))
    events = loop.run(events_of(engine, TEXTS[5], stopped))
    assert events[-1].reason == "stop"
    assert reported_text(events) == "".join(e.text for e in events if isinstance(e, TextDelta))


def reported_text(events):
    reported = [t for e in events if isinstance(e, TextDelta | Finished) for t in e.logprobs]
    return b"".join(t.drawn.spelling.bytes or b"" for t in reported).decode(errors="replace")


def known_tokens(model, reported):
    """Up to the first without a known spelling: the model has more ids than names."""
    tokenizer = model.backbone.tokenizer
    spell = Speller(tokenizer)
    by_spelling = {spell(token): token for token in range(len(tokenizer))}
    known = [by_spelling.get(token.drawn.spelling) for token in reported]
    return list(itertools.takewhile(lambda token: token is not None, known))


def log_probabilities(model, prompt, written):
    """After each token but the last, from one pass over prompt and text."""
    with torch.inference_mode():
        whole = torch.tensor([[*prompt.token_ids, *written]])
        logits = model.backbone.model(input_ids=whole).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)


def test_a_prompt_that_is_not_admitted_is_judged_and_has_left(engine, loop):
    async def ask():
        events = engine.generate([Message("user", TEXTS[2])], GREEDY, admits=lambda _judged: False)
        return [(event, engine.load.running) async for event in events]

    ((judged, running),) = loop.run(ask())
    assert isinstance(judged, PromptJudged)
    assert judged.judgement.verdicts
    assert running == 0


def test_a_client_that_leaves_frees_its_place_and_disturbs_no_other(engine, loop, model):
    async def leave_one():
        leaving = engine.generate([Message("user", TEXTS[2])], Sampling(max_tokens=200))
        await anext(leaving)
        staying = asyncio.create_task(events_of(engine, TEXTS[4]))
        await leaving.aclose()
        return await staying

    events = loop.run(leave_one())
    prompt = model.backbone.encoder.encode([Message("user", TEXTS[4])])
    wanted = expected(model, [prompt])[0]
    require_equal(events[0].judgement, wanted, names(model, "prompt"))
    assert (engine.load.running, engine.load.waiting) == (0, 0)


def test_new_probes_take_over_and_old_states_are_not_read(engine, loop, model):
    other = [
        untrained_probe(model.backbone, "other"),
        untrained_probe(model.backbone, "late", reads=Reads("both")),
    ]
    long = "the same long text " * 12
    replaced = Model(model.backbone, model.path, other, [])
    prompt = model.backbone.encoder.encode([Message("user", long)])

    async def replace_and_ask():
        before = await events_of(engine, long)
        running = asyncio.create_task(events_of(engine, TEXTS[6], Sampling(max_tokens=60)))
        await asyncio.sleep(0.05)
        stale = engine.generate([Message("user", long)], GREEDY)
        replacing = asyncio.create_task(engine.replace_probes(other))
        await asyncio.sleep(0)
        # As a server does: who waits is judged by the new ones.
        await engine.settled()
        assert engine.probes == tuple(other)
        after = await events_of(engine, long)
        await replacing
        with pytest.raises(EngineUnavailableError, match="just been replaced"):
            await anext(stale)
        await engine.replace_probes(model.probes)
        return before, await running, after, await events_of(engine, long)

    before, running, after, again = loop.run(replace_and_ask())
    assert {v.probe for v in after[0].judgement.verdicts} == {"other"}
    require_equal(
        Judgement(after[0].judgement.verdicts), expected(replaced, [prompt])[0], ["other"]
    )
    assert {v.probe for v in running[0].judgement.verdicts} == set(names(model, "prompt"))
    assert values(again[0].judgement.verdicts).keys() == values(before[0].judgement.verdicts).keys()
    require_equal(
        Judgement(again[0].judgement.verdicts), expected(model, [prompt])[0], names(model, "prompt")
    )


def test_probes_that_cannot_be_served_leave_the_old_ones(engine, loop, model):
    broken = untrained_probe(model.backbone, "broken")
    broken.mechanism.bias.fill_(float("nan"))
    foreign = untrained_probe(tiny_backbone(), "foreign")

    async def try_both():
        with pytest.raises(SidelightError, match="broken"):
            await engine.replace_probes([broken])
        with pytest.raises(FingerprintMismatchError):
            await engine.replace_probes([foreign])
        return await events_of(engine, TEXTS[0])

    judged = loop.run(try_both())[0]
    assert {v.probe for v in judged.judgement.verdicts} == set(names(model, "prompt"))
    assert [probe.name for probe in engine.probes] == [probe.name for probe in model.probes]


def test_verdicts_of_probes_that_nobody_has_announced_are_no_verdicts(engine, loop, model):
    with saved(model.probes, [*reversed(model.probes)]) as (own, foreign):

        async def load_and_ask(folders):
            assert not any(await engine._llm.collective_rpc("sidelight_load", args=(folders,)))
            await engine._llm.reset_prefix_cache()
            return await events_of(engine, TEXTS[0])

        with pytest.raises(GenerationError, match="Other probes have judged"):
            loop.run(load_and_ask(foreign.folders))
        assert loop.run(load_and_ask(own.folders))[0].judgement.verdicts


def test_a_seeded_draw_is_refused_if_it_would_crash_vllm(engine, loop):
    with pytest.raises(SidelightError, match="seed"):
        loop.run(events_of(engine, "hi", Sampling(max_tokens=2, seed=1)))


def test_a_missing_verdict_is_an_error(engine, loop):
    """The tokens are not those that the request describes."""
    from sidelight.vllm.requests import sampling_params
    from sidelight.vllm.settings import judgement_of

    prompt = EncodedPrompt((5, 6, 7), (Part.PROMPT,) * 3)
    other = EncodedPrompt((5, 6, 8), (Part.PROMPT,) * 3)

    async def ask():
        params = sampling_params(Sampling(temperature=0), 1, other)
        outputs = engine.outputs(prompt, params, engine._exchange.identity)
        return [judgement_of(output.steps[-1].params) async for output in outputs]

    with pytest.raises(GenerationError, match="other tokens"):
        loop.run(ask())


def test_our_server_answers_over_vllm_and_a_killed_worker_is_an_error(model):
    """Over HTTP with the real client; then every process of vLLM's is killed."""
    from sidelight.engines.loading import LoadingEngine
    from sidelight.vllm.engine import load_vllm_engine

    engine = LoadingEngine(
        lambda: load_vllm_engine(model.path, model.probes, dtype="float32", options=OPTIONS)
    )
    with served(engine) as address, openai_client(address) as client:
        wait_until_ready(address)
        ask = {
            "model": model.path,
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 5,
            "temperature": 0,
        }
        answer = client.chat.completions.create(**ask)
        verdicts = answer.model_extra["sidelight"]["verdicts"]
        assert {v["probe"] for v in verdicts} == {probe.name for probe in model.probes}
        prompt = model.backbone.encoder.encode([Message("user", "hello")])
        wanted = expected(model, [prompt])[0]
        for verdict in verdicts:
            if verdict["probe"] in names(model, "prompt"):
                np.testing.assert_allclose(
                    list(verdict["probabilities"].values()),
                    wanted[verdict["probe"]],
                    rtol=0,
                    atol=ROUNDING,
                )
        moderated = client.moderations.create(input="hello", model=model.path)
        assert moderated.results[0].category_scores
        kill_workers()
        response = httpx.post(f"{address}/v1/chat/completions", json=ask, timeout=60)
        assert response.status_code in (500, 503)
        assert "error" in response.json()
        assert "verdicts" not in json.dumps(response.json())
        assert httpx.get(f"{address}/ready", timeout=10).status_code == 503


def wait_until_ready(address):
    for _ in range(1200):
        if httpx.get(f"{address}/ready", timeout=10).status_code == 200:
            return
        time.sleep(0.1)
    raise AssertionError("never ready")


def kill_workers():
    import psutil

    for child in psutil.Process().children(recursive=True):
        if "Worker" in " ".join(child.cmdline()) or "Worker" in child.name():
            os.kill(child.pid, signal.SIGKILL)
            return
    raise AssertionError("no worker found")
