"""With the scope of each turn, turns are learned in conversations and served as scored."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine_runs import run
from sidelight.artifact import load_probe, save_probe
from sidelight.bank import Bank
from sidelight.data.examples import Example, LabelledExamples
from sidelight.errors import SidelightError
from sidelight.prompts import Message, Reads
from sidelight.states.extraction import score
from sidelight.training.dataset import prepare
from sidelight.training.settings import FitOptions
from sidelight.vllm.settings import judgement_of, report_of
from tiny import INTENT, TOXICITY, untrained_probe

EACH_TURN = Reads(scope="each_turn")


@pytest.fixture
def examples():
    items = tuple(Example((Message("user", f"text number {i:02d}"),)) for i in range(20))
    return LabelledExamples(items, ({},) * 20, labels=np.arange(20) % 2, task=TOXICITY)


def split_of(backbone, examples, root, *, reads=EACH_TURN):
    """The texts as ``fit`` reads them."""
    options = FitOptions(cache_root=root, keep_cache=True, reads=reads)
    return prepare(backbone, examples, None, options=options).originals


def by_text(split):
    """The states of each text, in order."""
    states = split.own_states()
    shards = [states.read(index) for index in range(len(states))]
    found = dict(each for shard in shards for each in shard.texts())
    assert sorted(found) == list(range(len(split)))
    return [found[text] for text in range(len(split))]


def test_half_of_the_texts_are_turns_of_conversations(tiny, examples, tmp_path):
    packed = split_of(tiny, examples, tmp_path, reads=EACH_TURN)
    alone = split_of(tiny, examples, tmp_path, reads=Reads())
    turns = [own for own in packed.states._texts if len(own) > 1]
    assert sum(map(len, turns)) == 8
    assert {len(own) for own in turns} <= {3, 5}
    later = {text for own in turns for text in own[1:]}
    for text, (mine, theirs) in enumerate(zip(by_text(packed), by_text(alone), strict=True)):
        # The first turn's states are those of the text by itself, the model being causal.
        if text not in later:
            torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02)
        else:
            assert not torch.allclose(mine[-1, 0].float(), theirs[-1, 0].float(), atol=0.02)


def test_some_texts_of_conversations_are_selected_like_any(tiny, examples, tmp_path):
    packed = split_of(tiny, examples, tmp_path, reads=EACH_TURN)
    whole = by_text(packed)
    chosen = [17, 3, 8, 0, 19]
    for text, own in zip(chosen, by_text(packed.select(chosen)), strict=True):
        assert torch.equal(own, whole[text])


def test_texts_that_no_conversation_can_hold_stay_alone(tiny, examples, tmp_path, monkeypatch):
    whole = type(tiny.encoder).encode_any_length

    def refusing(encoder, messages, response=None):
        if len(messages) > 1:
            raise SidelightError("Only users speak.")
        return whole(encoder, messages, response)

    monkeypatch.setattr(type(tiny.encoder), "encode_any_length", refusing)
    split = split_of(tiny, examples, tmp_path)
    assert all(len(own) == 1 for own in split.states._texts)


@pytest.mark.parametrize("reads", [Reads(), Reads("both", scope="each_turn")])
def test_texts_stay_by_themselves_where_the_whole_is_judged(tiny, examples, tmp_path, reads):
    split = split_of(tiny, examples, tmp_path, reads=reads)
    assert split.states.reads.scope == "conversation"
    assert all(len(own) == 1 for own in split.states._texts)


def test_several_classes_are_judged_whole(tiny, examples, tmp_path):
    intents = replace(examples, labels=np.arange(20) % 3, task=INTENT)
    split = split_of(tiny, intents, tmp_path, reads=EACH_TURN)
    assert split.states.reads.scope == "conversation"
    assert all(len(own) == 1 for own in split.states._texts)


def test_the_scope_is_stored_and_old_artifacts_judge_the_whole(tiny, tmp_path):
    probe = untrained_probe(tiny, "p", reads=EACH_TURN)
    assert load_probe(save_probe(probe, tmp_path / "p")).reads == EACH_TURN
    manifest = tmp_path / "p" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"scope": "each_turn"', '"side": "prompt"'))
    assert load_probe(tmp_path / "p").reads == Reads()


def test_an_engine_names_the_turn_that_decided_and_vllm_passes_it_on(tiny):
    probe = untrained_probe(tiny, "p", reads=EACH_TURN)
    turns = ["Where is my refund?", "I will look at it", "And now it is late", "Yes, it is late"]
    roles = ("user", "assistant", "user", "assistant")
    conversation = [Message(*turn) for turn in zip(roles, turns, strict=True)][:3]

    async def judged(engine):
        return (await engine.judge([conversation]))[0].judgement

    judgement = run(tiny, judged, probes=[probe])
    prompt = tiny.encoder.encode(conversation)
    (logits,) = score(tiny, Bank([probe]), [prompt])
    wanted = probe.verdict(logits[0])
    verdict = judgement.verdicts[0]
    assert replace(verdict, turn=None, probabilities={}) == replace(wanted, probabilities={})
    np.testing.assert_allclose(
        list(verdict.probabilities.values()), list(wanted.probabilities.values()), atol=1e-5
    )
    assert verdict.turn in (None, 0, 1, 2)
    again, _ = judgement_of({"sidelight": report_of(judgement, 0.0)})
    assert again == judgement


def test_turns_too_short_for_themselves_are_judged_as_the_whole(tiny):
    probe = untrained_probe(tiny, "p", reads=EACH_TURN)
    whole = untrained_probe(tiny, "p")
    messages = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    prompts = [tiny.encoder.encode(messages), tiny.encoder.encode(messages[:1])]
    for mine, theirs in zip(
        score(tiny, Bank([probe]), prompts), score(tiny, Bank([whole]), prompts), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
