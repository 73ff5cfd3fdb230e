"""A check stops after the deepest layer that a probe reads, and training chooses that layer."""

import asyncio
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import wordings
from sidelight.data.loading import load_examples
from sidelight.engines.base import PromptClassified, Sampling
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.errors import SidelightError
from sidelight.models.conversation import Message, Reads
from sidelight.probes.artifact import load_probe
from sidelight.probes.bank import Bank
from sidelight.probes.mechanisms.base import mechanism_spec
from sidelight.states.extraction import text_logits
from sidelight.training.background import Background
from sidelight.training.depth import candidate_depths, choose_depth
from sidelight.training.fit import fit
from sidelight.training.loop import train_mechanisms
from sidelight.training.preparing import prepare
from sidelight.training.selection import TextSelection
from sidelight.training.settings import FitOptions, suggested_settings
from worlds.data import planted_rows
from worlds.models import spans_probe, untrained_probe

TEXTS = ["short", "a text that is a good deal longer than the other", "x" * 60]
QUICK = suggested_settings("readout").changed(learning_rate=3e-2, epochs=2, batch_size=16)


def shallow(probe, layers):
    """The probe with zeros in place of all layers but the first."""
    return replace(probe, standardisation=probe.standardisation.limited(layers))


@pytest.fixture
def passes(tiny):
    """How often each block of the model has run since the last ``clear``."""
    counted = Counter()
    blocks = tiny.model.base_model.layers
    hooks = [
        block.register_forward_pre_hook(lambda *_, at=at: counted.update([at]))
        for at, block in enumerate(blocks, start=1)
    ]
    yield counted
    for hook in hooks:
        hook.remove()


def encoded(tiny, texts=TEXTS):
    return [tiny.encoder.encode([Message("user", text)]) for text in texts]


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("mechanism", ["readout", "gate"])
def test_classification_runs_only_blocks_that_deepest_probe_reads(tiny, passes, layers, mechanism):
    probes = [
        shallow(untrained_probe(tiny, "deep", mechanism=mechanism), layers),
        shallow(untrained_probe(tiny, "other"), 1),
    ]
    bank = Bank(probes)
    assert bank.tap().depth == layers
    prompts = encoded(tiny)
    outputs = text_logits(tiny, bank, prompts)
    assert set(passes) == {*range(1, layers)}
    # The same bits as from a complete pass.
    tap = bank.tap()
    for row, prompt in enumerate(prompts):
        with tiny.tapped(tap):
            tiny.run([prompt])
        full = bank.prompt_logits(tap.projected()[0], [bytes(prompt.token_roles)])
        for ours, complete in zip(outputs, full, strict=True):
            np.testing.assert_allclose(ours[row].logits, complete[0].logits, rtol=1e-4, atol=1e-4)
    assert set(passes) == {1, 2, 3}


def test_every_family_stops_after_requested_layers(family):
    prompts = [family.encoder.encode([Message("user", text)]) for text in TEXTS]

    def seen(layers, after=0):
        states = []
        with family.tapped(lambda layer, hidden: states.append((layer, hidden.clone()))):
            family.run(prompts, after=after, layers=layers)
        return states

    for after in (0, 1) if family.can_share_prefixes else (0,):
        full = seen(None, after)
        for layers in range(1, family.fingerprint.layers + 1):
            states = seen(layers, after)
            assert [layer for layer, _ in states] == [*range(layers)]
            for (_, each), (_, complete) in zip(states, full, strict=False):
                assert torch.equal(each, complete)
    # A pass after one that stopped is complete.
    assert len(seen(None)) == family.fingerprint.layers


@pytest.mark.parametrize("is_fitted", [False, True])
def test_missing_layer_prevents_verdict(tiny, is_fitted):
    probe = shallow(untrained_probe(tiny, "a"), 3)
    bank, prompt = Bank([probe]), encoded(tiny)[0]
    tap = bank.tap()
    with tiny.tapped(tap):
        tiny.run([prompt], layers=3 if is_fitted else 2)
    outputs = bank.prompt_logits(tap.projected()[0], [bytes(prompt.token_roles)])
    (verdicts,) = bank.classify(outputs, [prompt])
    assert (verdicts.failed == ("a",)) != is_fitted
    assert bool(verdicts.verdicts) == is_fitted


def asked(engine, conversations, *, writes):
    """What an engine says of conversations, and the events of writing after the first."""

    async def events():
        await engine.start()
        try:
            classified = await engine.classify(conversations)
            told = []
            if writes:
                stream = engine.generate(conversations[0], Sampling(max_tokens=4))
                told = [event async for event in stream]
            return classified, told
        finally:
            await engine.close()

    return asyncio.run(events())


def test_engine_stops_at_deepest_probe_unless_it_generates(tiny, passes):
    probes = [
        shallow(untrained_probe(tiny, "prompts"), 3),
        shallow(untrained_probe(tiny, "answers", reads=Reads("response")), 2),
        shallow(spans_probe(tiny, "spans"), 2),
    ]
    chat = [Message("user", "hello"), Message("assistant", "a reply")]
    conversations = [[Message("user", "hello")], chat]
    output, _ = asked(TransformersEngine(tiny, probes), conversations, writes=False)
    assert set(passes) == {1, 2}
    full = [*probes, untrained_probe(tiny, "all")]
    complete, events = asked(TransformersEngine(tiny, full), conversations, writes=True)
    assert set(passes) == {1, 2, 3}
    for ours, theirs in zip(output, complete, strict=True):
        assert not ours.verdicts.failed
        stored = theirs.verdicts.of({probe.name for probe in probes})
        for one, another in zip(ours.verdicts.verdicts, stored.verdicts, strict=True):
            assert one.probe == another.probe
            assert one.probabilities == pytest.approx(another.probabilities, abs=1e-4)
    passes.clear()
    _, events = asked(TransformersEngine(tiny, probes), conversations, writes=True)
    (verdict,) = [event for event in events if isinstance(event, PromptClassified)]
    assert not verdict.verdicts.failed
    # The pass that writes goes on to the last block.
    assert passes[3] == 4


def fitted(tiny, root, texts=None, *, settings=QUICK, **options):
    texts = planted_rows("binary", 60) if texts is None else texts
    options = FitOptions(
        mechanism=mechanism_spec("readout"),
        settings=settings,
        background=Background(),
        cache_root=root / "cache",
        **options,
    )
    return fit(tiny, load_examples(texts), None, name="a", options=options, out=root / "probe")


def test_candidate_depths_descend_from_deepest():
    for deepest in range(1, 100):
        depths = candidate_depths(deepest)
        assert depths[0] == deepest
        assert depths == sorted({*depths}, reverse=True)
        assert depths[-1] >= min(deepest, 2)
    assert candidate_depths(31) == [31, 26, 21, 16]


def test_training_reads_and_stores_only_probe_layers(tiny, tmp_path, passes):
    settings = replace(QUICK, layers=2)
    options = {"settings": settings}
    short = fitted(tiny, tmp_path / "short", **options)
    assert set(passes) == {1}
    # The states that trainings share have all layers.
    full = fitted(tiny, tmp_path / "whole", keep_cache=True, **options)
    assert set(passes) == {1, 2, 3}
    assert [result.probe.card.training.states.token_bytes for result in (short, full)] == [128, 256]
    np.testing.assert_allclose(short.losses, full.losses, rtol=1e-4, atol=1e-4)
    probe = load_probe(tmp_path / "short" / "probe")
    assert len(probe.standardisation.scale) == tiny.fingerprint.layers
    assert probe.projection().depth == 2
    pairs = zip(short.probe.projection().weight, full.probe.projection().weight, strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("states", ["disk", "stream"])
def test_compressed_states_cover_only_probe_layers(tiny, tmp_path, monkeypatch, states):
    monkeypatch.setattr("sidelight.training.keeping.directions_of_width", lambda width: width)
    result = [
        fitted(
            tiny,
            tmp_path / str(stored),
            settings=replace(QUICK, layers=2),
            states=stored,
        )
        for stored in (states, "whole")
    ]
    assert result[0].probe.card.training.states.form == "compressed"
    assert result[0].probe.card.training.states.token_bytes == 2 * (32 + 2)
    assert result[0].probe.projection().depth == 2
    assert np.corrcoef(*(each.losses for each in result))[0, 1] > 0.99


def test_excess_layers_are_refused_before_model_runs(tiny, tmp_path, passes):
    with pytest.raises(SidelightError, match=wordings.FEWER_LAYERS.format(most=4)):
        fitted(tiny, tmp_path, settings=replace(QUICK, layers=5))
    assert not passes


def test_smallest_lossless_depth_is_chosen(tiny, tmp_path):
    options = FitOptions(background=Background(), cache_root=tmp_path)
    readout = mechanism_spec("readout")
    candidates = [(readout, replace(QUICK, layers=layers)) for layers in (4, 3, 2)]
    dataset = prepare(
        tiny,
        load_examples(planted_rows("binary", 60)),
        None,
        options=options,
        candidates=candidates,
    )
    deep, middle, low = train_mechanisms(candidates, split=dataset.split, left_out=dataset.left_out)
    losses_of = partial(TextSelection().losses, dataset=dataset, options=options)
    good, bad = deep.logits, np.random.default_rng(0).normal(size=deep.logits.shape)
    for logits, chosen, tried in (
        ((good, good, good), 2, 3),
        ((good, good, bad), 3, 3),
        # The test of a lower depth counts once those above have passed.
        ((good, bad, good), 4, 2),
        ((bad, good, good), 2, 3),
    ):
        for run, each in zip((deep, middle, low), logits, strict=True):
            run.logits = each
        run, trials = choose_depth([low, deep, middle], losses_of)
        assert (run.depth, len(trials)) == (chosen, tried)
        assert [trial.layers for trial in trials] == [4, 3, 2][:tried]
        assert run.depth == [trial.layers for trial in trials if trial.is_accepted][-1]
    assert choose_depth([deep], losses_of) == (deep, ())


@pytest.mark.parametrize("of_spans", [False, True])
def test_trained_probe_reads_to_recorded_depth(tiny, tmp_path, of_spans):
    result = fitted(tiny, tmp_path, early_exit=True) if not of_spans else spanned(tiny, tmp_path)
    trials = load_probe(tmp_path / "probe").card.training.depths
    assert trials == result.probe.card.training.depths
    assert trials[0].layers == tiny.fingerprint.layers
    assert 2 <= len(trials) <= len(candidate_depths(tiny.fingerprint.layers))
    accepted = [trial.layers for trial in trials if trial.is_accepted]
    assert load_probe(tmp_path / "probe").projection().depth == accepted[-1]
    options = fitted(tiny, tmp_path / "given")
    assert options.probe.projection().depth == tiny.fingerprint.layers
    assert not options.probe.card.training.depths


def spanned(tiny, root):
    rows = [
        {"text": f"call {name} on day {day}", "spans": [{"start": 5, "end": 8, "label": "NAME"}]}
        for day in range(12)
        for name in ("Ann", "Bob", "Eva", "Max")
    ]
    rows += [{"text": f"nothing on day {day}", "spans": []} for day in range(12)]
    settings = suggested_settings("spans").changed(epochs=3, batch_size=8)
    options = FitOptions(
        settings=settings, background=Background(), cache_root=root / "cache", early_exit=True
    )
    examples = load_examples(rows, spans="spans")
    return fit(tiny, examples, None, name="a", options=options, out=root / "probe")
