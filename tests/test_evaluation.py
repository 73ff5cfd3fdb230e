"""Metrics and reports agree with scikit-learn; reports are JSON; intervals mean something."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn import metrics as reference

from sidelight.cli.show import print_report
from sidelight.data.evaluation import Report, evaluate
from sidelight.errors import SidelightError
from sidelight.statistics.metrics import METRICS, Predictions, decide, log_losses, measure
from sidelight.types import Task

BINARY = Task("binary", ("safe", "toxic"))
MULTICLASS = Task("multiclass", ("a", "b", "c", "d"))
MULTILABEL = Task("multilabel", ("x", "y", "z"))
TASKS = [BINARY, MULTICLASS, MULTILABEL]
THRESHOLDS = {"binary": (0.4,), "multiclass": (), "multilabel": (0.3, 0.5, 0.7)}
ROUNDING = 1e-12  # two float64 sums of the same numbers in another order

every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)


def draw_rows(task: Task, *, rows: int, seed: int, ties: bool = False):
    """Random probabilities and labels that go together a little; every class occurs."""
    generator = np.random.default_rng(seed)
    shape = (rows, task.outputs)
    if task.kind == "multiclass":
        labels = np.resize(generator.permutation(task.outputs), rows)
        helped = 2 * (labels[:, None] == np.arange(task.outputs))
    else:
        labels = (generator.random(shape) < 0.3).astype(int)
        labels[0], labels[1] = 0, 1
        helped = 2 * labels - 1
    logits = generator.normal(size=shape) + helped
    if ties:
        logits = np.round(logits)
    exponentials = np.exp(logits)
    if task.kind == "multiclass":
        return exponentials / exponentials.sum(axis=1, keepdims=True), labels
    probabilities = exponentials / (1 + exponentials)
    return probabilities, labels[:, 0] if task.kind == "binary" else labels


def decided(task: Task, probabilities, labels) -> Predictions:
    return decide(task, probabilities, labels, thresholds=THRESHOLDS[task.kind])


def measured(predictions: Predictions) -> dict[str, float]:
    values = measure(predictions, np.ones((len(predictions.scores), 1)))
    return {name: float(value[0]) for name, value in values.items()}


def recall_at_1pct(targets, scores) -> float:
    alarm_rates, recalls, _ = reference.roc_curve(targets, scores, drop_intermediate=False)
    return recalls[alarm_rates <= 0.01].max()


def naive_ece(stated, correct) -> float:
    total = 0.0
    for low in range(15):
        inside = (stated * 15 >= low) & ((stated * 15 < low + 1) | (low == 14))
        if inside.any():
            total += inside.mean() * abs(stated[inside].mean() - correct[inside].mean())
    return total


def expected(task: Task, probabilities, labels) -> dict[str, float]:
    """The nine metrics by scikit-learn and plain loops."""
    if task.kind == "multiclass":
        targets, chosen = labels[:, None] == np.arange(task.outputs), probabilities.argmax(axis=1)
        stated, correct = probabilities.max(axis=1), chosen == labels
        average = "macro"
    else:
        targets = labels.reshape(probabilities.shape) == 1
        chosen = (probabilities >= THRESHOLDS[task.kind]).astype(int).reshape(labels.shape)
        stated, correct = probabilities.ravel(), targets.ravel()
        average = "binary" if task.kind == "binary" else "micro"
    outputs = list(zip(targets.T, probabilities.T, strict=True))
    precision, recall, f1, _ = reference.precision_recall_fscore_support(
        labels, chosen, average=average, zero_division=0
    )
    return {
        **{"f1": f1, "precision": precision, "recall": recall},
        "macro_f1": reference.f1_score(labels, chosen, average="macro", zero_division=0),
        "accuracy": reference.accuracy_score(labels, chosen),
        "auprc": np.mean([reference.average_precision_score(*output) for output in outputs]),
        "auroc": np.mean([reference.roc_auc_score(*output) for output in outputs]),
        "recall_at_1pct_fpr": np.mean([recall_at_1pct(*output) for output in outputs]),
        "ece": naive_ece(stated, correct),
    }


@pytest.mark.slow
@every_task
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(8, 250), seed=st.integers(0, 10_000), ties=st.booleans())
def test_metrics_match_reference_implementation(task, rows, seed, ties):
    probabilities, labels = draw_rows(task, rows=rows, seed=seed, ties=ties)
    ours = measured(decided(task, probabilities, labels))
    assert set(ours) == set(METRICS)
    assert ours == pytest.approx(expected(task, probabilities, labels), abs=ROUNDING)


@every_task
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), ties=st.booleans())
def test_weights_count_like_repeated_rows(task, seed, ties):
    probabilities, labels = draw_rows(task, rows=60, seed=seed, ties=ties)
    weights = np.random.default_rng(seed).integers(0, 4, size=(60, 3))
    together = measure(decided(task, probabilities, labels), weights.astype(float))
    for column, draw in enumerate(weights.T):
        repeated = np.repeat(np.arange(60), draw)
        plain = measured(decided(task, probabilities[repeated], labels[repeated]))
        weighted = {name: values[column] for name, values in together.items()}
        assert weighted == pytest.approx(plain, abs=ROUNDING, nan_ok=True)


RANKING = dict.fromkeys(["auprc", "auroc", "recall_at_1pct_fpr"])
DECIDED = ("f1", "precision", "recall")
THREE = [[0.8, 0.1, 0.1, 0], [0.2, 0.7, 0.1, 0], [0.1, 0.2, 0.7, 0]]


@pytest.mark.parametrize(
    ("task", "probabilities", "labels", "values"),
    [
        # Ranking takes both classes; recall takes positives, and false alarms make the others 0.
        (BINARY, [[0.2], [0.9]], [1, 1], {**RANKING, "accuracy": 0.5}),
        (BINARY, [[0.2], [0.9]], [0, 0], {**RANKING, "recall": None, "f1": 0, "precision": 0}),
        (BINARY, [[0.2], [0.1]], [0, 0], {**RANKING, **dict.fromkeys(DECIDED), "accuracy": 1}),
        # A threshold that is reached exactly flags.
        (BINARY, [[0.4]], [1], {"accuracy": 1, "recall": 1}),
        # A class that never occurs is left out of means.
        (MULTICLASS, THREE, [0, 1, 2], dict.fromkeys([*DECIDED, "macro_f1", "auprc", "auroc"], 1)),
    ],
)
def test_undefined_metrics_are_none(task, probabilities, labels, values):
    report = evaluate(decided(task, np.array(probabilities), np.array(labels)))
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert {name: data[name]["value"] for name in values} == values
    assert all(data[name]["ci"] == [None, None] for name in values if values[name] is None)


def test_nan_error_names_its_row():
    with pytest.raises(SidelightError, match=r"Row 1 .* NaN"):
        decided(BINARY, np.array([[0.1], [np.nan], [0.2]]), np.zeros(3, int))


@every_task
def test_log_losses_match_reference_implementation(task):
    probabilities, labels = draw_rows(task, rows=50, seed=0)
    if task.kind == "multilabel":
        pairs = zip(labels.T, probabilities.T, strict=True)
        expected = np.mean([reference.log_loss(*pair) for pair in pairs])
    else:
        stated = probabilities if task.kind == "multiclass" else probabilities[:, 0]
        expected = reference.log_loss(labels, stated)
    assert log_losses(task, probabilities, labels).mean() == pytest.approx(expected)
    # Finite where a wrong label was certain.
    assert np.isfinite(log_losses(BINARY, np.array([[0.0], [1.0]]), np.array([1, 0]))).all()


def report_on(task: Task, **changes) -> Report:
    predictions = decided(task, *draw_rows(task, rows=300, seed=0))
    return evaluate(predictions, **({"bootstrap": 50} | changes))


@every_task
def test_report_is_json_and_bootstrap_affects_only_intervals(task):
    plain, one, reseeded = (
        report_on(task, **options) for options in ({"bootstrap": 0}, {}, {"seed": 4})
    )
    assert one.to_dict() == report_on(task).to_dict() != reseeded.to_dict()
    assert plain.per_class == one.per_class
    data = json.loads(json.dumps(one.to_dict(), allow_nan=False))
    for name in METRICS:
        low, high = data[name]["ci"]
        assert 0 <= low <= data[name]["value"] <= high <= 1
        assert plain.metrics[name].low is None
        assert plain.metrics[name].value == one.metrics[name].value
    if task is not MULTILABEL:
        accuracy = one.metrics["accuracy"]
        wilson = binomtest(round(accuracy.value * 300), 300).proportion_ci(method="wilson")
        assert (accuracy.low, accuracy.high) == pytest.approx((wilson.low, wilson.high), abs=1e-3)
    assert data["rows"] == 300
    assert data["labels"] == list(data["per_class"]) == list(task.labels)
    assert data["thresholds"] == list(THRESHOLDS[task.kind])


@pytest.mark.slow
def test_confidence_intervals_have_nominal_coverage():
    every = decided(BINARY, *draw_rows(BINARY, rows=200_000, seed=0))
    truth = evaluate(every, bootstrap=0).metrics["auroc"].value
    covered = 0
    for seed in range(1, 61):
        # Percentiles of fewer rows are a little too close: of 200, they hold it in 92 % of cases.
        some = decided(BINARY, *draw_rows(BINARY, rows=1000, seed=seed))
        report = evaluate(some, bootstrap=200, seed=seed)
        covered += report.metrics["auroc"].low <= truth <= report.metrics["auroc"].high
    # 95 % of 60 is 57; three binomial standard deviations below that are 51.9.
    assert covered >= 52


@every_task
def test_per_class_metrics_and_confusion_matrix_match_reference_implementation(task):
    probabilities, labels = draw_rows(task, rows=300, seed=0)
    predictions = decided(task, probabilities, labels)
    decisions = predictions.decisions
    if task is MULTILABEL:
        confusion = reference.multilabel_confusion_matrix(labels, decisions)
    else:
        confusion = reference.confusion_matrix(labels, decisions.argmax(axis=1))
    np.testing.assert_array_equal(predictions.confusion_matrix(), confusion)
    scores = np.hstack([1 - probabilities, probabilities]) if task is BINARY else probabilities
    targets = labels if task is MULTILABEL else labels[:, None] == np.arange(len(task.labels))
    expected_rows = zip(
        *reference.precision_recall_fscore_support(targets, decisions, average=None),
        reference.average_precision_score(targets, scores, average=None),
        reference.roc_auc_score(targets, scores, average=None),
        strict=True,
    )
    for one, theirs in zip(
        report_on(task, bootstrap=0).per_class.values(), expected_rows, strict=True
    ):
        names = ("precision", "recall", "f1", "support", "auprc", "auroc")
        ours = tuple(one[name] for name in names)
        assert ours == pytest.approx(theirs)


@pytest.mark.parametrize("task", [*TASKS, Task("multiclass", ("a", "b", "c", "d", "nobody"))])
def test_intervals_do_not_collapse_without_errors(task):
    _, labels = draw_rows(MULTICLASS if task.kind == "multiclass" else task, rows=40, seed=0)
    right = np.eye(task.outputs)[labels] if task.kind == "multiclass" else labels.reshape(40, -1)
    report = evaluate(decided(task, 0.9 * right + 0.02, labels))
    for name in ("accuracy", "f1", "auroc"):
        assert report.metrics[name].value == report.metrics[name].high == 1
        assert 0.5 < report.metrics[name].low < 0.95


@pytest.mark.parametrize("task", [*TASKS, Task("binary", ("[safe]", "[/bold]"))])
def test_report_table_shows_every_metric_and_label(task, capsys):
    print_report(report_on(task))
    text = capsys.readouterr().out
    assert all(name in text for name in METRICS + task.labels)
