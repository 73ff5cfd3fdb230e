"""Every request gets the verdicts of its own tokens, or an error, from the pass that serves it.

Never another's verdict, and never a guess. Watched probes say after each token of the response what
they would say of it so far.
"""

import asyncio
import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from engine_runs import (
    ROUNDING,
    ask,
    count_passes,
    events_of,
    expected,
    probabilities,
    reference,
    run,
    written_alone,
)
from sidelight.bank import Bank
from sidelight.engines.base import Finished, PromptJudged, ResponseScored, Sampling, TextDelta
from sidelight.engines.parity import compare_engines
from sidelight.engines.queue import Limits
from sidelight.engines.transformers import TransformersEngine
from sidelight.errors import FingerprintMismatchError, SidelightError
from sidelight.prompts import EncodedPrompt, Message, Part, Reads
from tiny import SIZES, SPECIAL_TOKENS, three_probes, tiny_backbone, untrained_probe

TEXTS = [f"{'word ' * (i % 7)}number {i}" for i in range(16)]
WATCHED_TEXTS = ["hello", "a longer text than the other ones", "word " * 6]
TEXT = "a prompt of some length, to be told from anything else by its shape"
WIDTH = 32
LATE = ("late",)


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


def written_text(backbone, text):
    """The prompt, and the tokens of the text that follows it when the model alone writes."""
    prompt, tokens = written_alone(backbone, text)
    return prompt, [token for token in tokens if token != 1]


def followed(prompt, tokens):
    parts = prompt.parts + (Part.RESPONSE,) * len(tokens)
    return EncodedPrompt((*prompt.token_ids, *tokens), parts)


def test_sixteen_requests_together_get_their_own_verdicts(backbone):
    probes = three_probes(backbone)

    async def ask_all(engine):
        together = await asyncio.gather(*(ask(engine, text) for text in TEXTS))
        return together, [await ask(engine, text) for text in TEXTS]

    together, alone = run(backbone, ask_all, probes=probes)
    assert len({str(probabilities(answer.judged.judgement.verdicts)) for answer in alone}) == len(
        TEXTS
    )
    for one, other in zip(together, alone, strict=True):
        assert [v.probe for v in one.judged.judgement.verdicts] == ["toxicity", "intent", "topics"]
        assert probabilities(one.judged.judgement.verdicts) == pytest.approx(
            probabilities(other.judged.judgement.verdicts), abs=ROUNDING
        )
        assert one.text == other.text


def test_a_check_gives_the_verdicts_of_a_completion(backbone):
    async def both(engine):
        conversations = [[Message("user", text)] for text in TEXTS]
        checked = await engine.judge(conversations)
        return checked, [await ask(engine, text) for text in TEXTS]

    limits = Limits(prefill_tokens=128)
    checked, answers = run(backbone, both, probes=three_probes(backbone), limits=limits)
    for judged, answer in zip(checked, answers, strict=True):
        assert probabilities(judged.judgement.verdicts) == pytest.approx(
            probabilities(answer.judged.judgement.verdicts), abs=ROUNDING
        )


@pytest.mark.slow
@pytest.mark.parametrize("side", ["response", "both"])
@pytest.mark.parametrize("mechanism", ["readout", "gate", "attention"])
def test_a_probe_of_the_response_reads_all_but_the_last_token(backbone, side, mechanism):
    probe = untrained_probe(backbone, "late", reads=Reads(side), mechanism=mechanism)

    async def ask_some(engine):
        return await asyncio.gather(*(ask(engine, text) for text in TEXTS[:5]))

    for text, answer in zip(TEXTS, run(backbone, ask_some, probes=[probe]), strict=False):
        prompt, tokens = written_alone(backbone, text)
        read = followed(prompt, tokens[:-1])
        assert answer.judged.judgement.verdicts == ()
        assert probabilities(answer.finished.judgement.verdicts) == pytest.approx(
            expected(backbone, probe, read), abs=ROUNDING
        )


def test_a_given_response_is_judged_without_writing(backbone):
    late = untrained_probe(backbone, "late", reads=Reads("response"))
    early = untrained_probe(backbone, "early")
    turns = [Message("user", "hello"), Message("assistant", "go away")]

    async def judge(engine):
        return [judged.judgement.verdicts for judged in await engine.judge([turns, turns[:1]])]

    with_response, without = run(backbone, judge, probes=[late, early])
    assert [v.probe for v in with_response] == ["early", "late"]
    assert [v.probe for v in without] == ["early"]
    prompt = backbone.encoder.encode(turns[:1], response="go away")
    assert probabilities(with_response[1:]) == pytest.approx(
        expected(backbone, late, prompt), abs=ROUNDING
    )


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_content_that_names_a_control_token_is_judged_as_its_letters(backbone, place):
    probes = [
        untrained_probe(backbone, "early"),
        untrained_probe(backbone, "late", reads=Reads("response")),
    ]
    texts = [f"{'go now'[:place]}{name}{'go now'[place:]}" for name in SPECIAL_TOKENS]

    async def ask_all(engine):
        turns = [[Message("user", text), Message("assistant", text)] for text in texts]
        return await engine.judge(turns), [await ask(engine, text) for text in texts]

    checked, answers = run(backbone, ask_all, probes=probes)
    for text, judged, answer in zip(texts, checked, answers, strict=True):
        letters, control = (_by_hand(backbone, text, split=split) for split in (True, False))
        for probe, verdict in zip(probes, judged.judgement.verdicts, strict=True):
            own = expected(backbone, probe, letters)
            assert probabilities([verdict]) == pytest.approx(own, abs=ROUNDING)
            assert own != pytest.approx(expected(backbone, probe, control), abs=ROUNDING)
        assert probabilities(answer.judged.judgement.verdicts) == pytest.approx(
            expected(backbone, probes[0], _by_hand(backbone, text, None, split=True)), abs=ROUNDING
        )


def _by_hand(backbone, text, response="", *, split):
    """A user's text, and the same as the response, of a tokenizer that merges nothing.

    Args:
        response: None: the text is to be answered.
        split: Whether the text's control tokens are letters.
    """
    ids, parts = [], []
    pieces = [
        ("<|user|>", Part.UNREAD),
        (text, Part.PROMPT),
        ("<|end|>\n<|assistant|>", Part.TEMPLATE),
    ]
    if response is not None:
        pieces += [(text, Part.RESPONSE), ("<|end|>\n", Part.UNREAD)]
    for piece, part in pieces:
        own = backbone.tokenizer(piece, split_special_tokens=split and piece == text)["input_ids"]
        ids += own
        parts += [part] * len(own)
    return EncodedPrompt(tuple(ids), tuple(parts))


def test_a_probe_that_overflows_gives_no_verdict(backbone):
    broken = untrained_probe(backbone, "broken")
    broken.mechanism.bias.fill_(float("nan"))
    probes = [broken, untrained_probe(backbone, "sound")]
    answer = run(backbone, lambda engine: ask(engine, "hi"), probes=probes)
    assert answer.judged.judgement.failed == ("broken",)
    assert [verdict.probe for verdict in answer.judged.judgement.verdicts] == ["sound"]
    (judged,) = run(backbone, lambda engine: engine.judge([[Message("user", "hi")]]), probes=probes)
    assert judged == answer.judged


def test_an_empty_response_gives_no_verdict(backbone):
    late = untrained_probe(backbone, "late", reads=Reads("response"))
    turns = [Message("user", "hello"), Message("assistant", "")]
    (judged,) = run(backbone, lambda engine: engine.judge([turns]), probes=[late])
    assert (judged.judgement.verdicts, judged.judgement.failed) == ((), ("late",))


def test_a_probe_of_another_backbone_is_refused(backbone):
    other = tiny_backbone(LlamaConfig(**{**SIZES, "rope_theta": 5000.0}))
    with pytest.raises(FingerprintMismatchError):
        run(backbone, lambda engine: ask(engine, "hi"), probes=three_probes(other))


@pytest.mark.slow
@pytest.mark.parametrize("side", ["response", "both"])
@pytest.mark.parametrize("mechanism", ["readout", "gate", "attention", "blend"])
def test_a_running_verdict_is_that_of_the_text_so_far(backbone, side, mechanism):
    probe = untrained_probe(backbone, "late", reads=Reads(side), mechanism=mechanism)

    async def ask_all(engine):
        return await asyncio.gather(
            *(events_of(engine, text, watch=LATE) for text in WATCHED_TEXTS)
        )

    for text, events in zip(WATCHED_TEXTS, run(backbone, ask_all, probes=[probe]), strict=True):
        prompt, tokens = written_text(backbone, text)
        scores = [event for event in events if isinstance(event, ResponseScored)]
        assert [score.tokens for score in scores] == list(range(1, len(tokens) + 1))
        for score in scores:
            read = followed(prompt, tokens[: score.tokens])
            assert probabilities(score.judgement.verdicts) == pytest.approx(
                expected(backbone, probe, read), abs=ROUNDING
            )
        assert events[-1].judgement.verdicts == scores[-1].judgement.verdicts


def test_watching_changes_no_text_and_costs_the_reading_of_the_last_token(backbone):
    late = untrained_probe(backbone, "late", reads=Reads("response"))
    passes: list[int] = []
    hook = backbone.model.register_forward_pre_hook(lambda *_: passes.append(1))
    watched = run(backbone, lambda engine: events_of(engine, "hello", watch=LATE), probes=[late])
    watched_passes = len(passes)
    plain = run(backbone, lambda engine: ask(engine, "hello"), probes=[late])
    hook.remove()
    text = "".join(event.text for event in watched if isinstance(event, TextDelta))
    assert text == plain.text == reference(backbone, "hello")[0]
    assert (watched_passes, len(passes) - watched_passes) == (17, 16)


def test_a_text_says_how_many_tokens_it_comes_from(backbone):
    late = untrained_probe(backbone, "late", reads=Reads("response"))
    events = run(backbone, lambda engine: events_of(engine, "hello", watch=LATE), probes=[late])
    _, tokens = written_text(backbone, "hello")
    shown = ""
    for event in events:
        if isinstance(event, TextDelta):
            shown += event.text
            whole = backbone.tokenizer.decode(tokens[: event.tokens], skip_special_tokens=True)
            assert shown == whole.rstrip("\ufffd")
    assert events[0].tokens == len(written_text(backbone, "hello")[0])


@pytest.mark.parametrize("stop", [(), ("the",)])
@pytest.mark.parametrize("max_tokens", [1, 2, 30])
def test_every_token_of_a_watched_text_is_read(backbone, max_tokens, stop):
    late = untrained_probe(backbone, "late", reads=Reads("response"))
    first = run(backbone, lambda engine: ask(engine, "x", Sampling(max_tokens=30, temperature=0.0)))
    stop = (first.text[7:9],) if stop else ()
    sampling = Sampling(max_tokens=max_tokens, temperature=0.0, stop=stop)
    events = run(
        backbone, lambda engine: events_of(engine, "x", sampling, watch=LATE), probes=[late]
    )
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
    assert {verdict.probe for score in scores for verdict in score.judgement.verdicts} == {"other"}
    assert [v.probe for v in watched[-1].judgement.verdicts] == ["late", "other"]


def test_a_probe_that_overflows_is_told_at_each_token(backbone):
    broken = untrained_probe(backbone, "late", reads=Reads("response"))
    broken.mechanism.bias.fill_(float("nan"))
    events = run(backbone, lambda engine: events_of(engine, "hi", watch=LATE), probes=[broken])
    scores = [event for event in events if isinstance(event, ResponseScored)]
    assert scores
    assert all(
        score.judgement.failed == ("late",) and not score.judgement.verdicts for score in scores
    )


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
    events = run(backbone, lambda engine: events_of(engine, "hi", watch=LATE), probes=[late])
    assert isinstance(events[0], PromptJudged)
    assert isinstance(events[1], TextDelta | ResponseScored)


def passes(backbone, probes):
    """Rows and tokens of every forward pass of one completion."""
    shapes = count_passes(backbone)
    answer = run(backbone, lambda engine: ask(engine, TEXT), probes=probes)
    return [tuple(shape) for shape in shapes], answer


def test_three_probes_add_no_forward_pass_and_no_token():
    backbone = tiny_backbone()
    with_probes, judged = passes(backbone, three_probes(backbone))
    without, plain = passes(backbone, [])
    assert with_probes == without
    prompt = judged.finished.prompt_tokens
    assert without == [(1, prompt)] + [(1, 1)] * (judged.finished.completion_tokens - 1)
    assert len(judged.judged.judgement.verdicts) == 3
    assert judged.text == plain.text


def test_probes_of_the_response_add_no_forward_pass_either():
    backbone = tiny_backbone()
    late = [untrained_probe(backbone, "late", reads=Reads("both"))]
    with_probe, judged = passes(backbone, late)
    assert with_probe == passes(backbone, [])[0]
    assert len(judged.finished.judgement.verdicts) == 1


def test_a_hidden_state_is_dead_once_the_next_layer_has_run():
    backbone = tiny_backbone()
    late = untrained_probe(backbone, "late", reads=Reads("both"), mechanism="attention")
    states: list[weakref.ref[torch.Tensor]] = []
    alive_before: list[int] = []

    def note(_module, _args, output):
        # The newest state is the running layer's input, so it may live.
        alive_before.append(sum(state() is not None for state in states[:-1]))
        states.append(weakref.ref(output))

    hooks = [layer.register_forward_hook(note) for layer in backbone.model.model.layers]
    run(backbone, lambda engine: ask(engine, TEXT), probes=[*three_probes(backbone), late])
    for hook in hooks:
        hook.remove()
    assert len(states) == 16 * len(hooks)
    assert set(alive_before) == {0}
    assert not any(state() is not None for state in states)


def test_nothing_as_wide_as_a_hidden_state_is_left_after_the_pass():
    backbone = tiny_backbone()
    alive: list[int] = []
    modules = [backbone.model.model.layers[-1], backbone.model]
    hooks = [m.register_forward_hook(lambda *_: alive.append(len(wide_tensors()))) for m in modules]
    once = Sampling(temperature=0.0, max_tokens=1)
    run(backbone, lambda engine: ask(engine, TEXT, once), probes=three_probes(backbone))
    for hook in hooks:
        hook.remove()
    in_last_layer, after_pass = alive
    # Proves that the audit sees hidden states: the last layer's input and output at least.
    assert in_last_layer >= 2
    assert after_pass == 0


def test_a_tap_keeps_layers_times_columns_numbers_of_a_token():
    backbone = tiny_backbone()
    bank = Bank(three_probes(backbone))
    tap = bank.tap()
    prompt = backbone.encoder.encode([Message("user", TEXT)])
    with backbone.tapped(tap):
        backbone.run([prompt])
    columns = sum(probe.mechanism.columns().shape[-1] for probe in bank.probes)
    assert tap.projected().shape == (1, len(prompt), backbone.fingerprint.layers, columns)


def wide_tensors():
    """Live tensors, weights aside, with the width of a hidden state for every token."""
    # By type: isinstance would wake lazy objects of other libraries.
    tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor]
    return [t for t in tensors if t.shape[-1:] == (WIDTH,) and t.numel() >= len(TEXT) * WIDTH]


def test_a_flip_is_another_verdict_at_the_probes_threshold(tiny):
    """Two engines whose probes differ in their threshold alone."""
    texts = [[Message("user", f"text {number}")] for number in range(6)]
    probe = untrained_probe(tiny, "toxicity", threshold=0.0)
    strict = replace(probe, thresholds=(1.0,))
    engines = {
        name: lambda one=one: TransformersEngine(tiny, [one])
        for name, one in (("lax", probe), ("strict", strict))
    }
    found = compare_engines(engines, texts, batch_sizes=(1,))[0]
    assert (found.flips, found.texts) == (6, 6)
    assert np.isclose(found.largest, 0)
