"""The other forms in which training shows a text."""

import json
from dataclasses import replace

import numpy as np
import pytest

import sidelight.training.classifier
import sidelight.training.fit
from commands import run, saved
from sidelight.bank import Bank
from sidelight.data.examples import Example, LabelledExamples
from sidelight.disguises import DISGUISES
from sidelight.prompts import Message, PlainText, Reads
from sidelight.states.extraction import score
from sidelight.training.dataset import prepare
from sidelight.training.settings import FitOptions
from sidelight.training.variants import with_variants
from tiny import TOXICITY, tiny_backbone, untrained_probe

TEXTS = [f"number {i} has a text of its own" for i in range(60)]


def said(*turns):
    return Example(tuple(Message("user", turn) for turn in turns))


@pytest.fixture
def examples():
    items = tuple(map(said, TEXTS))
    return LabelledExamples(items, ({},) * 60, labels=np.arange(60) % 3 % 2, task=TOXICITY)


def variants_of(examples, *, plain=False, disguised=False):
    """The variants, each with its text; they have its labels."""
    shown, sources = with_variants(examples, plain=plain, disguised=disguised)
    assert shown.items[: len(examples)] == examples.items
    np.testing.assert_array_equal(shown.labels[len(examples) :], examples.labels[[*sources]])
    return list(zip(sources, shown.items[len(examples) :], strict=True))


def test_none_are_made_where_none_are_wanted(examples):
    assert variants_of(examples) == []


def test_each_text_is_shown_without_a_template(examples):
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


def test_a_conversation_is_not_disguised(examples):
    several = replace(examples, items=(said("a", "b"),) * 60)
    variants = variants_of(several, plain=True, disguised=True)
    assert [variant.is_plain for _, variant in variants] == [True] * 60


def test_the_variants_of_a_text_are_in_its_fold_and_none_is_scored(tiny, examples, tmp_path):
    options = FitOptions(cache_root=tmp_path, augment=True)
    dataset = prepare(tiny, examples, None, options=options)
    assert dataset.validation.examples.content_hash == examples.content_hash
    sources = [*range(60), *range(60)]
    assert sorted(np.concatenate(dataset.folds)) == [*range(len(dataset.training))]
    assert len(sources) == len(dataset.training)
    for fold in dataset.folds:
        own = {sources[row] for row in fold}
        assert {row for row in range(len(sources)) if sources[row] in own} == {*fold.tolist()}


def test_a_probe_of_both_formats_learns_from_both(examples, tmp_path):
    backbone = tiny_backbone(prompt_format="both")
    dataset = prepare(backbone, examples, None, options=FitOptions(cache_root=tmp_path))
    shown = [prompt.is_plain for prompt in dataset.training.prompts]
    assert shown.count(True) == 60
    assert not any(prompt.is_plain for prompt in dataset.validation.prompts)


def test_variants_that_are_cut_are_counted(tiny, examples, tmp_path):
    options = FitOptions(cache_root=tmp_path, augment=True, max_tokens=100, reads=Reads())
    dataset = prepare(tiny, examples, None, options=options)
    cut = sum(prompt.dropped > 0 for prompt in dataset.training.prompts)
    assert cut
    assert any(f"{cut} of 120 texts were cut" in warning for warning in dataset.warnings)


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
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)]
    data.write_text("\n".join(map(json.dumps, rows)))
    line = ["train", "--data", str(data), "--model", model, "--out", str(tmp_path / "p")]
    given = ["--augment", "--format", "both", "--scope", "conversation"]
    named = {"augment": True, "prompt_format": "both", "scope": "conversation"}
    for arguments, wanted in (({}, (False, "chat", "each_turn")), (named, tuple(named.values()))):
        calls = {
            sidelight.training.fit: lambda a=arguments: run(*line, *(given if a else ())),
            sidelight.training.classifier: lambda a=arguments: sidelight.training.classifier.train(
                model, data, **a
            ),
        }
        for module, call in calls.items():
            backbone, options = asked(monkeypatch, module, call)
            found = (options.augment, backbone.encoder.prompt_format, options.reads.scope)
            assert found == wanted


def test_a_probe_of_chats_alone_says_nothing_of_plain_text(tiny):
    probes = [untrained_probe(tiny, "p"), replace(untrained_probe(tiny, "q"), prompt_format="both")]
    prompts = [
        tiny.encoder.encode(said("a text").messages),
        tiny.encoder.encode(PlainText("a text")),
    ]
    of_chats, of_both = score(tiny, Bank(probes), prompts)
    assert [*np.isfinite(of_chats[:, 0])] == [True, False]
    assert np.isfinite(of_both).all()
