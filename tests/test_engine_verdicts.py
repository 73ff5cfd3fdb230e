"""Every request gets the verdicts of its own tokens, or an error: never another's or a guess."""

import asyncio

import pytest
import torch
from transformers import LlamaConfig

from sidelight.bank import Bank
from sidelight.engines.queue import Limits
from sidelight.errors import FingerprintMismatchError
from sidelight.prompts import EncodedPrompt, Message, Part, Reads
from test_engine_decoding import GREEDY, ask, run
from tiny import SIZES, SPECIAL_TOKENS, three_probes, tiny_backbone, untrained_probe

TEXTS = [f"{'word ' * (i % 7)}number {i}" for i in range(16)]
# Batches of other shapes add in another order: float32 rounding over three layers.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


def probabilities(verdicts):
    return [p for verdict in verdicts for p in verdict.probabilities.values()]


def expected(backbone, probe, prompt):
    """The probe's probabilities by one plain pass over the tokens."""
    bank = Bank([probe])
    tap = bank.tap()
    with backbone.tapped(tap):
        backbone.run([prompt])
    state = bank.summarise(tap.projected(), {probe.reads: prompt.mask(probe.reads)[None]})
    return probabilities(bank.verdicts(state)[0])


def test_sixteen_requests_together_get_their_own_verdicts(backbone):
    probes = three_probes(backbone)

    async def ask_all(engine):
        together = await asyncio.gather(*(ask(engine, text) for text in TEXTS))
        return together, [await ask(engine, text) for text in TEXTS]

    together, alone = run(backbone, ask_all, probes=probes)
    assert len({str(probabilities(answer.judged.verdicts)) for answer in alone}) == len(TEXTS)
    for one, other in zip(together, alone, strict=True):
        assert [v.probe for v in one.judged.verdicts] == ["toxicity", "intent", "topics"]
        assert probabilities(one.judged.verdicts) == pytest.approx(
            probabilities(other.judged.verdicts), abs=ROUNDING
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
        assert probabilities(judged.verdicts) == pytest.approx(
            probabilities(answer.judged.verdicts), abs=ROUNDING
        )


@pytest.mark.parametrize("side", ["response", "both"])
@pytest.mark.parametrize("mechanism", ["readout", "gate", "attention"])
def test_a_probe_of_the_response_reads_all_but_the_last_token(backbone, side, mechanism):
    probe = untrained_probe(backbone, "late", reads=Reads(side), mechanism=mechanism)

    async def ask_some(engine):
        return await asyncio.gather(*(ask(engine, text) for text in TEXTS[:5]))

    for text, answer in zip(TEXTS, run(backbone, ask_some, probes=[probe]), strict=False):
        prompt = backbone.encoder.encode([Message("user", text)])
        ids = torch.tensor([prompt.token_ids])
        written = backbone.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=GREEDY.max_tokens,
            pad_token_id=0,
        )[0, len(prompt) : -1].tolist()
        read = EncodedPrompt(
            (*prompt.token_ids, *written), prompt.parts + (Part.RESPONSE,) * len(written)
        )
        assert answer.judged.verdicts == ()
        assert probabilities(answer.finished.verdicts) == pytest.approx(
            expected(backbone, probe, read), abs=ROUNDING
        )


def test_a_given_response_is_judged_without_writing(backbone):
    late = untrained_probe(backbone, "late", reads=Reads("response"))
    early = untrained_probe(backbone, "early")
    turns = [Message("user", "hello"), Message("assistant", "go away")]

    async def judge(engine):
        return [judged.verdicts for judged in await engine.judge([turns, turns[:1]])]

    with_response, without = run(backbone, judge, probes=[late, early])
    assert [v.probe for v in with_response] == ["early", "late"]
    assert [v.probe for v in without] == ["early"]
    prompt = backbone.encoder.encode(turns[:1], response="go away")
    assert probabilities(with_response[1:]) == pytest.approx(
        expected(backbone, late, prompt), abs=ROUNDING
    )


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
        for probe, verdict in zip(probes, judged.verdicts, strict=True):
            own = expected(backbone, probe, letters)
            assert probabilities([verdict]) == pytest.approx(own, abs=ROUNDING)
            assert own != pytest.approx(expected(backbone, probe, control), abs=ROUNDING)
        assert probabilities(answer.judged.verdicts) == pytest.approx(
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
    assert answer.judged.failed == ("broken",)
    assert [verdict.probe for verdict in answer.judged.verdicts] == ["sound"]
    (judged,) = run(backbone, lambda engine: engine.judge([[Message("user", "hi")]]), probes=probes)
    assert judged == answer.judged


def test_an_empty_response_gives_no_verdict(backbone):
    late = untrained_probe(backbone, "late", reads=Reads("response"))
    turns = [Message("user", "hello"), Message("assistant", "")]
    (judged,) = run(backbone, lambda engine: engine.judge([turns]), probes=[late])
    assert (judged.verdicts, judged.failed) == ((), ("late",))


def test_a_probe_of_another_backbone_is_refused(backbone):
    other = tiny_backbone(LlamaConfig(**{**SIZES, "rope_theta": 5000.0}))
    with pytest.raises(FingerprintMismatchError):
        run(backbone, lambda engine: ask(engine, "hi"), probes=three_probes(other))
