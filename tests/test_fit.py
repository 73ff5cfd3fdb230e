"""From examples to the probe that is kept: no text is judged by a probe that has seen it."""

import os
import time
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

import sidelight.training.fit
import wordings
from sidelight.data.examples import LabelledExamples, SpanExamples
from sidelight.data.loading import load_examples
from sidelight.errors import SidelightError
from sidelight.models.conversation import Message, Reads
from sidelight.probes.mechanisms.base import mechanism_spec
from sidelight.statistics.background import Detections
from sidelight.statistics.calibration import fit_calibration
from sidelight.statistics.thresholds import ThresholdRule, choose_thresholds
from sidelight.storage import holding
from sidelight.training import loop
from sidelight.training.dataset import make_split
from sidelight.training.fit import fit, warn_of_none
from sidelight.training.loop import train_mechanisms
from sidelight.training.measuring import calibrate_examples, measure_sources
from sidelight.training.preparing import ProbeDataset, prepare
from sidelight.training.settings import (
    ABANDONED_S,
    Background,
    FitOptions,
    suggested_settings,
)
from sidelight.training.tfidf import warn_of_better_words
from sidelight.training.validation import FOLDS, choose_folds, choose_validation
from worlds.data import planted_rows
from worlds.models import family_backbone

# Two float32 programs of the same sums.
ROUNDING = 1e-4
QUICK = {
    name: suggested_settings(name).changed(seed=3, learning_rate=3e-2, epochs=4, batch_size=16)
    for name in ("readout", "pooling")
}
CANDIDATES = [(mechanism_spec(name), settings) for name, settings in QUICK.items()]


def fitted(tiny, root, texts, validation=None, **options):
    """A fit of the mechanism that is trained in the least time, unless another is named."""
    options = {"mechanism": mechanism_spec("pooling")} | options
    spec = options["mechanism"]
    settings = QUICK["readout" if spec is None else spec.name]
    options = FitOptions(cache_root=root, settings=settings, **options)
    examples = texts if isinstance(texts, LabelledExamples) else load_examples(texts)
    return fit(tiny, examples, validation, name="a", options=options)


@pytest.mark.slow
def test_default_mechanism_is_readout(tiny, tmp_path):
    default = fitted(tiny, tmp_path, planted_rows("multiclass", 60), mechanism=None)
    named = fitted(
        tiny, tmp_path, planted_rows("multiclass", 60), mechanism=mechanism_spec("readout")
    )
    assert default.probe.card.mechanism == named.probe.card.mechanism == mechanism_spec("readout")
    np.testing.assert_array_equal(default.losses, named.losses)


def test_detections_are_reported_per_source(tiny, tmp_path):
    texts = [
        {**row, "source": ("mails: of May", "calls", None)[i % 3]}
        for i, row in enumerate(planted_rows("binary", 60))
    ]
    examples = load_examples(texts)
    chances = np.random.default_rng(0).random((60, 1))
    told = measure_sources(examples, chances, (0.4,))
    assert [*told] == ["calls", "mails"]
    for source, remainder in (("mails", 0), ("calls", 1)):
        is_source = np.arange(60) % 3 == remainder
        holds, flags = examples.labels == 1, chances[:, 0] >= 0.4
        assert told[source] == Detections(
            positives=(is_source & holds).sum(),
            found=(is_source & holds & flags).sum(),
            negatives=(is_source & ~holds).sum(),
            flagged=(is_source & ~holds & flags).sum(),
        )
    assert not measure_sources(examples, chances, ())
    documents = load_examples([{**row, "source": f"page {i}"} for i, row in enumerate(texts)])
    assert not measure_sources(documents, chances, (0.4,))
    counted = fitted(tiny, tmp_path, examples).probe.card.training.validation.sources
    assert {name: (n.positives, n.negatives) for name, n in counted.items()} == {
        name: (n.positives, n.negatives) for name, n in told.items()
    }


def test_clearly_better_word_baseline_triggers_warning(warned):
    examples = load_examples(planted_rows("binary", 400))
    warned()
    few = examples.select([*np.flatnonzero(examples.labels == 0), *range(6)])
    losses, noise = np.random.default_rng(0).normal(size=(2, 400))
    noise = (noise - noise.mean()) / noise.std()
    for gain, told in ((0.75, 0), (3, 1)):
        words = losses + noise - gain / 20
        warn_of_better_words(losses, words, examples)
        assert len(warned()) == told
    warn_of_better_words(losses[: len(few)], losses[: len(few)] - 1, few)
    assert warned() == []


def test_different_trainings_use_different_state_folders(tiny, tmp_path, monkeypatch):
    folders: list[object] = []

    def prepare(*_texts, options, **_named):
        folders.append(options.cache_root)
        raise SidelightError("asked")

    monkeypatch.setattr(sidelight.training.fit, "prepare", prepare)
    variants = ({}, {"threshold": ThresholdRule("fpr", 0.1)}, {"calibration": "none"})
    variants += ({"reads": Reads(template=False)}, {"mechanism": mechanism_spec("readout")})
    for backbone, options in [
        *((tiny, variant) for variant in variants),
        (family_backbone("qwen3"), {}),
    ]:
        with pytest.raises(SidelightError, match="asked"):
            fitted(backbone, tmp_path, planted_rows("binary", 40), **options)
    with pytest.raises(SidelightError, match="asked"):
        fitted(tiny, tmp_path, planted_rows("binary", 40))
    assert len({*folders}) == len(folders) - 1 == 6
    assert folders[-1] == folders[0]


@pytest.fixture(scope="module")
def dataset(tiny, tmp_path_factory):
    examples = load_examples(planted_rows("binary", 40))
    options = FitOptions(max_tokens=512, cache_root=tmp_path_factory.mktemp("activations"))
    split = make_split(tiny, examples, options)
    return ProbeDataset(tiny, split, choose_folds(examples))


@pytest.fixture(scope="module")
def folds(dataset):
    return choose_folds(dataset.training.examples)


def cross_fitted_on(training, folds, **options):
    return train_mechanisms(CANDIDATES, split=training, left_out=folds, **options)


@pytest.fixture(scope="module")
def cross_fitted(dataset, folds):
    return cross_fitted_on(dataset.training, folds)


@pytest.mark.slow
def test_cross_fitted_scores_are_out_of_fold(dataset, folds, cross_fitted):
    assert len(folds) == FOLDS
    fold, rest = (
        folds[1],
        np.concatenate([each_fold for each_fold in folds if each_fold is not folds[1]]),
    )
    labels = dataset.training.labels.copy()
    labels[fold] = 1 - labels[fold]
    examples = replace(dataset.training.examples, labels=labels)
    changed = replace(dataset.training, examples=examples)
    for before, after in zip(cross_fitted, cross_fitted_on(changed, folds), strict=True):
        np.testing.assert_array_equal(before.logits[fold], after.logits[fold])
        assert not np.isclose(before.logits[rest], after.logits[rest]).all()


@pytest.mark.slow
def test_shared_and_separate_fold_projections_give_same_logits(
    dataset, folds, cross_fitted, monkeypatch
):
    widths: list[int] = []
    project = loop.project_runs

    def counted(shard, runs, **options):
        widths.append(len(runs))
        return project(shard, runs, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "project_runs", counted)
        sharing = cross_fitted_on(dataset.training, folds, shares_matmuls=True)
    assert max(widths) > 1
    monkeypatch.setattr(loop, "_MOST_PROJECTIONS", 1)
    separate = cross_fitted_on(dataset.training, folds)
    for together, shared, apart in zip(cross_fitted, sharing, separate, strict=True):
        np.testing.assert_allclose(together.logits, apart.logits, atol=ROUNDING)
        np.testing.assert_allclose(shared.logits, apart.logits, atol=ROUNDING)


@pytest.mark.slow
def test_final_probe_trains_on_all_texts_for_all_epochs(dataset, cross_fitted):
    expected = train_mechanisms(CANDIDATES, split=dataset.training)
    for one, separate in zip(cross_fitted, expected, strict=True):
        assert one.best_epoch == one.settings.epochs
        assert one.validation_scores == []
        for name, parameter in separate.mechanism.state_dict().items():
            assert one.mechanism.state_dict()[name].equal(parameter)


@pytest.mark.slow
def test_few_texts_are_cross_fitted_without_validation_set(tiny, tmp_path, capsys):
    few = load_examples(planted_rows("multiclass", 60))
    fitted_probe = fitted(tiny, tmp_path, few, mechanism=mechanism_spec("readout"))
    record = fitted_probe.probe.card.training
    # One bar for all folds.
    assert capsys.readouterr().err.count("Training:   0%") == 1
    assert (record.folds, record.training.rows) == (FOLDS, 60)
    assert record.validation.rows == 60
    assert fitted_probe.report.to_dict()["accuracy"]["value"] > 0.6
    validation = load_examples(planted_rows("multiclass", 40, seed=1), task=few.task)
    record = fitted(tiny, tmp_path, few, validation).probe.card.training
    assert (record.folds, record.validation.rows) == (0, 40)


@pytest.mark.parametrize("is_cross_fitted", [True, False])
def test_report_uses_out_of_fold_calibration(dataset, folds, is_cross_fitted):
    labels = dataset.training.labels
    logits = np.random.default_rng(0).normal(size=(len(labels), 1)) + labels[:, None]
    examples = dataset.validation.examples
    calibrated = calibrate_examples(logits, examples, folds if is_cross_fitted else ())
    served, probabilities, report = (
        calibrated.calibration,
        calibrated.probabilities,
        calibrated.report,
    )
    # Not those of all rows, which the probe is served with.
    assert served == fit_calibration("platt", logits, labels, dataset.task)
    folds_of_texts = folds if is_cross_fitted else dataset.training.examples.folds(FOLDS, seed=0)
    right = []
    for fold in folds_of_texts:
        rest = np.setdiff1d(np.arange(len(labels)), fold)
        calibration = fit_calibration("platt", logits[rest], labels[rest], dataset.task)
        chance = calibration.apply(logits[fold])
        np.testing.assert_array_equal(probabilities[fold], chance)
        known = calibration.apply(logits[rest])
        (threshold,) = choose_thresholds(dataset.task, known, labels[rest])
        right += list((chance[:, 0] >= threshold) == labels[fold])
    assert report.metrics["accuracy"].value == pytest.approx(np.mean(right))
    every = served.apply(logits)
    assert report.thresholds == choose_thresholds(dataset.task, every, labels)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["f1", "recall=0.99"])
def test_thresholds_follow_rule_and_artifact_stores_curve(tiny, tmp_path, rule):
    wanted = ThresholdRule.parse(rule)
    probe = fitted(tiny, tmp_path, planted_rows("binary", 60), threshold=wanted).probe
    stored = probe.card.training.validation
    (curve,) = probe.card.training.curves.values()
    assert probe.card.training.threshold_rule == rule
    assert probe.thresholds == (curve.threshold(wanted),)
    assert curve.positives + curve.negatives == stored.rows == 60


def test_threshold_rule_for_multiclass_is_refused_before_extraction(tiny, tmp_path):
    with pytest.raises(SidelightError, match=wordings.NO_THRESHOLD):
        fitted(tiny, tmp_path, planted_rows("multiclass", 60), threshold=ThresholdRule("fpr", 0.01))
    assert not list(tmp_path.iterdir())


def test_many_texts_or_few_distinct_ones_are_not_cross_fitted():
    assert choose_folds(load_examples(planted_rows("binary", 1000))) == ()
    repeated = [{"text": "ab"[number % 2], "label": number % 2} for number in range(60)]
    assert choose_folds(load_examples(repeated)) == ()


@pytest.mark.slow
def test_single_character_texts_train_probe(tiny, tmp_path, warned):
    texts = load_examples(
        [{"text": character, "label": character} for character in "👍👎🤷" for _ in range(2)]
    )
    fitted_probe = fitted(tiny, tmp_path, texts, texts)
    assert fitted_probe.baseline.metrics["accuracy"].value == 1.0
    assert any("the metrics are too optimistic" in warning for warning in warned())


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_too_few_distinct_texts_are_refused(tiny, tmp_path, kind):
    alike = [row for row in planted_rows(kind, 9)[:3] for _ in range(20)]
    with pytest.raises(SidelightError, match=wordings.TOO_FEW_DISTINCT):
        fitted(tiny, tmp_path, alike)


def test_only_one_data_set_with_spans_is_refused():
    texts = load_examples(planted_rows("binary", 40))
    spans = SpanExamples(**vars(texts), spans=((),) * len(texts))
    for training, validation in ((spans, texts), (texts, spans)):
        with pytest.raises(SidelightError, match=wordings.ONE_SET_WITH_SPANS):
            choose_validation(training, validation, FitOptions())


def test_fewer_texts_than_folds_need_are_refused(tiny, tmp_path):
    wanted = wordings.TOO_FEW_TO_TRAIN.format(got=9, each=FOLDS, all=2 * FOLDS)
    with pytest.raises(SidelightError, match=wanted):
        fitted(tiny, tmp_path, planted_rows("binary", 9))


@pytest.mark.slow
@pytest.mark.parametrize("count", range(10, 16))
def test_few_multiclass_texts_train_probe_with_none_class(tiny, tmp_path, count, warned):
    background = Background(tuple((Message("user", f"Hello {i}."),) for i in range(10)))
    fitted_probe = fitted(tiny, tmp_path, planted_rows("multiclass", count), background=background)
    assert fitted_probe.probe.task.abstains
    # A class of all the rest looks like background traffic.
    report = replace(fitted_probe.report, confusion_matrix=np.diag([9, 9, 9, 0]))
    warned()
    warn_of_none(replace(fitted_probe, report=report))
    assert warned() == []
    report.confusion_matrix[1, 3] = 4
    warn_of_none(replace(fitted_probe, report=report))
    (told,) = warned()
    assert "4 of 31 labelled texts" in told
    assert f"'{fitted_probe.probe.task.labels[1]}' (4)" in told
    assert "none=false" in told


@pytest.mark.slow
def test_held_out_split_of_few_texts_triggers_warning(tiny, tmp_path, warned):
    rare = [{"text": f"rare {number}", "label": "z"} for number in range(4)]
    few = load_examples([*planted_rows("binary", 40), *rare])
    fitted_probe = fitted(tiny, tmp_path, few)
    record = fitted_probe.probe.card.training
    assert record.folds == 0
    assert record.training.rows < len(few)
    # Later, the texts are recognised as those that trained the probe.
    assert record.training.input_sha256 == few.content_hash
    assert any("'z' has 4 texts or duplicates" in warning for warning in warned())


def test_training_hash_covers_everything_that_affects_probe(tiny):
    texts = load_examples(planted_rows("binary", 40))
    names = {"name": "a", "model": tiny.fingerprint, "engine": "transformers"}
    first = FitOptions().training_sha256(texts, None, **names)
    changed = {
        "mechanism": mechanism_spec("pooling"),
        "settings": suggested_settings("pooling"),
        "reads": Reads(side="response"),
        "background": Background(((Message("user", "Hello"),),)),
        "context_tokens": 9,
        "none": False,
        "calibration": "platt",
        "threshold": ThresholdRule.parse("fpr=0.01"),
        "max_tokens": 99,
        "states": "whole",
        "early_exit": True,
    }
    elsewhere = {"cache_root": Path("elsewhere"), "keep_cache": True, "memory_bytes": 1}
    assert {field.name for field in fields(FitOptions)} == changed.keys() | elsewhere.keys()
    hashes = [
        FitOptions(**{option: value}).training_sha256(texts, None, **names)
        for option, value in changed.items()
    ]
    changes = {
        "name": "b",
        "model": replace(tiny.fingerprint, dtype="float16"),
        "engine": "vllm",
    }
    for key, value in changes.items():
        hashes.append(FitOptions().training_sha256(texts, None, **{**names, key: value}))
    hashes.append(FitOptions().training_sha256(texts, texts, **names))
    weighted = replace(texts, weights=np.full(len(texts), 2.0))
    hashes.append(FitOptions().training_sha256(weighted, None, **names))
    assert len({first, *hashes}) == 1 + len(hashes)
    assert FitOptions(**elsewhere).training_sha256(texts, None, **names) == first


def test_only_states_of_abandoned_trainings_are_removed(tmp_path, capsys):
    options = FitOptions(cache_root=tmp_path)
    old, live, recent = (options.states_folder(name) for name in ("old", "live", "recent"))
    named = tmp_path / "run-experiments"
    for folder in (old, live, recent, named):
        (folder / "states").mkdir(parents=True)
        for path in (folder, folder / "states"):
            age = 0 if folder == recent else ABANDONED_S + 60
            os.utime(path, (time.time() - age,) * 2)
    with holding(live), options.temporary_states("new") as states:
        assert {*tmp_path.iterdir()} == {live, recent, named, states}
    assert {*tmp_path.iterdir()} == {live, recent, named}
    message = "Removed the hidden states of 1 abandoned training runs, unused for 7 days.\n"
    assert capsys.readouterr().err == message
    # A training that fails goes on with what it has.
    with pytest.raises(ZeroDivisionError), options.temporary_states("new"):
        raise ZeroDivisionError
    assert not states.exists()
    (states / "written").mkdir(parents=True)
    with pytest.raises(ZeroDivisionError), options.temporary_states("new"):
        raise ZeroDivisionError
    assert (states / "written").is_dir()


def test_concurrent_equal_trainings_share_states_until_both_end(tmp_path):
    options = FitOptions(cache_root=tmp_path)
    with options.temporary_states("same") as states:
        with options.temporary_states("same"):
            pass
        assert states.is_dir()
    assert not states.exists()


ROWS = planted_rows("binary", 40)
WITH_SYSTEM_PROMPT = [
    {"text": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": row["text"]}]}
    | {"label": row["label"]}
    for row in ROWS
]
WITH_SPANS = [
    {"text": f"Ada: {row['text']}", "spans": [{"start": 0, "end": 3, "label": "NAME"}] * (i % 2)}
    for i, row in enumerate(ROWS)
]


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(ROWS, {}), (WITH_SYSTEM_PROMPT, {}), (WITH_SPANS, {"spans": "spans"})],
    ids=["texts", "system prompts", "spans"],
)
def test_preparing_encodes_each_text_once(tiny, tmp_path, monkeypatch, rows, columns):
    encoded = Counter[tuple[str, ...]]()
    encode = tiny.encoder.encode_any_length

    def counted(messages, response=None, **keywords):
        encoded[tuple(message.content for message in messages)] += 1
        return encode(messages, response, **keywords)

    monkeypatch.setattr(tiny.encoder, "encode_any_length", counted)
    background = Background(((Message("user", "Tell me about the weather in Oslo."),),) * 8)
    examples = load_examples(rows, **columns)
    options = FitOptions(cache_root=tmp_path, background=background, context_tokens=300)
    dataset = prepare(tiny, examples, None, options=options.resolved_for(examples))
    # Places would take several times the memory of the prompts.
    assert not any(prompt.places for prompt in dataset.training.states.prompts)
    texts = [tuple(message.content for message in item.messages) for item in examples.items]
    assert {encoded[text] for text in texts} == {1}
