"""Tokens to text: drawing, whole characters, and stop strings."""

import asyncio
import threading
import time
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import wordings
from sidelight.engines.base import EngineUnavailableError, Sampling
from sidelight.engines.text import Detokenizer, Sampler, StopGate, TextCodec
from sidelight.errors import ContextLengthError
from sidelight.models.conversation import PlainText
from sidelight.models.encode import PromptEncoder
from worlds.models import tiny_tokenizer
from worlds.servers import run_engine

BYTES = st.binary(max_size=40) | st.text(max_size=20).map(str.encode)
SHORT_TEXT = st.text(alphabet="ab\u00e9", max_size=30)
STOPS = st.lists(st.text(alphabet="ab\u00e9", min_size=1, max_size=4), max_size=3)


def decode_bytes(tokens):
    return bytes(tokens).decode("utf-8", errors="replace")


@given(BYTES)
def test_deltas_concatenate_to_text_without_partial_characters(data):
    detokenizer, text = Detokenizer(decode_bytes), ""
    for count, token in enumerate(data, 1):
        text += detokenizer.push(token)
        assert decode_bytes(data[:count]).startswith(text)
        if decode_bytes(data[:count])[-1] != "\ufffd":
            assert text == decode_bytes(data[:count])


@pytest.mark.slow
@given(st.lists(SHORT_TEXT, max_size=8), STOPS)
def test_text_ends_before_stop_string_regardless_of_chunking(chunks, stops):
    text = "".join(chunks)
    cuts = [text.find(stop) for stop in stops if stop in text]
    written = []
    for split_chunks in (chunks, list(text), [text]):
        gate = StopGate(stops)
        written.append("".join(gate.push(chunk) for chunk in split_chunks) + gate.flush())
        assert gate.is_closed == bool(cuts)
    sent = written[0]
    assert not any(stop in sent for stop in stops)
    assert text.startswith(sent)
    assert cuts or sent == text
    assert written == [sent] * 3


def test_stop_string_prefix_is_not_sent():
    gate = StopGate(["###"])
    assert [gate.push(c) for c in "a##b###c"] == ["a", "", "", "##b", "", "", "", ""]


def test_long_stop_strings_are_matched_quickly():
    """The passes of all clients wait for it."""
    gate, start = StopGate(["x" * 100_000] * 16), time.process_time()
    assert "".join(gate.push(" word") for _ in range(300)) == " word" * 300
    assert time.process_time() - start < 1


def test_zero_temperature_is_greedy_and_seeded_draws_repeat():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert int(Sampler(Sampling(temperature=0.0))(logits)) == logits.argmax()
    samplers = [Sampler(Sampling(seed=7)) for _ in range(2)]
    draws = [[int(sampler(logits)) for _ in range(20)] for sampler in samplers]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 1


@pytest.mark.slow
def test_samples_follow_softmax_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, float("-inf")])
    sampler = Sampler(Sampling(temperature=0.7, seed=1))
    draws = torch.tensor([int(sampler(logits)) for _ in range(4000)])
    shares = torch.bincount(draws, minlength=4) / len(draws)
    # Three standard errors of a share of 4,000 draws.
    torch.testing.assert_close(shares, torch.softmax(logits / 0.7, -1), atol=0.024, rtol=0)


def test_top_p_excludes_tail_tokens():
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    sampler = Sampler(Sampling(top_p=0.6, seed=0))
    assert {int(sampler(logits)) for _ in range(200)} == {0, 1}


def test_closed_engine_leaves_no_threads_and_refuses_texts(tiny):
    before, text = {*threading.enumerate()}, PlainText("x")

    async def encode(engine):
        assert await engine.tokenize(text)
        return engine

    engine = run_engine(tiny, encode)
    left = {*threading.enumerate()} - before
    assert not [thread.name for thread in left if thread.name.startswith("sidelight-")]
    with pytest.raises(EngineUnavailableError):
        asyncio.run(engine.tokenize(text))


def test_one_token_limit_error_uses_singular():
    encoder = PromptEncoder(tiny_tokenizer(), prompt_format="raw", max_tokens=1)
    with pytest.raises(ContextLengthError, match=wordings.AT_MOST_TOKENS.format(tokens="1 token")):
        encoder.encode(PlainText("one two three"))


def test_short_texts_do_not_wait_for_long_or_cancelled_ones():
    tokenizer = tiny_tokenizer()
    encoder = PromptEncoder(tokenizer, prompt_format="chat", max_tokens=10_000)
    codec = TextCodec(encoder)
    long, short = [PlainText("x" * 20_000)], [PlainText("x")]
    may_end, encoded = threading.Event(), []

    def encode(name):
        encoded.append(name)
        assert name != "long" or may_end.wait(60)

    async def main():
        first = asyncio.create_task(codec.in_thread(long, partial(encode, "long")))
        abandoned = asyncio.create_task(codec.in_thread(long, partial(encode, "given up")))
        await codec.in_thread(short, partial(encode, "short"))
        abandoned.cancel()
        await asyncio.wait({abandoned})
        may_end.set()
        await first
        with pytest.raises(ContextLengthError, match=wordings.TOO_MANY_CHARACTERS):
            await codec.in_thread([PlainText("x" * 200_000)], partial(encode, "too long"))

    asyncio.run(main())
    assert sorted(encoded) == ["long", "short"]
