"""Tokens to text: drawing, whole characters, stop strings, and what is reported of each token."""

import asyncio
import threading
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

from engine_runs import events_of, run
from sidelight.engines.base import Finished, Sampling, Spelling, TextDelta, TokenLogprobs
from sidelight.engines.text import (
    LOWEST,
    UNFINISHED,
    Detokenizer,
    Sampler,
    Speller,
    StopGate,
    TextCodec,
    likeliest_tokens,
)
from sidelight.errors import ContextLengthError
from sidelight.prompts import PlainText, PromptEncoder
from tiny import SIZES, tiny_backbone, tiny_tokenizer

BYTES = st.binary(max_size=40)
SHORT_TEXT = st.text(alphabet="ab\u00e9", max_size=30)
STOPS = st.lists(st.text(alphabet="ab\u00e9", min_size=1, max_size=4), max_size=3)
# This seed writes to the end, with parts of characters, one of them at the end.
SAMPLING = {"max_tokens": 40, "temperature": 1.0, "seed": 0, "logprobs": 2}


def decode_bytes(tokens):
    return bytes(tokens).decode("utf-8", errors="replace")


@given(st.text(max_size=20))
def test_deltas_add_up_to_the_text(text):
    detokenizer = Detokenizer(decode_bytes)
    deltas = [detokenizer.push(token) for token in text.encode()]
    whole = text.rstrip("\ufffd")
    assert "".join(deltas) == whole


@given(BYTES)
def test_deltas_never_hold_half_a_character(data):
    detokenizer = Detokenizer(decode_bytes)
    sent = "".join(detokenizer.push(token) for token in data)
    assert decode_bytes(data).startswith(sent)


def test_a_character_of_four_tokens_comes_with_its_last():
    detokenizer = Detokenizer(decode_bytes)
    deltas = [detokenizer.push(token) for token in "a\U0001f600".encode()]
    assert deltas == ["a", "", "", "", "\U0001f600"]


@pytest.mark.slow
@given(st.lists(SHORT_TEXT, max_size=8), STOPS)
def test_text_ends_before_a_stop_string(pieces, stops):
    gate = StopGate(stops)
    sent = "".join(gate.push(piece) for piece in pieces)
    sent += gate.flush()
    text = "".join(pieces)
    cuts = [text.find(stop) for stop in stops if stop in text]
    assert gate.is_closed == bool(cuts)
    assert not any(stop in sent for stop in stops)
    assert text.startswith(sent)
    assert cuts or sent == text


@pytest.mark.slow
@given(SHORT_TEXT, STOPS)
def test_the_cut_does_not_depend_on_the_pieces(text, stops):
    at_once, by_character = StopGate(stops), StopGate(stops)
    whole = at_once.push(text) + at_once.flush()
    pieces: list[str] = []
    for character in text:
        if not by_character.is_closed:
            pieces.append(by_character.push(character))
    assert whole == "".join(pieces) + by_character.flush()


def test_the_beginning_of_a_stop_string_is_held_back():
    gate = StopGate(["###"])
    assert [gate.push(c) for c in "a##b###c"] == ["a", "", "", "##b", "", "", "", ""]


def test_no_temperature_takes_the_most_probable_token():
    logits = torch.tensor([0.1, 2.0, -1.0])
    assert int(Sampler(Sampling(temperature=0.0))(logits)) == 1


def test_a_seed_draws_the_same_tokens():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    draws = [
        [int(sampler(logits)) for _ in range(20)]
        for sampler in (Sampler(Sampling(seed=7)), Sampler(Sampling(seed=7)))
    ]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 1


@pytest.mark.slow
def test_draws_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, float("-inf")])
    sampler = Sampler(Sampling(temperature=0.7, seed=1))
    draws = torch.tensor([int(sampler(logits)) for _ in range(4000)])
    shares = torch.bincount(draws, minlength=4) / len(draws)
    # Three standard errors of a share of 4,000 draws.
    torch.testing.assert_close(shares, torch.softmax(logits / 0.7, -1), atol=0.024, rtol=0)


def test_top_p_leaves_the_tail_out():
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    sampler = Sampler(Sampling(top_p=0.6, seed=0))
    assert {int(sampler(logits)) for _ in range(200)} == {0, 1}


@pytest.fixture(scope="module")
def backbone():
    """Every id of this model is a token of its tokenizer's."""
    return tiny_backbone(LlamaConfig(**{**SIZES, "vocab_size": len(tiny_tokenizer())}))


def write(backbone, **options) -> tuple[str, list[TokenLogprobs], Finished]:
    """The text, what was told of its tokens, and the last event."""

    sampling = Sampling(**{**SAMPLING, **options})
    events = run(backbone, lambda engine: events_of(engine, "hi", sampling))
    deltas = [event for event in events if isinstance(event, TextDelta)]
    finished = events[-1]
    told = [token for event in (*deltas, finished) for token in event.logprobs]
    return "".join(delta.text for delta in deltas), told, finished


def joined(tokens) -> bytes:
    return b"".join(token.drawn.spelling.bytes or b"" for token in tokens)


@pytest.mark.slow
def test_the_bytes_of_all_tokens_are_the_text(backbone):
    text, told, finished = write(backbone)
    assert len(told) == finished.completion_tokens == SAMPLING["max_tokens"]
    assert joined(told).decode(errors="replace").startswith(text)
    assert len(finished.logprobs) == 1
    assert joined(told[:-1]).decode(errors="replace") == text
    assert any(token.drawn.spelling.is_partial for token in told)


@pytest.mark.slow
def test_nothing_is_told_that_was_not_asked_for(backbone):
    assert write(backbone, logprobs=None)[1] == []
    assert [token.likeliest for token in write(backbone, logprobs=0)[1]] == [()] * 40


@pytest.mark.slow
def test_nothing_is_told_of_a_stop_string(backbone):
    """Whichever part of the text stops it, what is told is what is sent."""
    whole, _, _ = write(backbone)
    cut = 0
    for start in range(len(whole) - 3):
        if whole[start] == UNFINISHED:
            # Bytes that are no character: nobody can say which of them a stop string begins with.
            continue
        text, told, finished = write(backbone, stop=(whole[start : start + 3],))
        assert joined(told).decode(errors="replace") == text
        assert finished.logprobs == ()
        cut += finished.reason == "stop" and len(told) < finished.completion_tokens
    assert cut > 5


@pytest.mark.slow
def test_an_end_of_turn_is_not_told(backbone):
    """The end-of-turn token is written as soon as it may be."""
    for seed in range(40):
        text, told, finished = write(backbone, seed=seed, max_tokens=120, temperature=2.0)
        if finished.reason == "stop":
            break
    assert finished.reason == "stop"
    assert len(told) == finished.completion_tokens - 1
    assert joined(told).decode(errors="replace").startswith(text)


@pytest.mark.slow
def test_offsets_count_the_characters_before_a_token(backbone):
    text, told, _ = write(backbone)
    for token in told:
        spelling = token.drawn.spelling
        end = token.offset + len(spelling.text)
        is_text = spelling.bytes is not None and not spelling.is_partial
        assert not is_text or text[token.offset : end] == spelling.text


def test_odds_are_those_of_the_whole_distribution():
    logits = torch.tensor([0.0, 2.0, -torch.inf, 1.0])
    wanted = torch.log_softmax(logits, dim=0)
    drawn, likeliest = likeliest_tokens(logits, 2, count=9)
    assert drawn == (2, LOWEST)
    assert [token for token, _ in likeliest] == [1, 3, 0, 2]
    assert [p for _, p in likeliest[:3]] == pytest.approx(wanted[[1, 3, 0]].tolist())


def test_byte_letters_are_spelled_as_their_bytes():
    tokenizer = tiny_tokenizer()
    spell = Speller(tokenizer)
    for byte, text in ((0x20, " "), (0xE2, r"\xe2"), (0x0A, "\n"), (0xAD, r"\xad")):
        # A byte of its own, or one that only stands in a longer character.
        of_text = tokenizer.encode(chr(byte))
        tokens = [t for t in (*of_text, *range(len(tokenizer))) if spell(t).bytes == bytes([byte])]
        assert {spell(token).text for token in tokens} == {text}
    assert spell(tokenizer.convert_tokens_to_ids("<|end|>")) == Spelling("<|end|>", None)
    assert spell(len(tokenizer) + 5).bytes is None


def test_pieces_keep_their_space_and_byte_pieces_are_bytes():
    """As in SentencePiece vocabularies, whose decoder drops the first space."""
    pieces = {"<unk>": 0, "\u2581cat": 1, "s": 2, "<0xF0>": 3, "<0x9F>": 4, "<0x41>": 5}
    tokenizer = Tokenizer(models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    spell = Speller(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert [spell(token) for token in (1, 2, 3, 4, 5)] == [
        Spelling(" cat", b" cat"),
        Spelling("s", b"s"),
        Spelling(r"\xf0", b"\xf0"),
        Spelling(r"\x9f", b"\x9f"),
        Spelling("A", b"A"),
    ]


def test_short_texts_do_not_wait_for_long_ones_nor_anybody_for_what_is_given_up():
    tokenizer = tiny_tokenizer()
    encoder = PromptEncoder(tokenizer, prompt_format="chat", max_tokens=10_000)
    codec = TextCodec(encoder, tokenizer, max_tokens=10_000)
    long, short = [PlainText("x" * 20_000)], [PlainText("x")]
    may_end, encoded = threading.Event(), []

    def encode(name):
        encoded.append(name)
        assert name != "long" or may_end.wait(60)

    async def main():
        first = asyncio.create_task(codec.in_thread(long, partial(encode, "long")))
        given_up = asyncio.create_task(codec.in_thread(long, partial(encode, "given up")))
        await codec.in_thread(short, partial(encode, "short"))
        given_up.cancel()
        await asyncio.wait({given_up})
        may_end.set()
        await first
        with pytest.raises(ContextLengthError, match="characters"):
            await codec.in_thread([PlainText("x" * 200_000)], partial(encode, "too long"))

    asyncio.run(main())
    assert sorted(encoded) == ["long", "short"]
