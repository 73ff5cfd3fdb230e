"""Laws of the bank: every probe gets its own verdict, and many cost as many matmuls as one."""

import time
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import wordings
from sidelight.errors import SidelightError, VerdictError
from sidelight.models.conversation import (
    EncodedPrompt,
    Message,
    Reads,
    Segment,
    TokenRole,
    lengths_of_turns,
    split_segments,
)
from sidelight.probes.bank import NUMBERS_AT_ONCE, Bank, BankState, ProbeBanks
from sidelight.probes.mechanisms.base import mechanism_names
from sidelight.probes.probe import ProbeOutput
from sidelight.probes.standardisation import Standardisation
from sidelight.types import Verdicts
from test_mechanisms import VARIANTS
from worlds.models import INTENT, TOPICS, TOXICITY, score, untrained_probe

# float32: matmuls of another width add the same products in another order.
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}
TEXTS = ["hello", "a longer text than the first, by far", "!", "one more"]
MATMULS = {"aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm"}


def read_masks(prompts, reads):
    """For each way of reading, the tokens that count in a right-padded batch."""
    return {
        way: pad_sequence([prompt.mask(way) for prompt in prompts], batch_first=True)
        for way in reads
    }


def padded_roles(prompts):
    """The part of each token of a right-padded batch; padding is never read."""
    return pad_sequence(
        [torch.tensor(prompt.token_roles, dtype=torch.uint8) for prompt in prompts], True
    )


def projected(backbone, tap, prompts):
    with backbone.tapped(tap):
        backbone.run(prompts)
    return tap.projected()


@pytest.fixture(scope="module")
def prompts(tiny):
    encode = tiny.encoder.encode
    return [encode([Message("user", text)], text + " an answer") for text in TEXTS]


@pytest.fixture(scope="module")
def probes(tiny):
    """All mechanisms, kinds of task, ways of reading and standardisations."""
    shape, tasks = (tiny.fingerprint.layers, tiny.fingerprint.width), [TOXICITY, INTENT, TOPICS]
    ways = enumerate([Reads(), Reads("response"), Reads("both"), Reads(template=False)])
    probes = []
    for (i, reads), mechanism in product(ways, mechanism_names()):
        options = {"task": tasks[i % 3], "reads": reads, "mechanism": mechanism}
        probe = untrained_probe(tiny, f"{mechanism}-{i}", **options)
        scaling = Standardisation(0.7 * torch.randn(shape), 0.5 + torch.rand(shape), i % 2 == 1)
        probes.append(replace(probe, standardisation=scaling))
    return probes


def summarised(backbone, bank, prompts):
    projections = projected(backbone, bank.tap(), prompts)
    return summarise(bank, projections, padded_roles(prompts))


def summarise(bank, projections, token_roles):
    """The state of each text of a padded batch."""
    return bank.summarise(projections.flatten(0, 1), [bytes(row) for row in token_roles.numpy()])


@pytest.mark.slow
def test_bank_logits_match_dense_form_for_any_chunking(tiny, probes, prompts):
    bank = Bank(probes)
    projections = projected(tiny, bank.tap(), prompts)
    masks, token_roles = read_masks(prompts, bank.reads), padded_roles(prompts)
    state = summarise(bank, projections, token_roles)
    full = bank.logits(state)
    text_verdicts = bank.classify(bank.text_logits(state), prompts)
    edges = [0, 9, 10, 40, projections.shape[1]]
    chunks = [summarise(bank, projections[:, a:b], token_roles[:, a:b]) for a, b in pairwise(edges)]
    merged = bank.merge(bank.merge(chunks[0], chunks[1]), bank.merge(chunks[2], chunks[3]))
    backwards = bank.logits(BankState.pack(merged.split()[::-1]))
    one_at_a_time = [score(tiny, bank, [prompt]) for prompt in prompts]
    layers = []
    with tiny.tapped(lambda layer, hidden: layers.append(hidden.clone())):
        tiny.run(prompts)
    states = torch.stack(layers, 1)
    for i, probe in enumerate(probes):
        scaling, inputs = probe.standardisation, states
        if scaling.is_normalised:
            inputs = states / states.square().mean(-1, keepdim=True).sqrt()
        inputs = (inputs - scaling.mean[:, None]) / scaling.scale[:, None]
        expected = probe.mechanism(inputs, masks[probe.reads])
        assert expected.shape == (len(prompts), probe.task.outputs)
        one_by_one = np.concatenate([each[i] for each in one_at_a_time])
        (by_itself,) = score(tiny, Bank([probe]), prompts)
        for actual in (full[i], backwards[i][::-1], one_by_one, by_itself):
            np.testing.assert_allclose(actual, expected, **ROUNDING, err_msg=probe.name)
        for verdicts, row in zip(text_verdicts, full[i], strict=True):
            assert verdicts.verdicts[i] == probe.verdict(row)
            assert (verdicts.verdicts[i].probe, verdicts.failed) == (probe.name, ())


@pytest.mark.parametrize("at_once", [NUMBERS_AT_ONCE, 1])
def test_probes_with_same_summary_kind_are_batched(tiny, prompts, monkeypatch, at_once):
    """In any order and in parts that fit a cache, and each gets its own logits."""
    monkeypatch.setattr("sidelight.probes.bank.NUMBERS_AT_ONCE", at_once)
    mixed = [
        untrained_probe(tiny, f"{mechanism}-{i}", mechanism=mechanism)
        for i, mechanism in product(range(6), ("readout", "gate"))
    ]
    bank = Bank(mixed)
    state = summarised(tiny, bank, prompts)
    assert len(state.states) == 2
    for probe, logits in zip(mixed, bank.logits(state), strict=True):
        single = score(tiny, Bank([probe]), prompts)[0]
        np.testing.assert_allclose(logits, single, **ROUNDING, err_msg=probe.name)


@pytest.mark.parametrize("task", [TOXICITY, INTENT], ids=lambda task: task.kind)
def test_batched_mechanisms_match_single_probe_logits(tiny, prompts, task):
    """With all of its options, twice: an equal ``summary_kind`` puts them into one call."""
    probes = [
        untrained_probe(tiny, f"{name}-{i}", task=task, mechanism=name, options=options)
        for i, (name, options) in enumerate(2 * VARIANTS)
    ]
    bank = Bank(probes)
    projections, token_roles = projected(tiny, bank.tap(), prompts), padded_roles(prompts)
    left, right = (
        summarise(bank, projections[:, half], token_roles[:, half])
        for half in (slice(20), slice(20, None))
    )
    together = bank.logits(bank.merge(left, right))
    for (name, options), probe, logits in zip(2 * VARIANTS, probes, together, strict=True):
        single_bank = Bank([probe])
        of_probe = torch.stack([bank.projections_of(probe.name, prompt) for prompt in projections])
        (single,) = single_bank.logits(summarise(single_bank, of_probe, token_roles))
        np.testing.assert_allclose(logits, single, **ROUNDING, err_msg=f"{name} {options}")


def test_fifty_probes_run_as_many_matmuls_as_one(tiny, prompts):
    def matmuls(probes):
        tap = Bank(probes).tap() if probes else lambda layer, hidden: None
        with tiny.tapped(tap), torch.profiler.profile() as seen:
            tiny.run(prompts)
        return sum(event.count for event in seen.key_averages() if event.key in MATMULS)

    gates = [untrained_probe(tiny, f"gate-{i}", mechanism="gate") for i in range(50)]
    assert matmuls(gates) == matmuls(gates[:1])
    assert matmuls(gates) == matmuls([]) + tiny.fingerprint.layers


def test_tap_measures_seconds_within_the_pass(tiny, prompts):
    tap = Bank([untrained_probe(tiny, "toxicity")]).tap()
    begin = time.perf_counter()
    projected(tiny, tap, prompts)
    assert 0 < tap.seconds < time.perf_counter() - begin


def test_non_finite_logits_raise_verdict_errors(tiny):
    probe = untrained_probe(tiny, "topics", task=TOPICS)
    for logit in (np.nan, np.inf, -np.inf):
        with pytest.raises(VerdictError, match=wordings.NOT_FINITE.format(probe="topics")):
            probe.verdict(np.array([0.0, logit]))


def test_overflowed_hidden_states_raise_verdict_errors(tiny):
    probe = untrained_probe(tiny, "p")
    bank = Bank([probe])
    tap = bank.tap()
    for layer in range(tiny.fingerprint.layers):
        tap(layer, torch.full((1, 2, 32), torch.inf))
    prompt = EncodedPrompt((1, 2), (TokenRole.PROMPT,) * 2)
    state = summarise(bank, tap.projected(), padded_roles([prompt]))
    assert bank.classify(bank.text_logits(state), [prompt]) == [Verdicts((), ("p",))]
    with pytest.raises(VerdictError, match=wordings.OVERFLOWED):
        probe.verdict(bank.logits(state)[0][0])


def test_duplicate_names_and_empty_banks_are_refused(tiny):
    probe = untrained_probe(tiny, "twin")
    with pytest.raises(SidelightError, match=f"{wordings.DISTINCT_NAMES}, got: twin, twin"):
        Bank([probe, probe])
    with pytest.raises(SidelightError, match=wordings.NO_PROBES):
        Bank([])


@pytest.mark.slow
def test_chunked_prompts_and_responses_match_full_text_verdicts(tiny, probes, prompts):
    """Prompts that end together, then their responses, each read in pieces of its own."""
    banks = ProbeBanks(probes)
    rows = projected(tiny, banks.prompt_tap(), prompts)
    projections = [row[: len(prompt)] for row, prompt in zip(rows, prompts, strict=True)]
    token_roles = [bytes(prompt.token_roles) for prompt in prompts]
    prompt_verdicts = banks.classify_prompts(torch.cat(projections), prompts)
    states = [None] * len(prompts)
    # Each in two pieces, of which two texts' come one pass before those of the others.
    cuts = [1, len(prompts[1]) // 2, 2, len(prompts[3]) - 1]
    chunks = [[slice(None, cut), slice(cut, None)] for cut in cuts]
    for chosen in ([0, 2], [0, 1, 2, 3], [1, 3]):
        next_chunks = [(i, chunks[i].pop(0)) for i in chosen]
        new = banks.read(
            torch.cat([projections[i][chunk] for i, chunk in next_chunks]),
            [token_roles[i][chunk] for i, chunk in next_chunks],
            [states[i] for i in chosen],
        )
        for i, state in zip(chosen, new, strict=True):
            states[i] = state
    response_verdicts = banks.classify_responses(states, prompts)
    for bank, text_verdicts in (
        (banks.prompt_probes, prompt_verdicts),
        (banks.response_probes, response_verdicts),
    ):
        for row, verdicts in enumerate(text_verdicts):
            wanted = score(tiny, bank, [prompts[row]])
            for probe, logits, verdict in zip(bank.probes, wanted, verdicts.verdicts, strict=True):
                expected = probe.verdict(logits[0]).probabilities
                assert verdict.probabilities == pytest.approx(expected, rel=1e-4, abs=1e-4)


CONVERSATION = ["Where is my refund?", "OK.", "I asked nicely", "Sure.", "Now what"]


def conversation(turns):
    roles = ("user", "assistant")
    return [Message(roles[index % 2], text) for index, text in enumerate(turns)]


@pytest.mark.parametrize("mechanism", mechanism_names())
@pytest.mark.parametrize("task", [TOXICITY, TOPICS], ids=lambda task: task.kind)
def test_highest_turn_decides_and_first_turn_counts_without_context(tiny, mechanism, task):
    """With the same states as the first turn by itself, since the model is causal."""
    reads = Reads(scope="each_turn")
    probe = untrained_probe(tiny, "p", task=task, mechanism=mechanism, reads=reads)
    conversation_probe = untrained_probe(tiny, "p", task=task, mechanism=mechanism)
    prompts = [tiny.encoder.encode(conversation(CONVERSATION[:n])) for n in (1, 3, 5)]
    single, *several = score(tiny, Bank([probe]), prompts)[0]
    conversations = score(tiny, Bank([conversation_probe]), prompts)[0]
    np.testing.assert_allclose(single, conversations[0], **ROUNDING)
    for logits, of_conversation in zip(several, conversations[1:], strict=True):
        assert (logits >= single - ROUNDING["atol"]).all()
        assert (logits >= of_conversation - ROUNDING["atol"]).all()


def test_non_finite_turn_logits_raise_verdict_errors(tiny):
    probe = untrained_probe(tiny, "p", reads=Reads(scope="each_turn"))
    logits, segments = (
        np.array([[5.0], [7.0]]),
        [Segment(np.arange(turn, turn + 1), turn) for turn in (0, 1)],
    )
    for text_logit, turn in ((1.0, 1), (9.0, None)):
        assert probe.highest(logits, segments, ProbeOutput(np.array([text_logit]))).turn == turn
    for broken in (np.nan, -np.inf):
        counted = probe.highest(np.array([[5.0], [broken]]), segments, ProbeOutput(np.array([9.0])))
        with pytest.raises(VerdictError):
            probe.verdict(counted.logits)


def test_short_turns_are_classified_with_their_neighbours(tiny):
    for contents, wanted in (
        (["a long enough text", "OK.", "another long text"], [(0,), (1, 2), (2,), (0, 2)]),
        (["a long enough text", "OK."], [(0,)]),
        (["a", "b", "c"], [(0, 2)]),
        (["short", "x" * 100, "another long text"], [(0, 1), (0,), (1,), (2,), (0, 2)]),
        (["by itself"], []),
        # Turns without text are no pieces.
        (["a long enough text", *[""] * 40], []),
        (["short", "", "another long text", "", "a third text"], [(0, 1), (1,), (2,)]),
        ([""] * 3, []),
    ):
        token_roles = bytes(tiny.encoder.encode(conversation(contents)).token_roles)
        turn_lengths = lengths_of_turns(token_roles)
        owners = np.repeat(range(len(turn_lengths)), turn_lengths)
        segments = split_segments(token_roles)
        assert [tuple(dict.fromkeys(owners[segment.tokens])) for segment in segments] == wanted
        assert [segment.turn for segment in segments] == [
            turns_of_segment[0] for turns_of_segment in wanted
        ]


def test_short_first_turn_is_classified_regardless_of_system_turn(tiny):
    """Its piece begins with the system's turn, which is not read, and may be long."""
    for system in ("", "s" * 150):
        turns = [Message("system", system)] * bool(system)
        turns += [Message("user", "short"), Message("assistant", "y" * 30)]
        prompt = tiny.encoder.encode([*turns, Message("user", "and")])
        text = np.flatnonzero(np.isin([*prompt.token_roles], [TokenRole.PROMPT]))
        short = {*text[:5].tolist()}
        beside = [
            segment for segment in split_segments(bytes(prompt.token_roles)) if segment.turn == 0
        ]
        assert len(beside) == 2
        assert all(short <= {*segment.tokens.tolist()} for segment in beside)


def test_multiclass_probes_ignore_each_turn_scope(tiny):
    prompts = [tiny.encoder.encode(conversation(CONVERSATION))]
    scores = [
        score(tiny, Bank([untrained_probe(tiny, "p", task=INTENT, reads=reads)]), prompts)[0]
        for reads in (Reads(), Reads(scope="each_turn"))
    ]
    np.testing.assert_allclose(*scores, **ROUNDING)
