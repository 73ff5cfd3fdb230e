"""The sentence that a training and an evaluation end with, for every kind of task."""

import numpy as np
import pytest

from sidelight.cli.show import summary
from sidelight.data.evaluation import evaluate, evaluate_spans
from sidelight.data.loading import load_examples
from sidelight.statistics.metrics import decide
from sidelight.types import Span, Task

BINARY = Task("binary", ("fine", "urgent"))
CLASSES = Task("multiclass", ("billing", "refund"))
ABSTAINING = Task("multiclass", ("billing", "refund", "none"))
LABELS = Task("multilabel", ("rude", "loud"))


def report_on(task, probabilities, labels):
    thresholds = () if task.kind == "multiclass" else (0.5,) * task.outputs
    chance = np.array(probabilities, dtype=float).reshape(len(labels), -1)
    return evaluate(decide(task, chance, np.array(labels), thresholds=thresholds), bootstrap=0)


# Two of three are found, and one of two others is flagged.
SOME = report_on(BINARY, [0.9, 0.8, 0.1, 0.7, 0.2], [1, 1, 1, 0, 0])


@pytest.mark.parametrize(
    ("background", "expected"),
    [
        ((0, 0), "Finds 2 of 3 'urgent' texts; flags 1 of 2 other texts."),
        # A rate of few conversations would claim too much.
        (
            (2, 40),
            "Finds 2 of 3 'urgent' texts; flags 1 of 2 other texts and 2 of 40 background "
            "conversations.",
        ),
        (
            (39, 1000),
            "Finds 2 of 3 'urgent' texts; flags 1 of 2 other texts and 3.9 % of background "
            "traffic.",
        ),
    ],
)
def test_binary_summary_reports_both_errors_and_background(background, expected):
    assert summary(SOME, background) == expected


def test_binary_summary_omits_classes_without_texts():
    positive, negative = (report_on(BINARY, [0.9, 0.1], [label] * 2) for label in (1, 0))
    assert summary(positive, (0, 0)) == "Finds 1 of 2 'urgent' texts."
    assert summary(negative, (0, 0)) == "Flags 1 of 2 other texts."


def test_multiclass_summary_counts_correct_texts():
    chance = [[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]
    assert summary(report_on(CLASSES, chance, [0, 1, 1]), (0, 0)) == (
        "Classifies 2 of 3 texts correctly."
    )
    with_none = [[0.9, 0.1, 0], [0.1, 0.2, 0.7], [0, 1, 0]]
    assert summary(report_on(ABSTAINING, with_none, [0, 1, 1]), (3, 100)) == (
        "Classifies 2 of 3 texts correctly; assigns a class other than 'none' to 3.0 % of "
        "background traffic."
    )


def test_multilabel_summary_counts_labels():
    chance = [[0.9, 0.9], [0.1, 0.8], [0.2, 0.1]]
    report = report_on(LABELS, chance, [[1, 0], [1, 1], [0, 0]])
    assert summary(report, (0, 0)) == ("Finds 2 of 3 labels in 3 texts and assigns 1 wrongly.")
    assert summary(report, (5, 200)).endswith("; flags 2.5 % of background traffic.")


def test_span_summary_counts_complete_and_partial_spans():
    text = "call Ann Lee at noon"
    name, time = Span(5, 12, "NAME"), Span(16, 20, "TIME")
    labelled = [{"start": s.start, "end": s.end, "label": s.label} for s in (name, time)]
    examples = load_examples([{"text": text, "spans": labelled}], spans="spans")
    report = evaluate_spans(examples, [[name, Span(16, 18, "TIME")]], bootstrap=0)
    assert summary(report, (0, 0)) == (
        "Finds 1 of 2 labelled spans whole and 1 in part; 50.0 % of the spans found are exact."
    )
    nothing = evaluate_spans(examples, [[]], bootstrap=0)
    assert summary(nothing, (0, 0)) == "Finds 0 of 2 labelled spans whole and 0 in part."
