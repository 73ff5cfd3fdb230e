"""The metrics agree with scikit-learn, and weights count as repeated rows do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from sidelight.errors import SidelightError
from sidelight.metrics import METRICS, Predictions, decide, log_losses, measure
from sidelight.types import Task

BINARY = Task("binary", ("safe", "toxic"))
MULTICLASS = Task("multiclass", ("a", "b", "c", "d"))
MULTILABEL = Task("multilabel", ("x", "y", "z"))
TASKS = [BINARY, MULTICLASS, MULTILABEL]
THRESHOLDS = {"binary": (0.4,), "multiclass": (), "multilabel": (0.3, 0.5, 0.7)}
ROUNDING = 1e-12  # two float64 sums of the same numbers in another order


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


def measured(predictions: Predictions, weights=None) -> dict[str, float]:
    weights = np.ones(len(predictions.scores)) if weights is None else weights
    values = measure(predictions, weights[:, None].astype(float))
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
    style = {"zero_division": 0}
    columns = list(zip(targets.T, probabilities.T, strict=True))
    return {
        "f1": reference.f1_score(labels, chosen, average=average, **style),
        "precision": reference.precision_score(labels, chosen, average=average, **style),
        "recall": reference.recall_score(labels, chosen, average=average, **style),
        "macro_f1": reference.f1_score(labels, chosen, average="macro", **style),
        "accuracy": reference.accuracy_score(labels, chosen),
        "auprc": np.mean([reference.average_precision_score(*column) for column in columns]),
        "auroc": np.mean([reference.roc_auc_score(*column) for column in columns]),
        "recall_at_1pct_fpr": np.mean([recall_at_1pct(*column) for column in columns]),
        "ece": naive_ece(stated, correct),
    }


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(8, 250), seed=st.integers(0, 10_000), ties=st.booleans())
def test_every_metric_agrees_with_the_reference(task, rows, seed, ties):
    probabilities, labels = draw_rows(task, rows=rows, seed=seed, ties=ties)
    ours = measured(decided(task, probabilities, labels))
    theirs = expected(task, probabilities, labels)
    assert set(ours) == set(METRICS)
    for name in METRICS:
        assert ours[name] == pytest.approx(theirs[name], abs=ROUNDING), name


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), ties=st.booleans())
def test_a_weight_counts_like_repeated_rows(task, seed, ties):
    probabilities, labels = draw_rows(task, rows=60, seed=seed, ties=ties)
    weights = np.random.default_rng(seed).integers(0, 4, size=60)
    weighted = measured(decided(task, probabilities, labels), weights)
    repeated = np.repeat(np.arange(60), weights)
    plain = measured(decided(task, probabilities[repeated], labels[repeated]))
    for name in METRICS:
        assert weighted[name] == pytest.approx(plain[name], abs=ROUNDING, nan_ok=True), name


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_resamples_measured_together_equal_those_measured_alone(task):
    predictions = decided(task, *draw_rows(task, rows=40, seed=0))
    weights = np.random.default_rng(0).integers(0, 3, size=(40, 7)).astype(float)
    together = measure(predictions, weights)
    for column in range(7):
        alone = measured(predictions, weights[:, column])
        for name in METRICS:
            assert together[name][column] == pytest.approx(alone[name], abs=ROUNDING), name


@pytest.mark.parametrize("label", [0, 1])
def test_ranking_metrics_are_undefined_with_one_class(label):
    values = measured(decided(BINARY, np.array([[0.2], [0.9]]), np.array([label, label])))
    for name in ("auprc", "auroc", "recall_at_1pct_fpr"):
        assert np.isnan(values[name])
    assert values["accuracy"] == 0.5


def test_recall_is_undefined_without_positives_and_f1_is_zero_on_false_alarms():
    values = measured(decided(BINARY, np.array([[0.2], [0.9]]), np.array([0, 0])))
    assert np.isnan(values["recall"])
    assert values["f1"] == values["precision"] == 0


def test_nothing_to_find_and_nothing_flagged_leaves_f1_undefined():
    values = measured(decided(BINARY, np.array([[0.2], [0.1]]), np.array([0, 0])))
    assert np.isnan([values["f1"], values["precision"], values["recall"]]).all()


def test_a_class_that_never_occurs_is_left_out_of_means():
    probabilities = np.array([[0.8, 0.1, 0.1, 0], [0.2, 0.7, 0.1, 0], [0.1, 0.2, 0.7, 0]])
    values = measured(decided(MULTICLASS, probabilities, np.array([0, 1, 2])))
    for name in ("f1", "precision", "recall", "macro_f1", "auprc", "auroc"):
        assert values[name] == 1


def test_a_threshold_that_is_reached_exactly_flags():
    assert decided(BINARY, np.array([[0.4]]), np.array([1])).decisions.tolist() == [[False, True]]


def test_confusion_matrix_agrees_with_the_reference():
    for task in (BINARY, MULTICLASS):
        probabilities, labels = draw_rows(task, rows=80, seed=1)
        predictions = decided(task, probabilities, labels)
        chosen = predictions.decisions.argmax(axis=1)
        theirs = reference.confusion_matrix(labels, chosen)
        assert predictions.confusion_matrix().tolist() == theirs.tolist()
    probabilities, labels = draw_rows(MULTILABEL, rows=80, seed=1)
    predictions = decided(MULTILABEL, probabilities, labels)
    theirs = reference.multilabel_confusion_matrix(labels, predictions.decisions)
    assert predictions.confusion_matrix().tolist() == theirs.tolist()


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (np.zeros((3, 2)), np.zeros(3, int), "one column, the positive class"),
        (np.zeros((0, 1)), np.zeros(0, int), "at least one row"),
        (np.zeros((3, 1)), np.zeros(4, int), "exactly the rows"),
        (np.zeros((3, 1)), np.array([0, 1, 2]), "from 0 to 1"),
        (np.zeros((3, 1)), np.array([0, 0.5, 1]), "whole numbers"),
        (np.zeros((3, 1)), np.array(["safe", "toxic", "safe"]), "whole numbers"),
        (np.array([[0.1], [np.nan], [0.2]]), np.zeros(3, int), "Row 1 .* NaN"),
        (np.array([[0.1], [np.inf], [0.2]]), np.zeros(3, int), "Row 1 .* infinity"),
        (np.array([[0.1], [3.0], [-2]]), np.zeros(3, int), "Apply a Calibration"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(probabilities, labels, message):
    with pytest.raises(SidelightError, match=message):
        decide(BINARY, probabilities, labels, thresholds=(0.5,))


def test_the_number_of_thresholds_must_fit_the_task():
    with pytest.raises(SidelightError, match="wanted 0 for this multiclass task"):
        decide(MULTICLASS, np.full((1, 4), 0.25), np.array([0]), thresholds=(0.5,))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_log_losses_agree_with_the_reference(task):
    probabilities, labels = draw_rows(task, rows=50, seed=0)
    if task.kind == "multilabel":
        pairs = zip(labels.T, probabilities.T, strict=True)
        expected = np.mean([reference.log_loss(*pair) for pair in pairs])
    else:
        stated = probabilities if task.kind == "multiclass" else probabilities[:, 0]
        expected = reference.log_loss(labels, stated)
    assert log_losses(task, probabilities, labels).mean() == pytest.approx(expected)


def test_a_log_loss_is_finite_where_a_wrong_label_was_certain():
    assert np.isfinite(log_losses(BINARY, np.array([[0.0], [1.0]]), np.array([1, 0]))).all()
