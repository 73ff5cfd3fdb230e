"""The settings in which training shows a text: among others, as a turn, plain, or disguised."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import sidelight.training.fit
from commands import run, saved
from corpora import rows
from sidelight.bank import Bank
from sidelight.data.examples import Example, LabelledExamples
from sidelight.errors import SidelightError
from sidelight.prompts import Message, PlainText, Reads
from sidelight.ragged import Ragged
from sidelight.states.extraction import score
from sidelight.training import classifier
from sidelight.training.dataset import prepare
from sidelight.training.optimisation import among_others
from sidelight.training.settings import FitOptions
from tiny import INTENT, TOXICITY, tiny_backbone, untrained_probe

TEXTS = [f"number {i:02d} has a text of its own" for i in range(60)]
EACH_TURN = Reads(scope="each_turn")


def said(*turns):
    return Example(tuple(Message("user", turn) for turn in turns))


@pytest.fixture
def examples():
    items = tuple(map(said, TEXTS))
    return LabelledExamples(items, ({},) * 60, labels=np.arange(60) % 3 % 2, task=TOXICITY)


@pytest.mark.parametrize("columns", [1, 3])
def test_each_input_is_a_text_among_others_without_a_label(columns):
    labelled, labels = {1, 4, 9}, torch.zeros(12, columns, dtype=torch.long)
    labels[[*labelled], columns - 1] = 1
    torch.manual_seed(0)
    lengths = torch.randint(1, 5, (12,))
    # Each token is the number of its text.
    alone = Ragged(torch.arange(12).repeat_interleave(lengths)[:, None].float(), lengths)
    made = among_others(alone, labels[:, 0] if columns == 1 else labels)
    assert len(made.lengths) == 12
    places = []
    for number, part in enumerate(made.split()):
        texts = part.values[:, 0].long().tolist()
        assert set(texts) & labelled == {number} & labelled
        # Whole: the tokens of a text are neighbours, and there is another text.
        assert texts.count(number) % int(lengths[number]) == 0
        assert len(texts) > int(lengths[number])
        places.append((texts[0] == number, texts[-1] == number))
    assert len({*places}) > 1
    assert among_others(alone, torch.ones(12, dtype=torch.long)) is alone


@pytest.mark.slow
def test_the_disguise_of_a_text_is_in_its_fold_and_none_is_scored(tiny, examples, tmp_path):
    options = FitOptions(cache_root=tmp_path, augment=True, max_tokens=100, reads=Reads())
    dataset = prepare(tiny, examples, None, options=options)
    assert dataset.validation.examples.content_hash == examples.content_hash
    shown = dataset.training.examples
    np.testing.assert_array_equal(shown.labels, np.tile(examples.labels, 2))
    assert [item.text for item in shown.items[:60]] == TEXTS
    assert not {item.text for item in shown.items[60:]} & {*TEXTS}
    assert sorted(np.concatenate(dataset.folds)) == [*range(120)]
    for fold in dataset.folds:
        own = {row % 60 for row in fold}
        assert own | {row + 60 for row in own} == {*fold}
    cut = sum(prompt.dropped > 0 for prompt in dataset.training.prompts)
    assert cut
    assert any(f"{cut} of 120 texts were cut" in warning for warning in dataset.warnings)


@pytest.mark.slow
def test_a_probe_of_both_formats_learns_from_both_and_one_of_chats_says_nothing_of_plain_text(
    tiny, examples, tmp_path
):
    backbone = tiny_backbone(prompt_format="both")
    dataset = prepare(backbone, examples, None, options=FitOptions(cache_root=tmp_path))
    shown = [prompt.is_plain for prompt in dataset.training.prompts]
    assert shown.count(True) == 60
    assert not any(prompt.is_plain for prompt in dataset.validation.prompts)
    probes = [untrained_probe(tiny, "p"), replace(untrained_probe(tiny, "q"), prompt_format="both")]
    texts = (said("a text").messages, PlainText("a text"))
    of_chats, of_both = score(tiny, Bank(probes), [tiny.encoder.encode(text) for text in texts])
    assert [*np.isfinite(of_chats[:, 0])] == [True, False]
    assert np.isfinite(of_both).all()


def test_the_options_of_both_interfaces_reach_training(tmp_path, monkeypatch):
    asked = []

    def fit(backbone, *_, options, **_named):
        own = options.augment, options.reads.scope, options.long_inputs
        asked.append([backbone.encoder.prompt_format, *own])
        raise SidelightError("asked")

    for module in (sidelight.training.fit, classifier):
        monkeypatch.setattr(module, "fit", fit)
    data, model = tmp_path / "train.jsonl", saved(tiny_backbone(), tmp_path / "model")
    data.write_text("\n".join(map(json.dumps, rows("binary", 60))))
    line = ["train", "--data", str(data), "--model", model, "--positive", "toxic"]
    flags = ["--format", "both", "--augment", "--scope", "conversation", "--long-inputs"]
    named = {"prompt_format": "both", "augment": True, "scope": "conversation", "long_inputs": True}
    for given, options in (([], {}), (flags, named)):
        assert run(*line, "--out", str(tmp_path / "p"), *given) == 2
        with pytest.raises(SidelightError, match="asked"):
            classifier.train(model, data, positive="toxic", **options)
    usual = ["chat", False, "each_turn", False]
    assert asked == [usual, usual, [*named.values()], [*named.values()]]


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
    # Of 30, what is left cannot make a conversation of three.
    assert 28 <= sum(map(len, turns)) <= 30
    assert {len(own) for own in turns} <= {3, 5}
    later = {text for own in turns for text in own[1:]}
    for text, (mine, theirs) in enumerate(zip(by_text(packed), by_text(alone), strict=True)):
        # The first turn's states are those of the text by itself, the model being causal.
        if text not in later:
            torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02)
        else:
            assert not torch.allclose(mine[-1, 0].float(), theirs[-1, 0].float(), atol=0.02)
    # They are selected like any texts.
    chosen, whole = [17, 3, 8, 0, 19], by_text(packed)
    for text, own in zip(chosen, by_text(packed.select(chosen)), strict=True):
        assert torch.equal(own, whole[text])


def test_texts_stay_by_themselves_where_the_whole_is_judged_or_no_conversation_can_be(
    tiny, examples, tmp_path, monkeypatch
):
    # Several classes are judged whole, and so is what has a response.
    intents = replace(examples, labels=np.arange(60) % 3, task=INTENT)
    both = Reads("both", scope="each_turn")
    cases = (examples, Reads()), (examples, both), (intents, EACH_TURN)
    splits = [split_of(tiny, given, tmp_path, reads=reads) for given, reads in cases]
    assert {split.states.reads.scope for split in splits} == {"conversation"}
    encode = type(tiny.encoder).encode_any_length

    def refusing(encoder, messages, response=None):
        if len(messages) > 1:
            raise SidelightError("Only users speak.")
        return encode(encoder, messages, response)

    monkeypatch.setattr(type(tiny.encoder), "encode_any_length", refusing)
    splits.append(split_of(tiny, examples, tmp_path))
    assert all(len(own) == 1 for split in splits for own in split.states._texts)
