"""While a text is written, watched probes say after each token what they would say of it so far."""

import asyncio

import pytest
import torch

from sidelight.engines.base import Finished, PromptJudged, ResponseScored, Sampling, TextDelta
from sidelight.errors import SidelightError
from sidelight.prompts import EncodedPrompt, Message, Part, Reads
from test_engine_decoding import GREEDY, ask, reference, run
from test_engine_verdicts import ROUNDING, expected, probabilities
from tiny import tiny_backbone, untrained_probe

TEXTS = ["hello", "a longer text than the other ones", "word " * 6]


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


async def events_of(engine, text, sampling=GREEDY, watch=("late",)):
    conversation = [Message("user", text)]
    return [event async for event in engine.generate(conversation, sampling, watch=watch)]


def written(backbone, text, sampling=GREEDY):
    """The prompt, and the tokens that follow it when the model alone writes."""
    prompt = backbone.encoder.encode([Message("user", text)])
    ids = torch.tensor([prompt.token_ids])
    tokens = backbone.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=sampling.max_tokens,
        pad_token_id=0,
    )[0, len(prompt) :]
    return prompt, [token for token in tokens.tolist() if token != 1]


def followed(prompt, tokens):
    parts = prompt.parts + (Part.RESPONSE,) * len(tokens)
    return EncodedPrompt((*prompt.token_ids, *tokens), parts)


@pytest.mark.parametrize("side", ["response", "both"])
@pytest.mark.parametrize("mechanism", ["readout", "gate", "attention", "blend"])
def test_a_running_verdict_is_that_of_the_text_so_far(backbone, side, mechanism):
    probe = untrained_probe(backbone, "late", reads=Reads(side), mechanism=mechanism)

    async def ask_all(engine):
        return await asyncio.gather(*(events_of(engine, text) for text in TEXTS))

    for text, events in zip(TEXTS, run(backbone, ask_all, probes=[probe]), strict=True):
        prompt, tokens = written(backbone, text)
        scores = [event for event in events if isinstance(event, ResponseScored)]
        assert [score.tokens for score in scores] == list(range(1, len(tokens) + 1))
        for score in scores:
            read = followed(prompt, tokens[: score.tokens])
            assert probabilities(score.verdicts) == pytest.approx(
                expected(backbone, probe, read), abs=ROUNDING
            )
        assert events[-1].verdicts == scores[-1].verdicts


def test_watching_changes_no_text_and_costs_the_reading_of_the_last_token(backbone):
    late = untrained_probe(backbone, "late", reads=Reads("response"))
    passes: list[int] = []
    hook = backbone.model.register_forward_pre_hook(lambda *_: passes.append(1))
    watched = run(backbone, lambda engine: events_of(engine, "hello"), probes=[late])
    watched_passes = len(passes)
    plain = run(backbone, lambda engine: ask(engine, "hello"), probes=[late])
    hook.remove()
    text = "".join(event.text for event in watched if isinstance(event, TextDelta))
    assert text == plain.text == reference(backbone, "hello")[0]
    assert (watched_passes, len(passes) - watched_passes) == (17, 16)


def test_a_text_says_how_many_tokens_it_comes_from(backbone):
    late = untrained_probe(backbone, "late", reads=Reads("response"))
    events = run(backbone, lambda engine: events_of(engine, "hello"), probes=[late])
    _, tokens = written(backbone, "hello")
    shown = ""
    for event in events:
        if isinstance(event, TextDelta):
            shown += event.text
            whole = backbone.tokenizer.decode(tokens[: event.tokens], skip_special_tokens=True)
            assert shown == whole.rstrip("\ufffd")
    assert events[0].tokens == len(written(backbone, "hello")[0])


@pytest.mark.parametrize("stop", [(), ("the",)])
@pytest.mark.parametrize("max_tokens", [1, 2, 30])
def test_every_token_of_a_watched_text_is_read(backbone, max_tokens, stop):
    late = untrained_probe(backbone, "late", reads=Reads("response"))
    first = run(backbone, lambda engine: ask(engine, "x", Sampling(max_tokens=30, temperature=0.0)))
    stop = (first.text[7:9],) if stop else ()
    sampling = Sampling(max_tokens=max_tokens, temperature=0.0, stop=stop)
    events = run(backbone, lambda engine: events_of(engine, "x", sampling), probes=[late])
    scores = [event.tokens for event in events if isinstance(event, ResponseScored)]
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert scores == list(range(1, finished.completion_tokens + 1))


def test_nothing_is_scored_that_nobody_watches(backbone):
    probes = [untrained_probe(backbone, n, reads=Reads("response")) for n in ("late", "other")]

    async def both(engine):
        return await asyncio.gather(
            events_of(engine, "a", watch=()), events_of(engine, "a", watch=("other",))
        )

    plain, watched = run(backbone, both, probes=probes)
    assert not any(isinstance(event, ResponseScored) for event in plain)
    scores = [event for event in watched if isinstance(event, ResponseScored)]
    assert {verdict.probe for score in scores for verdict in score.verdicts} == {"other"}
    assert [v.probe for v in watched[-1].verdicts] == ["late", "other"]


def test_a_probe_that_overflows_is_told_at_each_token(backbone):
    broken = untrained_probe(backbone, "late", reads=Reads("response"))
    broken.mechanism.bias.fill_(float("nan"))
    events = run(backbone, lambda engine: events_of(engine, "hi"), probes=[broken])
    scores = [event for event in events if isinstance(event, ResponseScored)]
    assert scores
    assert all(score.failed == ("late",) and not score.verdicts for score in scores)


@pytest.mark.parametrize("name", ["early", "nobody"])
def test_what_cannot_be_watched_is_refused(backbone, name):
    probes = [
        untrained_probe(backbone, "early"),
        untrained_probe(backbone, "late", reads=Reads("response")),
    ]
    with pytest.raises(SidelightError, match="Known: late"):
        run(backbone, lambda engine: events_of(engine, "hi", watch=(name,)), probes=probes)


def test_a_prompt_is_judged_before_anything_is_scored(backbone):
    late = untrained_probe(backbone, "late", reads=Reads("response"))
    events = run(backbone, lambda engine: events_of(engine, "hi"), probes=[late])
    assert isinstance(events[0], PromptJudged)
    assert isinstance(events[1], TextDelta | ResponseScored)
