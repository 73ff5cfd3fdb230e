"""From rows to verdicts and back from disk, for every kind of task; misuse is one clear error."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import sidelight
import wordings
from sidelight.classifier import Classifier, load, train
from sidelight.cli.show import print_assessment, summary
from sidelight.data.loading import load_examples
from sidelight.engines.transformers.backbone import load_backbone
from sidelight.errors import ContextLengthError, SidelightError, VerdictError
from sidelight.models.conversation import Reads
from sidelight.probes.artifact import load_probe, save_probe
from sidelight.probes.mechanisms.base import mechanism_spec
from sidelight.scoring import assess
from sidelight.statistics.background import Conversations, Traffic
from sidelight.training.fit import fit
from sidelight.training.settings import FitOptions, TrainingSettings
from sidelight.training.traffic import excerpt
from sidelight.training.validation import warn_of_shared_texts
from worlds.data import TASKS, planted_rows, write
from worlds.models import saved, untrained_probe

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("temporary_cache")]
BRIEF = TrainingSettings(
    learning_rate=3e-2, weight_decay=0.01, epochs=5, batch_size=16, least_steps=0
)
TRAINING, TESTING = 80, 40


def options_of(mechanism, *, seed=0, **fields):
    return FitOptions(
        mechanism=mechanism_spec(mechanism), settings=replace(BRIEF, seed=seed), **fields
    )


@pytest.fixture(scope="module")
def fits(tiny, tmp_path_factory):
    """A fit for each kind of task."""
    named = {"multiclass": "gate", "multilabel": "readout", "binary": "readout"}
    cache = tmp_path_factory.mktemp("cache")
    return {
        kind: fit(
            tiny,
            load_examples(planted_rows(kind, TRAINING)),
            None,
            name=f"planted-{kind}",
            options=options_of(name, cache_root=cache, seed=1),
        )
        for kind, name in named.items()
    }


@pytest.fixture(scope="module")
def classifier(tiny, fits):
    return Classifier(tiny, fits["binary"].probe)


@pytest.mark.parametrize("kind", TASKS)
def test_trained_classifier_evaluates_predicts_and_survives_round_trip(tiny, fits, tmp_path, kind):
    probe = fits[kind].probe
    classifier, labels = Classifier(tiny, probe), probe.task.labels
    testing = planted_rows(kind, TESTING, seed=1)
    report = classifier.evaluate(testing).to_dict()
    assert report["rows"] == TESTING
    texts = [row["text"] for row in testing]
    verdicts = classifier.predict(texts)
    right = sum(
        set(verdict.labels) == set(np.atleast_1d(row["label"]).tolist())
        for verdict, row in zip(verdicts, testing, strict=True)
    )
    assert right > 0.75 * TESTING
    for verdict in verdicts:
        assert verdict.probe == f"planted-{kind}"
        assert tuple(verdict.probabilities) == labels
        assert all(0 <= p <= 1 for p in verdict.probabilities.values())
        if kind != "multilabel":
            assert verdict.labels == (verdict.label,)
            assert sum(verdict.probabilities.values()) == pytest.approx(1)
            assert verdict.flagged == (kind == "binary" and verdict.label == "toxic")
    again = load(classifier.save(tmp_path / "probe"), model=tiny)
    assert again.predict(texts) == verdicts
    assert again.evaluate(testing).to_dict() == report
    assert classifier.predict([]) == []


def test_fit_returns_probe_with_training_record_and_baseline(fits, tiny):
    fitted = fits["binary"]
    assert fitted.probe.card.mechanism == mechanism_spec("readout")
    assert fitted.baseline.to_dict()["rows"] > 0
    record = fitted.probe.card.training
    assert record.training.rows == record.validation.rows == TRAINING
    assert record.seed == 1
    assert record.parameters > 0
    assert fitted.probe.card.backbone == tiny.fingerprint


@pytest.mark.parametrize("with_validation", [True, False])
def test_diverging_training_is_refused(tiny, with_validation):
    rows = load_examples(planted_rows("binary", 40), positive="toxic")
    diverging = replace(BRIEF, weight_decay=1e38, epochs=1)
    options = FitOptions(settings=diverging)
    with pytest.raises(
        SidelightError, match=wordings.RUN_DIVERGED.format(mechanism="readout", seed=0)
    ):
        fit(tiny, rows, rows if with_validation else None, name="p", options=options)


def test_uncalibratable_validation_set_is_refused_before_extraction(tiny, tmp_path):
    training = load_examples(planted_rows("multiclass", 60))
    left = [row for row in planted_rows("multiclass", 30, seed=1) if row["label"] == "x"]
    options = options_of("gate", cache_root=tmp_path)
    with pytest.raises(SidelightError, match=wordings.CANNOT_CALIBRATE.format(kind="temperature")):
        fit(tiny, training, load_examples(left, task=training.task), name="p", options=options)
    assert not list(tmp_path.iterdir())


def test_activations_are_removed_after_fit_unless_requested(tiny, tmp_path):
    rows = load_examples(planted_rows("binary", 30), positive="toxic")
    options = options_of("gate", cache_root=tmp_path)
    fit(tiny, rows, None, name="p", options=options)
    assert not list(tmp_path.rglob("*.safetensors"))
    fit(tiny, rows, rows, name="p", options=replace(options, keep_cache=True))
    assert list(tmp_path.rglob("*.safetensors"))


def test_activations_persist_until_probe_is_written(tiny, tmp_path, capsys):
    rows = load_examples(planted_rows("binary", 30), positive="toxic")
    cache, out = tmp_path / "cache", tmp_path / "probe"
    training = partial(
        fit, tiny, rows, None, name="p", options=options_of("gate", cache_root=cache), out=out
    )
    out.write_text("a file in the place of the folder")
    with pytest.raises(SidelightError, match=wordings.CANNOT_WRITE.format(what="probe")):
        training()
    assert list(cache.rglob("*.safetensors"))
    # The same texts for another folder: that training neither reads nor removes them.
    training(out=tmp_path / "other")
    assert "on disk already" not in capsys.readouterr().err
    out.unlink()
    result = training()
    assert "hidden states of 30 of 30 are on disk already" in capsys.readouterr().err
    assert load_probe(out).calibration == result.probe.calibration
    assert not list(cache.iterdir())


def test_trained_classifier_loads_with_its_model_and_prompt_format(tiny, tmp_path, offline):
    path = saved(tiny, tmp_path / "model")
    options = {"prompt_format": "both", "positive": "toxic", "name": "mine", "context_tokens": 400}
    result = train(path, planted_rows("binary", 30), mechanism="gate", background="none", **options)
    assert result.probe.task.labels == ("fine", "toxic")
    assert (result.probe.card.mechanism.name, result.probe.card.prompt_format) == ("gate", "both")
    folder, verdicts = result.save(tmp_path / "probe"), result.predict(["hello"])
    assert verdicts[0].probe == "mine"
    for backbone in (None, load_backbone(path, prompt_format="chat")):
        assert load(folder, model=backbone).predict(["hello"]) == verdicts


def test_response_probe_trains_and_predicts_with_responses(tiny):
    # The split keeps equal texts together, so each question is its own.
    rows = [
        {"text": f"question {i}", "answer": row["text"], "label": row["label"]}
        for i, row in enumerate(planted_rows("binary", 60))
    ]
    with pytest.warns(UserWarning, match=wordings.POSITIVE_GUESSED.format(label="toxic")):
        classifier = train(tiny, rows, response="answer", background="none")
    assert classifier.probe.reads == Reads(side="response")
    verdicts = classifier.predict(["question"] * 2, responses=["tab", "tXXXX"])
    low, high = (verdict.probabilities["toxic"] for verdict in verdicts)
    assert low < high
    with pytest.raises(SidelightError, match=wordings.NO_RESPONSES.format(missing=1, texts=1)):
        classifier.predict(["question"])
    with pytest.raises(SidelightError, match=wordings.UNEQUAL_LISTS.format(texts=2, responses=1)):
        classifier.predict(["a", "b"], responses=["c"])


LONG = "tab " * 300


def test_context_length_errors_name_text_or_line(tiny, classifier, tmp_path):
    with pytest.raises(
        ContextLengthError, match=wordings.TEXT_HAS.format(place="^Text 2", limit=256)
    ):
        classifier.predict(["short", LONG])
    rows = planted_rows("binary", 8)
    rows[6]["text"] = LONG
    data = write(tmp_path / "rows.jsonl", rows)
    for ask in (classifier.evaluate, lambda data: classifier.predict(load_examples(data).items)):
        with pytest.raises(
            ContextLengthError,
            match=wordings.TEXT_HAS.format(
                place="^" + wordings.FILE_LINE.format(file="rows.jsonl", line=7), limit=256
            ),
        ):
            ask(data)


def test_verdict_errors_name_text_or_line(tiny, tmp_path):
    classifier = Classifier(tiny, untrained_probe(tiny, "p", reads=Reads("response")))
    with pytest.raises(
        VerdictError, match="^Text 2: Probe " + wordings.NOT_FINITE.format(probe="p")
    ):
        classifier.predict(["a"] * 3, responses=["b", "", "d"])
    rows = [{**row, "answer": "b"} for row in planted_rows("binary", 8)]
    examples = load_examples(rows, response="answer", positive="toxic")
    items = (*examples.items[:4], replace(examples.items[4], response=""), *examples.items[5:])
    with pytest.raises(
        VerdictError,
        match=f"^{wordings.ROW.format(row=5)}: Probe " + wordings.NOT_FINITE.format(probe="p"),
    ):
        classifier.evaluate(replace(examples, items=items))
    probe = untrained_probe(tiny, "p")
    for parameter in probe.mechanism.parameters():
        parameter.fill_(3e38)
    examples = load_examples(write(tmp_path / "rows.jsonl", rows), task=probe.task)
    with pytest.raises(
        VerdictError,
        match="^"
        + wordings.FILE_LINE.format(file="rows.jsonl", line=1)
        + ": Probe "
        + wordings.NOT_FINITE.format(probe="p"),
    ):
        assess(tiny, probe, examples)


def test_fit_warns_about_truncated_shared_or_few_texts(tiny, warned):
    rows = planted_rows("binary", 40)
    for row in rows[:7]:
        row["text"] += LONG
    training = load_examples(rows, positive="toxic")
    few = load_examples(rows[12:24], task=training.task)
    fit(tiny, training, few, name="p", options=options_of("gate"))
    warnings = warned()
    (truncated,) = (warning for warning in warnings if "truncated" in warning)
    assert truncated.startswith("7 of 52 texts were truncated to 256 tokens")
    assert any("(recommended: 30)" in warning for warning in warnings)
    assert any(
        w.startswith("12 validation texts also occur in the training data") for w in warnings
    )


def test_evaluation_warns_about_training_texts(tiny, fits):
    classifier = Classifier(tiny, fits["binary"].probe)
    # Of the texts on which the probe was trained, and of others.
    seen = planted_rows("binary", TRAINING)[:12]
    rows = [*seen, *planted_rows("binary", 28, seed=5)]
    with pytest.warns(UserWarning, match=wordings.TRAINED_ON.format(seen=12, texts=40)):
        classifier.evaluate(rows)


@pytest.mark.parametrize("kind", TASKS)
def test_evaluation_reports_thresholds_false_positives_and_worst_mistakes(tiny, fits, kind, capsys):
    probe = fits[kind].probe
    background = Conversations(np.zeros((150, probe.task.outputs)), np.zeros(150, dtype=int))
    record = probe.card.training.model_copy(update={"traffic": Traffic(background, 6)})
    labelled = load_examples(planted_rows(kind, 40, seed=3), task=probe.task)
    # Labels that the probe has not seen: each is wrong.
    examples = replace(labelled, labels=np.roll(labelled.labels, 1, axis=0))
    recorded, none = (
        assess(tiny, one, examples) for one in (probe.changed(training=record), probe)
    )
    assert 0 < len(recorded.mistakes) <= 5
    texts = [item.text for item in examples.items]
    assert {mistake.text for mistake in recorded.mistakes} <= {*map(excerpt, texts)}
    # The farthest from right is first.
    right = probe.card.label_thresholds or dict.fromkeys(probe.task.labels, 0)
    distances = [abs(mistake.probability - right[mistake.label]) for mistake in recorded.mistakes]
    assert (np.diff(distances) <= 0).all()
    capsys.readouterr()
    outputs = []
    for assessment in (recorded, none):
        print_assessment(assessment)
        outputs.append(capsys.readouterr().out)
    for mistake in recorded.mistakes:
        assert f"'{mistake.label}' {mistake.probability:.2f}  {mistake.text}\n" in outputs[0]
    for label, threshold in probe.card.label_thresholds.items():
        assert f"Threshold for '{label}': {threshold:.3f}" in outputs[0]
    if probe.thresholds:
        assert "False positives: 4.0 % of 150 conversations" in outputs[0]
        assert "without background" in outputs[1]
    points = recorded.operating_points
    assert bool(points) == (probe.task.kind == "binary")
    scores, holds = (
        recorded.probabilities[:, 0],
        examples.labels.reshape(len(examples), -1)[:, 0] == 1,
    )
    for threshold, found, flagged in points:
        assert (scores[holds] >= threshold).sum() == found
        assert (scores[~holds] >= threshold).sum() == flagged
        assert f"{threshold:.3f}" in outputs[0].partition("Other thresholds")[2]
    assert recorded.to_dict()["operating_points"] == [point._asdict() for point in points]
    # The last line says it all.
    for text, background in zip(outputs, ((6, 150), (0, 0)), strict=True):
        assert text.splitlines()[-1] == summary(recorded.report, background)


def test_different_answers_to_same_prompt_are_not_shared_texts(warned):
    rows = [{**row, "answer": row["text"], "text": "same"} for row in planted_rows("binary", 90)]
    training, held_out = load_examples(rows, response="answer").split(0.3, 0)
    warned()
    warn_of_shared_texts(training, held_out)
    assert warned() == []
    warn_of_shared_texts(training, training.select(range(3)))
    assert len(warned()) == 1


GOOD = planted_rows("binary", 30)
MANY = planted_rows("multiclass", 30)
TOXIC_FLAGGED = load_examples(GOOD, positive="toxic")
FINE = [{**row, "label": "fine"} for row in GOOD]


@pytest.mark.parametrize(
    ("data", "options", "remedy"),
    [
        ("nowhere.jsonl", {}, "nowhere.jsonl"),
        (GOOD, {"validation": "nowhere.jsonl"}, "nowhere.jsonl"),
        (GOOD, {"validation": FINE, "positive": "toxic"}, "toxic"),
        (load_examples(GOOD, label=None), {}, "no labels"),
        (TOXIC_FLAGGED, {"validation": load_examples(GOOD, positive="fine")}, "fine"),
        (GOOD, {"prompt_format": "both"}, r"load_backbone\(..., prompt_format='both'\)"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_invalid_training_data_raises_clear_error(tiny, data, options, remedy):
    with pytest.raises(SidelightError, match=remedy):
        train(tiny, data, **options)


def test_invalid_options_are_refused_before_loading_model(tiny):
    with pytest.raises(SidelightError, match="'gate'"):
        train("no-such-model", GOOD, mechanism="gat")
    options = options_of("gate", reads=Reads("response"))
    with pytest.raises(
        SidelightError, match=rf"\(response\), first {wordings.ROW.format(row=1)}\."
    ):
        fit(tiny, load_examples(GOOD), None, name="p", options=options)


def test_invalid_classifier_input_raises_clear_error(classifier):
    with pytest.raises(SidelightError, match=wordings.NO_LABELS):
        classifier.evaluate(load_examples(GOOD, label=None))
    with pytest.raises(SidelightError, match="fine"):
        classifier.evaluate(load_examples(GOOD, positive="fine"))
    with pytest.raises(SidelightError, match=wordings.GIVE_A_LIST):
        classifier.predict("a text")


@pytest.mark.parametrize("side", ["response", "both"])
def test_response_probe_is_not_evaluated_on_prompts(tiny, tmp_path, ran, side):
    classifier = Classifier(tiny, untrained_probe(tiny, "p", reads=Reads(side)))
    rows = [{**row, "answer": "an answer"} for row in GOOD]
    assert classifier.evaluate(rows, response="answer").rows == len(rows)
    data = write(tmp_path / "rows.jsonl", rows)
    ran.clear()
    refusal = rf"'p' reads responses, but {len(rows)} of {len(rows)} .* --response \(response="
    with pytest.raises(SidelightError, match=refusal):
        classifier.evaluate(rows)
    with pytest.raises(SidelightError, match=refusal):
        assess(tiny, classifier.probe, load_examples(data, task=classifier.probe.task))
    assert not ran


def test_documented_loading_example_runs(tiny, tmp_path, monkeypatch, capsys):
    backbone = load_backbone(saved(tiny, tmp_path / "model"))
    save_probe(untrained_probe(backbone, "urgency"), tmp_path / "probes" / "urgency")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "reference.md").read_text("utf-8")
    exec(page.split("## Python\n\n```python\n")[1].split("```")[0], {})
    assert "fine" in capsys.readouterr().out


def test_dir_lists_public_names_before_loading():
    assert {*sidelight.__all__, "__version__"} <= {*dir(sidelight)}
