"""Few texts: all of them train the probe, and none is judged by a probe that has seen it."""

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest

from corpora import rows
from sidelight.calibration import fit_calibration
from sidelight.data.loading import load_examples
from sidelight.errors import SidelightError
from sidelight.mechanisms.base import mechanism_spec
from sidelight.thresholds import ThresholdRule, choose_thresholds, read_curves
from sidelight.training import loop
from sidelight.training.dataset import FOLDS, ProbeDataset, choose_folds, make_split
from sidelight.training.fit import calibrate, cross_fit, fit
from sidelight.training.loop import train_mechanisms
from sidelight.training.settings import FitOptions, Job, suggested_settings

# Two float32 programs of the same sums.
ROUNDING = 1e-4


QUICK = {
    name: suggested_settings(name).changed(learning_rate=3e-2, epochs=4, batch_size=16)
    for name in ("readout", "pooling")
}
JOBS = [Job(mechanism_spec(name), 3, settings) for name, settings in QUICK.items()]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    examples = load_examples(rows("binary", 40))
    split = make_split(
        tiny,
        examples,
        FitOptions(max_tokens=512, cache_root=tmp_path_factory.mktemp("activations")),
    )
    return ProbeDataset(tiny, split, split)


@pytest.fixture(scope="module")
def folds(whole):
    return choose_folds(whole.training.examples)


@pytest.fixture(scope="module")
def cross_fitted(whole, folds):
    return cross_fit(JOBS, whole, folds)


@pytest.mark.slow
def test_no_text_teaches_the_mechanism_that_judges_it(whole, folds, cross_fitted):
    assert len(folds) == FOLDS
    fold, rest = folds[1], np.concatenate([own for own in folds if own is not folds[1]])
    labels = whole.training.labels.copy()
    labels[fold] = 1 - labels[fold]
    examples = replace(whole.training.examples, labels=labels)
    changed = replace(whole, training=replace(whole.training, examples=examples))
    for before, after in zip(cross_fitted, cross_fit(JOBS, changed, folds), strict=True):
        np.testing.assert_array_equal(before.logits[fold], after.logits[fold])
        assert not np.isclose(before.logits[rest], after.logits[rest]).all()


@pytest.mark.slow
def test_folds_that_are_not_projected_together_give_the_same(
    whole, folds, cross_fitted, monkeypatch
):
    monkeypatch.setattr(loop, "_MOST_COLUMNS", 1)
    for together, apart in zip(cross_fitted, cross_fit(JOBS, whole, folds), strict=True):
        np.testing.assert_allclose(together.logits, apart.logits, atol=ROUNDING)


@pytest.mark.slow
def test_the_probe_itself_is_trained_on_all_texts_for_every_epoch(whole, cross_fitted):
    expected = train_mechanisms(JOBS, training=whole.training, validation=None)
    for one, alone in zip(cross_fitted, expected, strict=True):
        assert one.best_epoch == one.job.settings.epochs
        assert one.history == ()
        for name, parameter in alone.mechanism.state_dict().items():
            assert one.mechanism.state_dict()[name].equal(parameter)


@pytest.mark.slow
def test_few_texts_are_cross_fitted_unless_validation_texts_are_given(tiny, own_cache, capsys):
    few, more = load_examples(rows("multiclass", 60)), rows("multiclass", 40, seed=1)
    options = FitOptions(mechanisms=(mechanism_spec("readout"),), settings=QUICK)
    made = fit(tiny, few, None, name="a", options=options)
    record = made.best.probe.record
    said = capsys.readouterr().err
    # One bar for all folds.
    assert said.count("\nTraining: ") == 1
    assert (record["folds"], record["training"]["rows"]) == (FOLDS, 60)
    assert record["validation"]["rows"] == 60
    assert made.best.report.to_dict()["accuracy"]["value"] > 0.6
    given = load_examples(more, task=few.task)
    record = fit(tiny, few, given, name="a", options=options).best.probe.record
    assert (record["folds"], record["validation"]["rows"]) == (0, 40)


@pytest.mark.parametrize("is_cross_fitted", [True, False])
def test_no_text_is_measured_by_what_it_calibrated(whole, folds, is_cross_fitted):
    dataset = replace(whole, folds=folds) if is_cross_fitted else whole
    labels = whole.training.labels
    logits = np.random.default_rng(0).normal(size=(len(labels), 1)) + labels[:, None]
    made = calibrate(logits, dataset)
    # Not those of all rows, which the probe is served with.
    assert made.calibration == fit_calibration("platt", logits, labels, whole.task)
    own = folds if is_cross_fitted else whole.training.examples.folds(FOLDS, seed=0)
    right = []
    for fold in own:
        rest = np.setdiff1d(np.arange(len(labels)), fold)
        calibration = fit_calibration("platt", logits[rest], labels[rest], whole.task)
        chance = calibration.apply(logits[fold])
        np.testing.assert_array_equal(made.probabilities[fold], chance)
        known = calibration.apply(logits[rest])
        (threshold,) = choose_thresholds(whole.task, known, labels[rest])
        right += list((chance[:, 0] >= threshold) == labels[fold])
    assert made.report.metrics["accuracy"].value == pytest.approx(np.mean(right))
    every = made.calibration.apply(logits)
    assert made.report.thresholds == choose_thresholds(whole.task, every, labels)


@pytest.mark.parametrize("rule", ["f1", "recall=0.99", "cost=1:20"])
def test_thresholds_follow_the_rule_and_the_artifact_has_their_curve(tiny, tmp_path, rule):
    wanted = ThresholdRule.parse(rule)
    options = FitOptions(
        mechanisms=(mechanism_spec("pooling"),),
        settings=QUICK,
        cache_root=tmp_path,
        threshold=wanted,
    )
    probe = fit(tiny, load_examples(rows("binary", 60)), None, name="a", options=options).best.probe
    stored = probe.record["validation"]
    (curve,) = read_curves(stored["curves"]).values()
    assert probe.record["threshold_rule"] == rule
    assert probe.thresholds == (curve.threshold(wanted),)
    assert curve.positives + curve.negatives == stored["rows"] == 60
    assert next(iter(stored["priors"].values())) == pytest.approx(curve.expected[-1] / 60, abs=1e-4)


def test_a_rule_for_several_classes_is_refused_before_the_texts_are_read(tiny, tmp_path):
    options = FitOptions(threshold=ThresholdRule("fpr", 0.01), cache_root=tmp_path)
    with pytest.raises(SidelightError, match="Leave --threshold out"):
        fit(tiny, load_examples(rows("multiclass", 60)), None, name="a", options=options)
    assert not list(tmp_path.iterdir())


def test_many_texts_or_a_rare_class_are_not_cross_fitted():
    assert choose_folds(load_examples(rows("binary", 1000))) == ()
    rare = [{"text": str(number), "label": "ab"[number < 4]} for number in range(60)]
    assert choose_folds(load_examples(rare)) == ()
    repeated = [{"text": "ab"[number % 2], "label": number % 2} for number in range(60)]
    assert choose_folds(load_examples(repeated)) == ()


@pytest.mark.parametrize("marks", ["ABC", "👍👎🤷"])
def test_texts_without_a_word_of_two_characters_train_a_probe(tiny, tmp_path, marks):
    texts = [{"text": mark, "label": mark} for mark in marks for _ in range(2)]
    options = FitOptions(
        mechanisms=(mechanism_spec("pooling"),), settings=QUICK, cache_root=tmp_path
    )
    texts = load_examples(texts)
    made = fit(tiny, texts, texts, name="marks", options=options)
    assert made.baseline.metrics["accuracy"].value == 1.0
    assert any("the figures are flattering" in warning for warning in made.warnings)


def test_a_baseline_that_fails_costs_no_training(tiny, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise SidelightError("no baseline")

    monkeypatch.setattr("sidelight.training.fit.fit_tfidf", refuse)
    module = import_module("sidelight.training.fit")
    monkeypatch.setattr(module, "cross_fit", lambda *_: pytest.fail("probes were trained"))
    options = FitOptions(
        mechanisms=(mechanism_spec("pooling"),), settings=QUICK, cache_root=tmp_path
    )
    with pytest.raises(SidelightError, match="no baseline"):
        fit(tiny, load_examples(rows("binary", 40)), None, name="x", options=options)


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_texts_of_which_none_can_be_held_out_are_refused(tiny, tmp_path, kind):
    alike = [row for row in rows(kind, 9)[:3] for _ in range(20)]
    options = FitOptions(cache_root=tmp_path)
    with pytest.raises(SidelightError, match="Too few distinct texts to hold some of each"):
        fit(tiny, load_examples(alike), None, name="alike", options=options)


def test_few_texts_that_are_held_out_from_say_so(tiny, tmp_path):
    few = [*rows("binary", 40), *({"text": f"rare {n}", "label": "z"} for n in range(4))]
    options = FitOptions(
        mechanisms=(mechanism_spec("pooling"),), settings=QUICK, cache_root=tmp_path
    )
    made = fit(tiny, load_examples(few), None, name="rare", options=options)
    assert made.best.probe.record["folds"] == 0
    assert any("'z' has 4, or some" in warning for warning in made.warnings)
