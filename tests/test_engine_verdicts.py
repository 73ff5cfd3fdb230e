"""While it writes, every request has the verdicts of its own tokens, from the pass that serves it.

Never another's verdict, and never a guess. Watched probes say after each token of the response what
they would say of it so far. What holds for judging alone is in ``engine_contract.py``.
"""

import asyncio
import gc

import numpy as np
import pytest
import torch

from sidelight.engines.base import Finished, PromptClassified, ResponseScored, Sampling, TextDelta
from sidelight.engines.parity import compare_engines
from sidelight.engines.queue import Limits
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.errors import SidelightError
from sidelight.models.conversation import Message, Reads
from sidelight.probes.bank import Bank
from worlds.models import score, three_probes, tiny_backbone, untrained_probe
from worlds.servers import (
    ask,
    count_passes,
    events_of,
    reference,
    require_alike,
    run_engine,
    written_singly,
)
from worlds.vllm import followed

MONITORED_TEXTS = ["hello", "a longer text than the other ones", "word " * 6]
TEXT = "a prompt of some length, to be told from anything else by its shape"
WIDTH = 32
RESPONSE_PROBES = ("late",)
LONG = Sampling(temperature=0.0, max_tokens=60)


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


def of_one_pass(backbone, probe, prompt):
    """The probe's verdict by one plain pass over the tokens."""
    (logits,) = score(backbone, Bank([probe]), [prompt])
    return [probe.verdict(logits[0])]


def response_probe(backbone, name="late", side="response", **options):
    return untrained_probe(backbone, name, reads=Reads(side), **options)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["response", "both"])
@pytest.mark.parametrize("mechanism", ["readout", "gate", "attention"])
def test_running_verdicts_match_text_so_far(backbone, side, mechanism):
    probe = response_probe(backbone, side=side, mechanism=mechanism)

    async def ask_all(engine):
        monitored = asyncio.gather(
            *(events_of(engine, t, monitored=RESPONSE_PROBES) for t in MONITORED_TEXTS)
        )
        return await monitored, await ask(engine, MONITORED_TEXTS[0])

    # Also of prompts that are read in parts.
    limits = Limits(prefill_tokens=7) if side == "both" else None
    monitored, plain = run_engine(backbone, ask_all, probes=[probe], limits=limits)
    for text, events in zip(MONITORED_TEXTS, monitored, strict=True):
        prompt, written = written_singly(backbone, text)
        tokens = [token for token in written if token != 1]
        scores = [event for event in events if isinstance(event, ResponseScored)]
        assert events[0].verdicts.verdicts == ()
        assert [score.tokens for score in scores] == list(range(1, len(tokens) + 1))
        for event in scores:
            read = followed(prompt, tokens[: event.tokens])
            require_alike(event.verdicts.verdicts, of_one_pass(backbone, probe, read))
        assert events[-1].verdicts.verdicts == scores[-1].verdicts.verdicts
    # A probe that is not monitored reads all but the last token.
    prompt, written = written_singly(backbone, MONITORED_TEXTS[0])
    read = followed(prompt, written[:-1])
    require_alike(plain.finished.verdicts.verdicts, of_one_pass(backbone, probe, read))


def test_monitoring_leaves_text_unchanged_and_costs_one_extra_pass(backbone):
    passes = count_passes(backbone)
    both = [response_probe(backbone), response_probe(backbone, "other")]

    async def ask_all(engine):
        before = len(passes)
        monitored = await events_of(engine, "hello", monitored=RESPONSE_PROBES)
        between = len(passes)
        unwatched = await events_of(engine, "hello", monitored=())
        return monitored, unwatched, (between - before, len(passes) - between)

    monitored, unwatched, counts = run_engine(backbone, ask_all, probes=both)
    assert counts == (17, 16)
    texts = [
        "".join(e.text for e in events if isinstance(e, TextDelta))
        for events in (monitored, unwatched)
    ]
    assert texts == [reference(backbone, "hello")[0]] * 2
    # Nothing is scored that is not monitored.
    assert isinstance(monitored[0], PromptClassified)
    assert not any(isinstance(event, ResponseScored) for event in unwatched)
    scores = [event for event in monitored if isinstance(event, ResponseScored)]
    assert {v.probe for score in scores for v in score.verdicts.verdicts} == {"late"}
    assert [v.probe for v in monitored[-1].verdicts.verdicts] == ["late", "other"]
    # A text says how many tokens it comes from.
    _, written = written_singly(backbone, "hello")
    sent_text = ""
    for event in monitored:
        if isinstance(event, TextDelta):
            sent_text += event.text
            decoded = backbone.tokenizer.decode(written[: event.tokens], skip_special_tokens=True)
            assert sent_text == decoded.rstrip("\ufffd")


@pytest.mark.parametrize(("max_tokens", "has_stop"), [(1, False), (2, False), (30, True)])
def test_every_token_of_monitored_text_is_scored(backbone, max_tokens, has_stop):
    async def ask_twice(engine):
        first = await ask(engine, "x", Sampling(max_tokens=30, temperature=0.0))
        stop = (first.text[7:9],) if has_stop else ()
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0, stop=stop)
        return await events_of(engine, "x", sampling, monitored=RESPONSE_PROBES)

    events = run_engine(backbone, ask_twice, probes=[response_probe(backbone)])
    scores = [event.tokens for event in events if isinstance(event, ResponseScored)]
    assert isinstance(events[-1], Finished)
    assert scores == list(range(1, events[-1].completion_tokens + 1))


@pytest.mark.parametrize("name", ["early", "nobody"])
def test_only_response_probes_can_be_monitored(backbone, name):
    probes = [untrained_probe(backbone, "early"), response_probe(backbone)]
    with pytest.raises(SidelightError, match="Known: late"):
        run_engine(
            backbone, lambda engine: events_of(engine, "hi", monitored=(name,)), probes=probes
        )


@pytest.mark.slow
def test_running_completions_are_unaffected_by_probe_replacement(backbone):
    """Also if its first step comes after they were replaced."""

    async def replace_meanwhile(engine):
        before = [asyncio.create_task(ask(engine, f"before {i}", LONG)) for i in range(2)]
        while engine.load.running < 2:
            await asyncio.sleep(0)
        called = engine.generate([Message("user", "x")], LONG)
        await engine.replace_probes([response_probe(backbone, "new", "both")])
        after = asyncio.create_task(ask(engine, "after", LONG))
        ends = [(await task).finished for task in (*before, after)]
        return [*ends, [event async for event in called][-1]]

    old = response_probe(backbone, "old", "both")
    ends = run_engine(backbone, replace_meanwhile, probes=[old])
    names = [[verdict.probe for verdict in end.verdicts.verdicts] for end in ends]
    assert names == [["old"], ["old"], ["new"], ["old"]]
    prompt, written = written_singly(backbone, "before 0", max_tokens=60)
    read = followed(prompt, written[:-1])
    require_alike(ends[0].verdicts.verdicts, of_one_pass(backbone, old, read))


def test_probes_retain_no_hidden_states():
    backbone = tiny_backbone()
    alive: list[int] = []
    for module in (*backbone.model.model.layers, backbone.model):
        module.register_forward_hook(lambda *_: alive.append(len(wide_tensors())))
    once, found = Sampling(temperature=0.0, max_tokens=1), []
    both = response_probe(backbone, side="both", mechanism="attention")
    gc.collect()
    before = len(wide_tensors())
    for probes in ([], [*three_probes(backbone), both]):
        alive.clear()
        run_engine(backbone, lambda engine: ask(engine, TEXT, once), probes=probes)
        found.append([*alive])
    # Proves that the audit sees hidden states: each layer's input and output at least.
    assert min(found[0][:-1]) >= before + 2
    assert found[0] == found[1]
    assert found[0][-1] == before


def wide_tensors():
    """Live tensors, weights aside, with the width of a hidden state for every token."""
    # By type: isinstance would wake lazy objects of other libraries.
    tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor]
    return [t for t in tensors if t.shape[-1:] == (WIDTH,) and t.numel() >= len(TEXT) * WIDTH]


def test_flips_are_counted_at_probe_threshold(tiny):
    """Two engines whose probes differ in their threshold alone."""
    texts = [[Message("user", f"text {number}")] for number in range(6)]
    probe = untrained_probe(tiny, "toxicity", threshold=0.0)
    strict = probe.changed(thresholds=(1.0,))
    engines = {
        name: lambda one=one: TransformersEngine(tiny, [one])
        for name, one in (("lax", probe), ("strict", strict))
    }
    found = compare_engines(engines, texts, batch_sizes=(1,))[0]
    assert (found.flips, found.texts) == (6, 6)
    assert np.isclose(found.largest, 0)
