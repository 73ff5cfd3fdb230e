"""A probe follows new traffic without training, and says what it was recalibrated on."""

from dataclasses import replace
from datetime import UTC, datetime
from functools import cache

import numpy as np
import pytest

import wordings
from sidelight.data.evaluation import Estimate
from sidelight.data.examples import Example, Examples, LabelledExamples
from sidelight.errors import SidelightError
from sidelight.models.conversation import Message
from sidelight.probes.artifact import load_probe, save_probe
from sidelight.probes.card import (
    CalibrationTexts,
    JudgeFit,
    Texts,
    TrainingRecord,
    TrainingTexts,
    read_card,
    summary,
)
from sidelight.probes.probe import Probe
from sidelight.statistics.calibration import fit_calibration, suggested_calibration
from sidelight.statistics.metrics import log_losses
from sidelight.statistics.thresholds import F1, ThresholdRule, choose_thresholds, operating_curves
from sidelight.training.measuring import (
    describe_examples,
    text_hashes,
    trained_texts,
    warn_of_trained_texts,
)
from sidelight.training.recalibration import recalibrate
from sidelight.types import Task
from worlds.models import INTENT, TOPICS, TOXICITY, tiny_backbone, untrained_probe

TASKS = [TOXICITY, INTENT, TOPICS]
every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)


def drawn(task: Task, texts: int, *, share: float, seed: int, size: float = 2.0):
    """Logits, and labels of which ``share`` are positive, or of the last class."""
    generator = np.random.default_rng(seed)
    if task.kind == "multiclass":
        rest = (1 - share) / (len(task.labels) - 1)
        shares = [rest] * (len(task.labels) - 1) + [share]
        labels = generator.choice(len(task.labels), size=texts, p=shares)
        means = 2 * np.eye(len(task.labels))[labels]
    else:
        labels = (generator.random((texts, task.outputs)) < share).astype(int)
        means = 2.0 * labels - 1
        labels = labels[:, 0] if task.kind == "binary" else labels
    return size * (means + generator.normal(size=means.shape)), labels


def unlabelled(count: int) -> Examples:
    items = tuple(Example((Message("user", f"text {i}"),)) for i in range(count))
    return Examples(items, ({},) * count)


def texts_of(task: Task, labels: np.ndarray) -> LabelledExamples:
    texts = unlabelled(len(labels))
    return LabelledExamples(texts.items, texts.rows, task=task, labels=labels)


@cache
def trained(task: Task = TOXICITY, rule: ThresholdRule = F1) -> Probe:
    """A probe that was calibrated on 600 texts, of which 30 % are positive."""
    logits, labels = drawn(task, 600, share=0.3, seed=0)
    calibration = fit_calibration(suggested_calibration(task), logits, labels, task)
    probabilities = calibration.apply(logits)
    description = describe_examples(texts_of(task, labels)).model_dump()
    curves = operating_curves(task, probabilities, labels)
    return untrained_probe(tiny_backbone(), "probe", task=task).changed(
        calibration=calibration,
        thresholds=choose_thresholds(task, probabilities, labels, rule=rule),
        training=TrainingRecord(
            validation=CalibrationTexts(**description, curves=curves), threshold_rule=str(rule)
        ),
    )


def trained_on(probe: Probe, **texts: str) -> Probe:
    """The probe with a record of the texts that trained it."""
    record = {"training": TrainingTexts(**texts)}
    return probe.changed(training=probe.card.training.model_copy(update=record))


@pytest.mark.parametrize("hashed", ["sha256", "input_sha256"])
def test_recalibration_rejects_texts_probe_was_trained_on(hashed):
    logits, labels = drawn(TOXICITY, 600, share=0.3, seed=0)
    seen = texts_of(TOXICITY, labels)
    probe = trained_on(trained(), **{hashed: seen.content_hash})
    with pytest.raises(SidelightError, match=wordings.TRAINED_ON_THESE):
        recalibrate(probe, seen, logits)


def test_recalibration_warns_about_overlap_with_training_texts(warned):
    logits, labels = drawn(TOXICITY, 600, share=0.3, seed=0)
    seen = texts_of(TOXICITY, labels)
    probe = trained_on(trained(), texts=text_hashes(seen.select(range(500))))
    order = np.random.default_rng(0).permutation(500)
    with pytest.raises(SidelightError, match=wordings.TRAINED_ON_THESE):
        recalibrate(probe, seen.select(order), logits[order])
    some = np.arange(350, 600)
    warning = (
        "150 of 250 texts were used in training, so the metrics are too optimistic. "
        "Leave these texts out."
    )
    warn_of_trained_texts(probe.card.training, seen.select(some))
    assert warned() == [warning]
    recalibrate(probe, seen.select(some), logits[some])
    assert warning in warned()
    # Older probes do not know their texts.
    warn_of_trained_texts(TrainingRecord(), seen)
    assert warned() == []


def test_trained_texts_match_by_normalised_text_and_response():
    def asked(text: str, response: str | None = None) -> Examples:
        return Examples((Example((Message("user", text),), response),), ({},))

    texts = text_hashes(asked("How are you?", "Fine."))
    assert len(texts) == 8
    assert "Fine" not in texts
    record = TrainingRecord(training=TrainingTexts(texts=texts))
    assert trained_texts(record, asked("how  are you?", " fine.")) == 1
    exchanges = [("How are you?", None), ("How are you?", "No."), ("How are you", "Fine.")]
    assert [trained_texts(record, asked(*exchange)) for exchange in exchanges] == [0, 0, 0]


@every_task
def test_recalibration_fits_calibration_and_thresholds_as_training_does(task):
    rule = F1 if task.kind == "multiclass" else ThresholdRule("recall", 0.9)
    probe = trained(task, rule)
    logits, labels = drawn(task, 300, share=0.2, seed=1, size=8.0)
    recalibrated = recalibrate(probe, texts_of(task, labels), logits)
    kind, had = suggested_calibration(task), probe.calibration.scale
    expected = fit_calibration(kind, logits, labels, task, around=had)
    assert recalibrated.probe.calibration == expected
    known = expected.apply(logits)
    assert recalibrated.probe.thresholds == choose_thresholds(task, known, labels, rule=rule)
    fresh, truth = drawn(task, 3000, share=0.2, seed=2, size=8.0)
    before, after = (
        log_losses(task, one.calibration.apply(fresh), truth).mean()
        for one in (probe, recalibrated.probe)
    )
    assert after < before


def test_recalibration_without_texts_moves_thresholds_along_stored_curve():
    probe = trained(TOPICS)
    rule = ThresholdRule("cost", 20.0)
    recalibrated = recalibrate(probe, rule=rule).probe
    logits, labels = drawn(TOPICS, 600, share=0.3, seed=0)
    known = probe.calibration.apply(logits)
    assert recalibrated.thresholds == choose_thresholds(TOPICS, known, labels, rule=rule)
    assert recalibrated.calibration == probe.calibration
    assert recalibrate(recalibrated).probe.thresholds == recalibrated.thresholds
    again = recalibrate(recalibrated, rule=F1).probe
    assert len(again.card.training.recalibrations) == 2
    assert again.thresholds == probe.thresholds


def test_negatives_of_stored_curve_suffice_for_false_positive_rate(warned):
    recalibrate(trained(), rule=ThresholdRule("fpr", 0.05))
    assert not warned()


def test_recalibrated_probe_records_its_recalibration(tmp_path):
    old = load_probe(save_probe(trained(), tmp_path / "old"))
    logits, labels = drawn(TOXICITY, 200, share=0.1, seed=1)
    examples = texts_of(TOXICITY, labels)
    rule = ThresholdRule("fpr", 0.05)
    recalibrated = recalibrate(old, examples, logits, rule=rule)
    new = load_probe(save_probe(recalibrated.probe, tmp_path / "new"))
    assert new.version not in ("", old.version)
    for name, value in old.mechanism.state_dict().items():
        assert value.equal(new.mechanism.state_dict()[name])
    record = new.card.training
    assert record.validation == old.card.training.validation
    (entry,) = record.recalibrations
    assert entry.date == datetime.now(UTC).date().isoformat()
    assert (entry.version, entry.thresholds) == (old.version, old.thresholds)
    assert entry.calibration == old.calibration
    assert record.threshold_rule == "fpr=0.05"
    assert (entry.texts.rows, entry.texts.sha256) == (200, examples.content_hash)
    assert entry.before.rows == entry.texts.report.rows == 200
    (curve,) = new.card.training.curves.values()
    assert (curve.positives, curve.negatives) == (labels.sum(), 200 - labels.sum())
    assert curve.threshold(rule) == new.thresholds[0]
    told = summary(read_card(tmp_path / "new"))
    assert told["recalibrated 1"] == f"{entry.date}: {entry.what}"


def test_recalibration_rejects_too_few_texts(warned):
    logits, labels = drawn(TOXICITY, 200, share=0.5, seed=1)
    with pytest.raises(SidelightError, match=wordings.TOO_FEW_LABELLED.format(got=29)):
        recalibrate(trained(), texts_of(TOXICITY, labels[:29]), logits[:29])
    labels[:] = np.arange(200) < 9
    with pytest.raises(
        SidelightError,
        match=wordings.TOO_FEW_OF_CLASS.format(got=200, found=9, label="toxic", wanted=10),
    ):
        recalibrate(trained(), texts_of(TOXICITY, labels), logits)
    labels[9:20] = 1
    recalibrate(trained(), texts_of(TOXICITY, labels), logits)
    assert any(
        "positive validation texts for a reliable threshold: 20 of" in warning
        for warning in warned()
    )


def test_multiclass_probe_cannot_be_recalibrated_without_texts():
    with pytest.raises(SidelightError, match=wordings.PREDICTS_MOST_PROBABLE):
        recalibrate(trained(INTENT))
    with pytest.raises(SidelightError, match=wordings.NO_THRESHOLD):
        recalibrate(trained(INTENT), rule=ThresholdRule("fpr", 0.01))


def test_class_with_too_few_distinct_texts_triggers_warning(warned):
    logits, labels = drawn(TOXICITY, 300, share=0.3, seed=4)
    new = texts_of(TOXICITY, labels)
    recalibrate(trained(), new, logits)
    assert warned() == []
    # All positive texts are one text, so they stay together.
    alike = (new.items[int(i * (1 - label))] for i, label in enumerate(labels))
    recalibrate(trained(), replace(new, items=(*alike,)), logits)
    assert any("the metrics are too optimistic" in warning for warning in warned())


def test_recalibration_warns_when_metrics_get_worse(warned):
    logits, labels = drawn(TOXICITY, 40, share=0.3, seed=100)
    texts = texts_of(TOXICITY, labels)
    recalibrated = recalibrate(trained(), texts, logits)
    (warning,) = (each for each in warned() if "worse" in each)
    before, after = (report.metrics["f1"].value for report in recalibrated.reports)
    assert after < before
    assert f"F1 {before:.3f} before, {after:.3f} now" in warning
    # A rule that wants other decisions makes none of them worse.
    recalibrate(trained(), texts, logits, rule=ThresholdRule("recall", 0.9))
    assert not any("F1" in each for each in warned())


def test_recalibration_drops_judge_fit_with_a_warning(warned):
    figure = Estimate(0.5, 0.4, 0.6)
    fit = JudgeFit(
        judge="0123456789ab",
        model="judge",
        weight=0.5,
        threshold=0.0,
        threshold_rule="f1",
        share=0.05,
        texts=Texts(),
        deferred=0,
        recall=figure,
        recall_of_probe=figure,
        date="2026-01-01",
    )
    probe = trained().changed(judge_fit=fit)
    logits, labels = drawn(TOXICITY, 300, share=0.3, seed=1)
    texts = texts_of(TOXICITY, labels)
    for options in ({"examples": texts, "logits": logits}, {"rule": ThresholdRule("fpr", 0.01)}):
        assert recalibrate(probe, **options).probe.card.judge_fit is None
        assert any("judge" in warning for warning in warned())
    recalibrate(trained(), rule=F1)
    assert not any("judge" in warning for warning in warned())
