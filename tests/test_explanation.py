"""Explanations: shares sum to the logit, stand where the client wrote, and cost no pass."""

import numpy as np
import pytest

import wordings
from sidelight.classifier import Classifier
from sidelight.data.examples import Example
from sidelight.errors import VerdictError
from sidelight.models.conversation import Message, PlainText, Reads
from sidelight.probes.bank import Bank
from sidelight.probes.mechanisms.base import mechanism_names
from worlds.models import (
    INTENT,
    TOPICS,
    TOXICITY,
    broken,
    score,
    three_probes,
    tiny_backbone,
    untrained_probe,
)
from worlds.servers import count_passes, run_engine

# In logits; as in test_mechanisms.py.
COMPLETE = 1e-4
TURNS = (
    Message("system", "Be brief."),
    Message("user", "Where is my refund? ñ 🙂"),
    Message("assistant", "I will look at it"),
    Message("user", "And now it is late"),
)
RESPONSE = "Yes, it is late"
TASKS = {task.kind: task for task in (TOXICITY, INTENT, TOPICS)}


@pytest.fixture(scope="module")
def backbone():
    """Of this file's own: one test counts its passes."""
    return tiny_backbone()


def logits_of(backbone, probe, example):
    prompt = backbone.encoder.encode(example.messages, example.response)
    (logits,) = score(backbone, Bank([probe]), [prompt])
    return logits[0]


def require_complete(explanation):
    """The shares by token and by layer, with the rest, sum to the logit."""
    values = explanation.to_dict()
    tokens = sum(token["share"] for token in values["tokens"])
    rest = values["logit"] - values["baseline"]
    assert tokens + values["template"] == pytest.approx(rest, abs=COMPLETE)
    assert sum(values["layers"]) == pytest.approx(rest, abs=COMPLETE)


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("mechanism", mechanism_names())
def test_shares_sum_to_logit_and_map_to_message_characters(backbone, mechanism, kind):
    task = TASKS[kind]
    probe = untrained_probe(backbone, "p", task=task, mechanism=mechanism)
    classifier, example = Classifier(backbone, probe), Example(TURNS)
    explanation = classifier.explain(example)
    require_complete(explanation)
    assert explanation.verdict == classifier.predict([example])[0]
    logits = logits_of(backbone, probe, example)
    logit = logits[task.labels[-task.outputs :].index(explanation.label)]
    wanted = logit - logits.mean() if kind == "multiclass" else logit
    assert explanation.logit == pytest.approx(wanted, abs=COMPLETE)
    assert explanation.shares.shape == (len(explanation.places), backbone.fingerprint.layers)
    # The tiny tokenizer's tokens are bytes, so a character can have several.
    for index, message in enumerate(TURNS):
        logit = [place for place in explanation.places if place and place.message == index]
        covered = {i for place in logit for i in range(place.start, place.end)}
        assert covered == ({*range(len(message.content))} if message.role != "system" else set())


def test_response_counts_as_message_after_last(backbone):
    probe = untrained_probe(backbone, "late", reads=Reads("response"))
    explanation = Classifier(backbone, probe).explain(Example(TURNS), response=RESPONSE)
    require_complete(explanation)
    assert {place.message for place in explanation.places} == {len(TURNS)}
    assert len(explanation.places) == len(RESPONSE)


def test_explained_logit_comes_from_deciding_turns(backbone):
    turns = set()
    for seed in range(6):
        probe = untrained_probe(backbone, f"p{seed}", reads=Reads(scope="each_turn"))
        explanation = Classifier(backbone, probe).explain(Example(TURNS))
        require_complete(explanation)
        logits = logits_of(backbone, probe, Example(TURNS))
        assert explanation.logit == pytest.approx(logits[0], abs=COMPLETE)
        turn = explanation.verdict.turn
        turns.add(turn)
        told = {place.message for place in explanation.places if place}
        # A verdict's turn does not count the leading system turn.
        assert told == ({1, 2, 3} if turn is None else {turn + 1})
    # Or one case alone would have been seen.
    assert len(turns) > 1


def test_text_without_verdict_is_not_explained(backbone):
    probe = untrained_probe(backbone, "p")
    plain = Example(PlainText("hello"))
    with pytest.raises(VerdictError, match=wordings.NOT_OF_PLAIN_TEXT):
        Classifier(backbone, probe).explain(plain)
    with pytest.raises(VerdictError, match=wordings.NOT_FINITE.format(probe="p")):
        Classifier(backbone, broken(probe)).explain("hello")


def test_engine_explains_without_extra_passes(backbone):
    probes = [
        *three_probes(backbone),
        untrained_probe(backbone, "fused", mechanism="spans"),
        untrained_probe(backbone, "late", reads=Reads("response")),
    ]
    names = [probe.name for probe in probes]
    conversation = [*TURNS, Message("assistant", RESPONSE)]
    texts = [conversation, conversation[:2]]

    async def work(engine):
        passes = count_passes(backbone)
        plain = await engine.classify(texts)
        before = len(passes)
        asked = await engine.classify(texts, explain=names)
        return plain, asked, before, len(passes) - before

    plain, asked, before, after = run_engine(backbone, work, probes=probes)
    assert before == after
    assert [event.explanations for event in plain] == [(), ()]
    assert [j.verdicts for j in plain] == [j.verdicts for j in asked]
    assert {e.verdict.probe for e in asked[0].explanations} == set(names)
    assert {e.verdict.probe for e in asked[1].explanations} == set(names[:-1])
    for event, response in zip(asked, (RESPONSE, None), strict=True):
        for explanation in event.explanations:
            require_complete(explanation)
            probe = probes[names.index(explanation.verdict.probe)]
            expected = Classifier(backbone, probe).explain(
                Example(tuple(texts[asked.index(event)])[: 4 if response else 2]),
                response=response,
            )
            np.testing.assert_allclose(explanation.shares, expected.shares, atol=COMPLETE)
            assert explanation.places == expected.places
