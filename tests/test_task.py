"""The kinds of tasks: one public form, and a rule for each kind."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
from pydantic import TypeAdapter

from sidelight.errors import SidelightError
from sidelight.types import Task

BINARY = Task("binary", ("fine", "toxic"))
CLASSES = Task("multiclass", ("a", "b", "none"))
LABELS = Task("multilabel", ("x", "y"))
every_task = pytest.mark.parametrize("task", [BINARY, CLASSES, LABELS], ids=lambda task: task.kind)


@every_task
def test_task_keeps_its_kind_through_copies_and_json(task):
    adapter = TypeAdapter(Task)
    text = adapter.dump_json(task)
    assert adapter.dump_python(task, mode="json") == {"kind": task.kind, "labels": [*task.labels]}
    copies = (copy.deepcopy(task), pickle.loads(pickle.dumps(task)), adapter.validate_json(text))
    for each in (*copies, eval(repr(task))):
        assert each == task
        assert hash(each) == hash(task)
        assert each.flags == task.flags
    assert repr(task) == f"Task(kind='{task.kind}', labels={task.labels})"


def test_changed_kind_changes_equality_and_outputs():
    changed = replace(BINARY, kind="multilabel")
    assert changed != BINARY
    assert (BINARY.outputs, changed.outputs) == (1, 2)


def test_unknown_kind_is_refused():
    with pytest.raises(SidelightError, match="multiclass"):
        Task("multi-class", ("a", "b"))


def test_background_traffic_is_flagged_by_threshold_or_class():
    probabilities = np.array([[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]])
    assert CLASSES.flagged(probabilities, ()).tolist() == [True, False]
    assert LABELS.flagged(probabilities[:, :2], (0.7, 0.3)).tolist() == [True, True]
    assert BINARY.flagged(probabilities[:, :1], (0.6,)).tolist() == [True, False]


@every_task
def test_true_and_false_answer_only_binary_choices(task):
    answers = {False: "fine", True: "toxic"} if task is BINARY else {}
    names = {} if task is LABELS else {label: label for label in task.labels}
    assert task.choices == names | answers
