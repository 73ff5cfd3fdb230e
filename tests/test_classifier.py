"""From rows to verdicts and back from disk, for every kind of task; misuse is one clear error."""

import json
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification, LlamaConfig, pipeline

import sidelight
from commands import saved
from corpora import TASKS, planted
from sidelight.backbone import TransformersBackbone, load_backbone
from sidelight.data.loading import load_examples
from sidelight.errors import ContextLengthError, SidelightError, VerdictError
from sidelight.mechanisms.base import mechanism_spec
from sidelight.prompts import Reads
from sidelight.training.classifier import Classifier, load, train
from sidelight.training.dataset import shared_texts
from sidelight.training.fit import fit
from sidelight.training.runs import assess
from sidelight.training.settings import FitOptions, TrainingSettings
from tiny import SIZES, untrained_probe

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]
QUICK = {
    name: TrainingSettings(
        learning_rate=3e-2, weight_decay=0.01, epochs=5, batch_size=16, least_steps=0
    )
    for name in ("readout", "gate")
}
TRAINING, TESTING = 120, 40


def rows_of(kind, count, seed):
    """A planted corpus as a user's rows."""
    texts, labels = planted(kind, count, seed=seed)
    if kind == "multilabel":
        named = [[name for name, on in zip("xyz", row, strict=True) if on] for row in labels]
    else:
        named = [TASKS[kind].labels[label] for label in labels]
    return [{"text": text, "label": label} for text, label in zip(texts, named, strict=True)]


def options_of(*mechanisms, **others):
    return FitOptions(
        mechanisms=tuple(mechanism_spec(name) for name in mechanisms), settings=QUICK, **others
    )


@pytest.fixture(scope="module")
def fits(tiny, tmp_path_factory):
    """For each kind of task a fit of two mechanisms."""
    return {
        kind: fit(
            tiny,
            load_examples(rows_of(kind, TRAINING, seed=0)),
            None,
            name=f"planted-{kind}",
            options=options_of("readout", "gate", cache_root=tmp_path_factory.mktemp("cache")),
        )
        for kind in TASKS
    }


@pytest.mark.parametrize("kind", TASKS)
def test_rows_are_fitted_evaluated_judged_saved_and_loaded(tiny, fits, tmp_path, kind):
    made = fits[kind]
    classifier = Classifier(tiny, made.best.probe)
    testing = rows_of(kind, TESTING, seed=1)
    report = classifier.evaluate(testing).to_dict()
    assert report["rows"] == TESTING
    texts = [row["text"] for row in testing]
    verdicts = classifier.predict(texts)
    right = sum(
        set(verdict.labels) == set(np.atleast_1d(row["label"]).tolist())
        for verdict, row in zip(verdicts, testing, strict=True)
    )
    assert right > 0.75 * TESTING

    again = load(classifier.save(tmp_path / "probe"), model=tiny)
    assert again.predict(texts) == verdicts
    assert again.evaluate(testing).to_dict() == report


@pytest.mark.parametrize("kind", TASKS)
def test_verdicts_are_consistent(tiny, fits, kind):
    probe = fits[kind].best.probe
    for verdict in Classifier(tiny, probe).predict(["tabX", "tcbZ", "tde"]):
        assert verdict.probe == f"planted-{kind}"
        assert tuple(verdict.probabilities) == probe.task.labels
        assert all(0 <= p <= 1 for p in verdict.probabilities.values())
        assert set(verdict.labels) <= set(probe.task.labels)
        if kind != "multilabel":
            assert verdict.labels == (verdict.label,)
            assert sum(verdict.probabilities.values()) == pytest.approx(1)
        if kind == "multiclass":
            assert not verdict.flagged
        if kind == "binary":
            assert verdict.flagged == (verdict.label == "toxic")


def test_a_fit_reports_every_run_a_baseline_and_how_it_was_made(fits, tiny):
    made = fits["binary"]
    assert [run.probe.spec.name for run in made.runs] == ["readout", "gate"]
    assert made.best.score == max(run.score for run in made.runs)
    assert made.baseline.to_dict()["rows"] > 0
    record = made.best.probe.record
    assert record["training"]["rows"] == record["validation"]["rows"] == TRAINING
    assert record["seed"] == 0
    assert record["parameters"] > 0
    assert made.best.probe.fingerprint == tiny.fingerprint


def test_the_best_run_is_of_the_best_mechanism_on_average(tiny):
    rows = load_examples(rows_of("binary", TRAINING, seed=0))
    made = fit(tiny, rows, None, name="p", options=options_of("readout", "gate", seeds=(0, 1)))
    assert [run.seed for run in made.runs] == [0, 1, 0, 1]
    means = {
        name: np.mean([run.score for run in made.runs if run.probe.spec.name == name])
        for name in ("readout", "gate")
    }
    assert means[made.best.probe.spec.name] == max(means.values())


@pytest.mark.parametrize("with_validation", [True, False])
def test_a_run_that_diverges_is_left_out_and_told(tiny, with_validation):
    rows = load_examples(rows_of("binary", 60, seed=0), positive="toxic")
    diverging = {**QUICK, "readout": replace(QUICK["readout"], weight_decay=1e38)}
    options = replace(options_of("readout", "gate"), settings=diverging)
    made = fit(tiny, rows, rows if with_validation else None, name="p", options=options)
    assert [run.probe.spec.name for run in made.runs] == ["gate"]
    assert any("'readout' with seed 0 diverged" in warning for warning in made.warnings)
    alone = replace(options, mechanisms=options.mechanisms[:1])
    with pytest.raises(SidelightError, match="Lower --learning-rate"):
        fit(tiny, rows, rows, name="p", options=alone)


@pytest.mark.parametrize("calibration", ["platt", "isotonic"])
def test_validation_texts_that_cannot_calibrate_cost_no_extraction(tiny, tmp_path, calibration):
    training = load_examples(rows_of("multiclass", 60, seed=0))
    left = [row for row in rows_of("multiclass", 30, seed=1) if row["label"] == "x"]
    options = options_of("gate", cache_root=tmp_path, calibration=calibration)
    with pytest.raises(SidelightError, match=f"Cannot fit a {calibration} calibration"):
        fit(tiny, training, load_examples(left, task=training.task), name="p", options=options)
    assert not list(tmp_path.iterdir())


def test_activations_stay_where_the_probe_could_not_be_stored(tiny, tmp_path):
    rows = load_examples(rows_of("binary", 60, seed=0), positive="toxic")

    def full_disk(made):
        assert made.best.probe.name == "p"
        raise OSError("no space left")

    options = options_of("gate", cache_root=tmp_path)
    with pytest.raises(OSError, match="no space"):
        fit(tiny, rows, None, name="p", options=options, store=full_disk)
    assert list(tmp_path.rglob("*.safetensors"))


def test_activations_are_gone_after_a_fit_unless_kept(tiny, tmp_path):
    rows = load_examples(rows_of("binary", 60, seed=0))
    for keep in (False, True):
        fit(
            tiny, rows, None, name="p",
            options=options_of("gate", cache_root=tmp_path, keep_cache=keep),
        )  # fmt: skip
        assert bool(list(tmp_path.rglob("*.safetensors"))) == keep


def test_train_gives_a_classifier_and_leaves_no_activations(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("SIDELIGHT_CACHE", str(tmp_path))
    rows = rows_of("binary", 60, seed=0)
    classifier = sidelight.train(tiny, rows, mechanism="gate", name="mine", positive="toxic")
    assert classifier.probe.task.labels == ("fine", "toxic")
    assert classifier.predict(["tabc"])[0].probe == "mine"
    assert classifier.probe.spec.name == "gate"
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_probe_of_the_response_is_trained_and_asked_with_responses(tiny):
    texts, labels = planted("binary", 80, seed=0)
    rows = [
        {"text": "question", "answer": text, "label": "bad" if label else "good"}
        for text, label in zip(texts, labels, strict=True)
    ]
    # The split keeps equal texts together, so each question is its own.
    rows = [{**row, "text": f"question {i}"} for i, row in enumerate(rows)]
    with pytest.warns(UserWarning, match="No positive class was named, so 'bad' is taken"):
        classifier = train(tiny, rows, response="answer", mechanism="gate")
    assert classifier.probe.reads == Reads(side="response")
    verdicts = classifier.predict(["question"] * 2, responses=["tab", "tXXXX"])
    low, high = (verdict.probabilities["bad"] for verdict in verdicts)
    assert low != high
    with pytest.raises(VerdictError, match="no token that the probe reads"):
        classifier.predict(["question"])


@pytest.mark.parametrize("kind", TASKS)
def test_a_call_gives_what_a_pipeline_of_transformers_gives(tiny, fits, tmp_path, kind):
    probe = fits[kind].best.probe
    classifier, labels = Classifier(tiny, probe), probe.task.labels
    config = LlamaConfig(**SIZES, num_labels=len(labels), id2label=dict(enumerate(labels)))
    model = AutoModelForSequenceClassification.from_config(config)
    reference = pipeline("text-classification", model=model, tokenizer=tiny.tokenizer)
    texts = ["tabX", "tcbZ", "tde"]
    for given in (texts[0], texts[:1], texts):
        for options in ({}, {"top_k": 1}, {"top_k": 2}, {"top_k": None}):
            ours, theirs = classifier(given, **options), reference(given, **options)
            assert shape_of(ours) == shape_of(theirs), (given, options)
    verdicts = classifier.predict(texts)
    for verdict, best, ranked in zip(
        verdicts, classifier(texts), classifier(texts, top_k=None), strict=True
    ):
        assert {entry["label"]: entry["score"] for entry in ranked} == verdict.probabilities
        assert ranked == sorted(ranked, key=lambda entry: -entry["score"])
        assert best == ranked[0]


def shape_of(answer):
    """The lists of an answer, and the keys and types of its dictionaries."""
    if isinstance(answer, list):
        return [shape_of(part) for part in answer]
    return {key: type(value) for key, value in answer.items()}


def test_no_text_gives_no_verdict(tiny, fits):
    assert Classifier(tiny, fits["binary"].best.probe).predict([]) == []


LONG = "tab " * 25_000


def test_a_text_longer_than_the_model_reads_is_refused_when_judging(tiny, fits):
    with pytest.raises(ContextLengthError, match="at most 256"):
        Classifier(tiny, fits["binary"].best.probe).predict(["short", LONG])


def test_an_error_about_a_text_names_its_place(tiny, fits, tmp_path):
    classifier = Classifier(tiny, fits["binary"].best.probe)
    with pytest.raises(ContextLengthError, match=r"^Text 2: The text has"):
        classifier.predict(["short", LONG])
    rows = rows_of("binary", 8, seed=0)
    rows[6]["text"] = LONG
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ContextLengthError, match=r"^rows\.jsonl, line 7: The text has"):
        classifier.evaluate(data)
    with pytest.raises(ContextLengthError, match=r"^rows\.jsonl, line 7: The text has"):
        classifier.predict(load_examples(data).items)


def test_a_text_without_a_verdict_is_named_by_its_place(tiny, tmp_path):
    classifier = Classifier(tiny, untrained_probe(tiny, "p", reads=Reads("response")))
    with pytest.raises(VerdictError, match=r"^Text 2: Probe 'p' gave a logit that is not finite"):
        classifier.predict(["a"] * 3, responses=["b", "", "d"])
    rows = [{**row, "answer": "b"} for row in rows_of("binary", 8, seed=0)]
    examples = load_examples(rows, response="answer", positive="toxic")
    items = (*examples.items[:4], replace(examples.items[4], response=""), *examples.items[5:])
    with pytest.raises(VerdictError, match=r"^Given rows, row 5: Probe 'p' gave a logit"):
        classifier.evaluate(replace(examples, items=items))


def test_runs_without_a_verdict_name_the_place_of_the_text(tiny, tmp_path):
    probe = untrained_probe(tiny, "p")
    for parameter in probe.mechanism.parameters():
        parameter.fill_(3e38)
    folder = Classifier(tiny, probe).save(tmp_path / "probe")
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows_of("binary", 8, seed=0))))
    model = saved(tiny, tmp_path / "model")
    with pytest.raises(VerdictError, match=r"^rows\.jsonl, line 1: Probe 'p' gave a logit"):
        assess(folder, load_examples(data, task=probe.task), model=model)


def test_a_text_that_cannot_be_trained_on_is_named_by_its_place(tiny, tmp_path):
    rows = rows_of("binary", 30, seed=0)
    system = {"role": "system", "content": "be brief " * 20}
    rows[4]["text"] = [system, {"role": "user", "content": rows[4]["text"]}]
    options = options_of("gate", max_tokens=64, cache_root=tmp_path)
    with pytest.raises(ContextLengthError, match=r"^Given rows, row 5: .* system prompt"):
        fit(tiny, load_examples(rows), None, name="p", options=options)


def long_rows():
    rows = rows_of("binary", 80, seed=0)
    return [{**row, "text": row["text"] + LONG} if i < 7 else row for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def cut_warnings(tiny, tmp_path_factory):
    made = fit(
        tiny,
        load_examples(long_rows()),
        load_examples(rows_of("binary", 30, seed=1)),
        name="p",
        options=options_of("gate", cache_root=tmp_path_factory.mktemp("cache")),
    )
    return [warning for warning in made.warnings if "cut" in warning]


def test_training_cuts_a_long_text_and_says_how_many(cut_warnings):
    assert len(cut_warnings) == 1
    assert cut_warnings[0].startswith("7 of 80 texts were cut to ")


def test_the_warning_names_the_length_that_texts_were_cut_to(cut_warnings):
    assert "cut to 256 tokens" in cut_warnings[0]


def test_shared_and_rare_validation_texts_are_warned_of(tiny):
    rows = load_examples(rows_of("binary", 60, seed=0))
    few = load_examples(rows_of("binary", 60, seed=0)[:12], task=rows.task)
    warnings = fit(tiny, rows, few, name="p", options=options_of("gate")).warnings
    assert any("positive validation texts, and 30 are wanted" in warning for warning in warnings)
    assert "12 validation texts are also training texts." in warnings


def test_other_answers_to_a_shared_prompt_are_not_shared_texts():
    rows = [{**row, "answer": row["text"], "text": "same"} for row in rows_of("binary", 90, seed=0)]
    training, held_out = load_examples(rows, response="answer").split(0.3, 0)
    assert shared_texts(training, held_out) == []
    assert shared_texts(training, training.select(range(3)))


GOOD = rows_of("binary", 30, seed=0)


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ([], {}),
        ([{"text": "only"}], {}),
        (GOOD, {"label": "nonesuch"}),
        (GOOD, {"text": "nonesuch"}),
        (GOOD, {"response": "nonesuch"}),
        (GOOD, {"mechanism": "gat"}),
        ([{**row, "label": "same"} for row in GOOD], {}),
        ([{**row, "text": "same"} for row in GOOD], {}),
        ([{**row, "text": 5} for row in GOOD], {}),
        ([{**row, "text": None} for row in GOOD], {}),
        ([{**row, "label": None} for row in GOOD], {}),
        ([{**row, "label": {}} for row in GOOD], {}),
        ([{**row, "text": "\ud83d"} for row in GOOD], {}),
        ("nowhere.jsonl", {}),
        (GOOD, {"validation": "nowhere.jsonl"}),
        (GOOD, {"validation": [{"text": "a", "label": "unknown"}]}),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_malformed_data_is_one_clear_error(tiny, data, options):
    with pytest.raises(SidelightError) as caught:
        train(tiny, data, **options)
    assert str(caught.value)


def test_the_format_is_that_of_the_backbone(tiny, tmp_path, offline):
    with pytest.raises(SidelightError, match=r"load_backbone\(..., prompt_format='both'\)"):
        train(tiny, GOOD, prompt_format="both")
    path = saved(tiny, tmp_path / "model")
    made = train(path, GOOD, mechanism="gate", prompt_format="both", positive="toxic")
    assert made.probe.prompt_format == "both"
    folder = made.save(tmp_path / "probe")
    for backbone in (None, load_backbone(path, prompt_format="chat")):
        assert load(folder, model=backbone).predict(["hello"]) == made.predict(["hello"])


@pytest.mark.parametrize(
    ("options", "named"),
    [({"seeds": 0}, "no seed"), ({"seeds": -1}, "no seed"), ({"mechanism": "gat"}, "'gate'")],
)
def test_options_that_train_nothing_are_refused_before_the_model_is_loaded(options, named):
    with pytest.raises(SidelightError, match=named):
        train("no-such-model", GOOD, **options)


def test_options_without_a_mechanism_are_refused():
    with pytest.raises(SidelightError, match="give None"):
        FitOptions(mechanisms=())


def test_validation_data_without_a_positive_is_one_clear_error(tiny):
    fine = [row for row in GOOD if row["label"] == "fine"]
    with pytest.raises(SidelightError, match="toxic"):
        train(tiny, GOOD, positive="toxic", validation=fine)


def test_fitting_examples_without_labels_is_one_clear_error(tiny):
    unlabelled = load_examples(GOOD, label=None)
    with pytest.raises(SidelightError, match="no labels"):
        train(tiny, unlabelled)


def test_evaluating_examples_without_labels_is_one_clear_error(tiny, fits):
    unlabelled = load_examples(GOOD, label=None)
    with pytest.raises(SidelightError, match="no labels"):
        Classifier(tiny, fits["binary"].best.probe).evaluate(unlabelled)


def test_evaluating_examples_of_another_task_is_one_clear_error(tiny, fits):
    turned = load_examples(GOOD, positive="fine")
    assert turned.task.labels == ("toxic", "fine")
    with pytest.raises(SidelightError, match="fine"):
        Classifier(tiny, fits["binary"].best.probe).evaluate(turned)


def test_validation_examples_of_another_task_are_one_clear_error(tiny):
    with pytest.raises(SidelightError, match="fine"):
        train(
            tiny,
            load_examples(GOOD, positive="toxic"),
            validation=load_examples(GOOD, positive="fine"),
        )


def test_a_probe_of_responses_without_responses_is_one_clear_error(tiny):
    with pytest.raises(SidelightError, match=r"\(response\), first Given rows, row 1\."):
        fit(
            tiny, load_examples(GOOD), None, name="p",
            options=options_of("gate", reads=Reads("response")),
        )  # fmt: skip


@pytest.mark.parametrize("side", ["response", "both"])
def test_a_probe_of_responses_is_not_measured_on_prompts(tiny, tmp_path, monkeypatch, side):
    classifier = Classifier(tiny, untrained_probe(tiny, "p", reads=Reads(side)))
    rows = [{**row, "answer": "an answer"} for row in GOOD]
    assert classifier.evaluate(rows, response="answer").rows == len(rows)
    folder, data = classifier.save(tmp_path / "probe"), tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(TransformersBackbone, "run", None)
    refusal = rf"'p' reads responses, but {len(rows)} of {len(rows)} .* --response \(response="
    with pytest.raises(SidelightError, match=refusal):
        classifier.evaluate(rows)
    with pytest.raises(SidelightError, match=refusal):
        assess(folder, load_examples(data, task=classifier.probe.task))


def test_another_number_of_responses_than_texts_is_one_clear_error(tiny):
    classifier = Classifier(tiny, untrained_probe(tiny, "p", reads=Reads("response")))
    with pytest.raises(SidelightError, match="2 texts"):
        classifier.predict(["a", "b"], responses=["c"])


def test_a_string_in_place_of_a_list_is_one_clear_error(tiny, fits):
    with pytest.raises(SidelightError, match="list"):
        Classifier(tiny, fits["binary"].best.probe).predict("a text")


def test_loading_on_another_backbone_is_refused(tiny, fits, tmp_path):
    probe = fits["binary"].best.probe
    other = replace(probe.fingerprint, name="other/model", weights="f" * 16)
    folder = Classifier(tiny, replace(probe, fingerprint=other)).save(tmp_path)
    with pytest.raises(SidelightError, match="other/model"):
        load(folder, model=tiny)
