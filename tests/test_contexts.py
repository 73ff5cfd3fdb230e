"""The settings in which training shows a text: among others, as a turn, plain, or disguised."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn.functional import binary_cross_entropy_with_logits

import sidelight.training.fit
from commands import run, saved
from corpora import rows, training_set
from sidelight.bank import Bank
from sidelight.data.examples import Example, LabelledExamples
from sidelight.data.loading import load_examples
from sidelight.disguises import DISGUISES
from sidelight.errors import SidelightError
from sidelight.mechanisms.base import mechanism_spec
from sidelight.prompts import Message, PlainText, Reads
from sidelight.ragged import Ragged
from sidelight.states.extraction import score
from sidelight.training import classifier
from sidelight.training.dataset import prepare
from sidelight.training.fit import fit
from sidelight.training.loop import train_mechanisms
from sidelight.training.optimisation import among_others
from sidelight.training.settings import FitOptions, Job, suggested_settings
from sidelight.training.variants import with_variants
from tiny import INTENT, TOXICITY, tiny_backbone, untrained_probe

TEXTS = [f"number {i:02d} has a text of its own" for i in range(60)]
EACH_TURN = Reads(scope="each_turn")


def said(*turns):
    return Example(tuple(Message("user", turn) for turn in turns))


@pytest.fixture
def examples():
    items = tuple(map(said, TEXTS))
    return LabelledExamples(items, ({},) * 60, labels=np.arange(60) % 3 % 2, task=TOXICITY)


def batch(labels, *, seed=0):
    """Texts of 1 to 4 tokens, each token the number of its text, and a draw of long inputs."""
    torch.manual_seed(seed)
    lengths = torch.randint(1, 5, (len(labels),))
    values = torch.arange(len(labels)).repeat_interleave(lengths)[:, None].float()
    tokens = Ragged(values, lengths)
    return tokens, among_others(tokens, torch.tensor(labels))


def texts_of(part):
    """The numbers of the texts in one input, in order, each as often as it is there."""
    return part.values[:, 0].long().tolist()


@pytest.mark.parametrize("columns", [1, 3])
def test_each_input_is_a_text_among_others_without_a_label(columns):
    labels = np.zeros((12, columns), dtype=int)
    labels[[1, 4, 9], columns - 1] = 1
    labelled = {1, 4, 9}
    alone, made = batch((labels[:, 0] if columns == 1 else labels).tolist())
    assert len(made.lengths) == 12
    for number, part in enumerate(made.split()):
        texts = texts_of(part)
        assert set(texts) & labelled == {number} & labelled
        # Whole: the tokens of a text are neighbours, and there is another text.
        assert texts.count(number) % int(alone.lengths[number]) == 0
        assert len(texts) > int(alone.lengths[number])


def test_places_and_numbers_differ_unless_all_texts_have_a_label():
    alone, made = batch([1, 1, 1])
    assert made is alone
    first, last, sizes = 0, 0, []
    for seed in range(20):
        alone, made = batch([1, 0, 0, 0], seed=seed)
        texts = texts_of(made.split()[0])
        first, last = first + (texts[0] == 0), last + (texts[-1] == 0)
        sizes.append(len(texts) - int(alone.lengths[0]))
    assert 0 < first < 20
    assert 0 < last < 20
    assert min(sizes) < 10 < 40 < max(sizes)


def joined_loss(trained, held_out):
    """The cross-entropy of long inputs that are made of held-out texts."""
    torch.manual_seed(0)
    shard, labels = held_out.states.read(0), torch.from_numpy(held_out.labels)
    folded = trained.standardisation.fold(trained.mechanism.columns())
    projected = folded.layers(shard.hidden.float())
    tokens = among_others(Ragged(projected.transpose(0, 1), shard.lengths), labels[shard.rows])
    logits = trained.mechanism.finish(trained.mechanism.summarise(tokens))[:, 0]
    return float(binary_cross_entropy_with_logits(logits, labels[shard.rows].float()))


@pytest.mark.slow
def test_a_probe_that_learned_from_long_inputs_is_surer_of_them(tiny, tmp_path):
    training = training_set(tiny, tmp_path, "binary", 120, seed=1)
    held_out = training_set(tiny, tmp_path, "binary", 200, seed=2, shard_bytes=10**9)
    spec, usual = mechanism_spec("readout"), suggested_settings("readout")
    jobs = [
        Job(spec, seed, replace(usual.changed(epochs=12, learning_rate=5e-3), long_inputs=wanted))
        for wanted in (False, True)
        for seed in range(2)
    ]
    made = train_mechanisms(jobs, training=training, validation=None, to_score=held_out)
    losses = np.array([joined_loss(one, held_out) for one in made]).reshape(2, 2).mean(1)
    alone = [roc_auc_score(held_out.labels, one.logits[:, 0]) for one in made]
    assert losses[1] < losses[0] / 2
    assert min(alone) > 0.98


@pytest.mark.slow
def test_long_inputs_of_several_classes_are_refused_before_the_backbone_runs(
    tiny, tmp_path, monkeypatch
):
    training = training_set(tiny, tmp_path / "states", "multiclass", 30, seed=1)
    settings = replace(suggested_settings("readout"), long_inputs=True)
    jobs = [Job(mechanism_spec("readout"), 0, settings)]
    with pytest.raises(SidelightError, match="With 3 classes"):
        train_mechanisms(jobs, training=training, validation=None)
    monkeypatch.setattr(type(tiny), "run", None)
    options = FitOptions(long_inputs=True, cache_root=tmp_path)
    with pytest.raises(SidelightError, match="With 3 classes"):
        fit(tiny, load_examples(rows("multiclass", 60)), None, name="p", options=options)


def variants_of(examples, *, plain=False, disguised=False):
    """The variants, each with its text; they have its labels."""
    shown, sources = with_variants(examples, plain=plain, disguised=disguised)
    assert shown.items[: len(examples)] == examples.items
    np.testing.assert_array_equal(shown.labels[len(examples) :], examples.labels[[*sources]])
    return list(zip(sources, shown.items[len(examples) :], strict=True))


def test_each_text_is_shown_without_a_template(examples):
    assert variants_of(examples) == []
    variants = variants_of(examples, plain=True)
    assert [source for source, _ in variants] == [*range(60)]
    for source, variant in variants:
        assert variant.conversation == PlainText(TEXTS[source])


def test_each_text_is_shown_in_a_disguise_drawn_for_it(examples):
    variants = variants_of(examples, disguised=True)
    assert [source for source, _ in variants] == [*range(60)]
    assert not {variant.text for _, variant in variants} & {*TEXTS}
    # Those of both labels are drawn alike.
    spaced = {source for source, variant in variants if variant.text == " ".join(TEXTS[source])}
    assert 0 < len(spaced) < 60 / len(DISGUISES) * 3
    # A conversation is not disguised.
    several = replace(examples, items=(said("a", "b"),) * 60)
    variants = variants_of(several, plain=True, disguised=True)
    assert [variant.is_plain for _, variant in variants] == [True] * 60


@pytest.mark.slow
def test_the_variants_of_a_text_are_in_its_fold_and_none_is_scored(tiny, examples, tmp_path):
    options = FitOptions(cache_root=tmp_path, augment=True, max_tokens=100, reads=Reads())
    dataset = prepare(tiny, examples, None, options=options)
    assert dataset.validation.examples.content_hash == examples.content_hash
    sources = [*range(60), *range(60)]
    assert sorted(np.concatenate(dataset.folds)) == [*range(len(dataset.training))]
    assert len(sources) == len(dataset.training)
    for fold in dataset.folds:
        own = {sources[row] for row in fold}
        assert {row for row in range(len(sources)) if sources[row] in own} == {*fold.tolist()}
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


class _AskedError(Exception):
    """Holds what ``fit`` was asked for."""


def asked(monkeypatch, module, call):
    """The backbone and the options with which a call trains."""

    def fit(backbone, *_arguments, options, **_named):
        raise _AskedError(backbone, options)

    monkeypatch.setattr(module, "fit", fit)
    with pytest.raises(_AskedError) as found:
        call()
    return found.value.args


def test_the_options_of_both_interfaces_reach_training(tmp_path, monkeypatch):
    data, model = tmp_path / "train.jsonl", saved(tiny_backbone(), tmp_path / "model")
    data.write_text("\n".join(map(json.dumps, rows("binary", 60))))
    line = ["train", "--data", str(data), "--model", model, "--positive", "y"]
    line += ["--out", str(tmp_path / "p")]
    given = ["--augment", "--format", "both", "--scope", "conversation", "--long-inputs"]
    named = {"augment": True, "prompt_format": "both", "scope": "conversation", "long_inputs": True}
    usual = [False, "chat", "each_turn", False]
    for arguments, wanted in (({}, usual), (named, [*named.values()])):
        for module, call in (
            (sidelight.training.fit, lambda a=arguments: run(*line, *(given if a else ()))),
            (classifier, lambda a=arguments: classifier.train(model, data, positive="y", **a)),
        ):
            backbone, options = asked(monkeypatch, module, call)
            scope, prompt_format = options.reads.scope, backbone.encoder.prompt_format
            assert [options.augment, prompt_format, scope, options.long_inputs] == wanted


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


def test_texts_that_no_conversation_can_hold_stay_alone(tiny, examples, tmp_path, monkeypatch):
    whole = type(tiny.encoder).encode_any_length

    def refusing(encoder, messages, response=None):
        if len(messages) > 1:
            raise SidelightError("Only users speak.")
        return whole(encoder, messages, response)

    monkeypatch.setattr(type(tiny.encoder), "encode_any_length", refusing)
    split = split_of(tiny, examples, tmp_path)
    assert all(len(own) == 1 for own in split.states._texts)


def test_texts_stay_by_themselves_where_the_whole_is_judged(tiny, examples, tmp_path):
    # Several classes are judged whole, and so is what has a response.
    intents = replace(examples, labels=np.arange(60) % 3, task=INTENT)
    both = Reads("both", scope="each_turn")
    for given, reads in ((examples, Reads()), (examples, both), (intents, EACH_TURN)):
        split = split_of(tiny, given, tmp_path, reads=reads)
        assert split.states.reads.scope == "conversation"
        assert all(len(own) == 1 for own in split.states._texts)
