"""However labels are spelled, they make the same task and the same numbers, or a clear error."""

from decimal import Decimal

import numpy as np
import pytest

import wordings
from sidelight.data.loading import load_examples
from sidelight.errors import SidelightError
from sidelight.types import Task
from worlds.data import ROWS, labelled


@pytest.mark.parametrize(
    ("negative", "positive", "names"),
    [
        ([0, "0", "0.0", 0.0], [1, " 1 ", "1.0", 1.0], ("0", "1")),
        ([False, "False", "FALSE"], [True, "true", "TRUE"], ("false", "true")),
        (["no", "No"], ["yes", "YES"], ("no", "yes")),
        ([False, 0, "no"], [True, 1, "1"], ("0", "1")),
        ([np.int64(0), np.bool_(False)], [np.int64(1), np.float32(1)], ("0", "1")),
        ([-1], [1, "1", 1.0], ("-1", "1")),
    ],
)
def test_boolean_spellings_load_as_one_binary_task(negative, positive, names, warned):
    examples = load_examples(labelled([*positive, *negative]))
    assert examples.task == Task("binary", names)
    assert examples.labels.tolist() == [1] * len(positive) + [0] * len(negative)
    assert warned() == []


@pytest.mark.parametrize("trained", [("0", "1"), ("false", "true"), ("no", "yes")])
def test_boolean_task_accepts_every_spelling(trained):
    values = [1, "1", True, 1.0, "TRUE", "Yes", 0, "0", False, 0.0, "no"]
    for labels, expected in ((trained, [1] * 6 + [0] * 5), (trained[::-1], [0] * 6 + [1] * 5)):
        examples = load_examples(labelled(values), task=Task("binary", labels))
        assert examples.labels.tolist() == expected


def test_named_rarer_or_last_label_is_positive(warned):
    rarer = load_examples(labelled(["spam", "ham", "ham"]))
    assert rarer.task == Task("binary", ("ham", "spam"))
    assert "'spam' is used" in warned()[0]
    assert load_examples(ROWS).task == Task("binary", ("delivery", "fault"))
    warned()
    for values, positive, labels in (
        (["a", "b", "b"], "b", ("a", "b")),
        ([True, False], "0", ("true", "false")),
        ([1, 1, -1], "-1", ("1", "-1")),
    ):
        named = load_examples(labelled(values), positive=positive)
        assert named.task == Task("binary", labels)
        assert warned() == []


def test_numeric_classes_are_in_numeric_order():
    examples = load_examples(labelled([10, 9, "2", 10.0, "9", 2]))
    assert examples.task == Task("multiclass", ("2", "9", "10"))
    assert examples.labels.tolist() == [2, 1, 0, 2, 1, 0]
    assert load_examples(labelled([-1, 0, 1] * 2)).task == Task("multiclass", ("-1", "0", "1"))


def test_lists_and_flag_columns_load_as_same_multilabel_task():
    lists = [["rude", "spam"], [], ["spam"], ["rude"]]
    flags = [
        {"text": text, "rude": int("rude" in names), "spam": "spam" in names}
        for text, names in labelled(lists)
    ]
    arrays = [np.array(names, dtype=object) for names in lists]
    same = [lists, arrays, [np.array(names, dtype="U4") for names in lists], [*map(tuple, lists)]]
    same = [load_examples(labelled(cells)) for cells in same]
    for loaded in (*same, load_examples(flags, label="rude, spam")):
        assert loaded.task == Task("multilabel", ("rude", "spam"))
        assert loaded.labels.tolist() == [[1, 1], [0, 0], [0, 1], [1, 0]]
        assert loaded.content_hash == same[0].content_hash
    task = Task("multilabel", ("spam", "rude"))
    assert load_examples(flags[2:], label="rude,spam", task=task).labels.tolist() == [
        [1, 0],
        [0, 1],
    ]


def test_numeric_types_load_as_same_labels():
    ones = [1, 1.0, np.int8(1), np.float64(1), np.bool_(True), Decimal("1"), Decimal("1.0")]
    assert load_examples(labelled([*ones, 0])).labels.tolist() == [1] * len(ones) + [0]


def test_constant_multilabel_column_triggers_warning(warned):
    rows = [{"text": str(number), "a": number % 2, "b": 0} for number in range(4)]
    load_examples(rows, label="a,b")
    assert "0 of 4 rows have the label 'b'" in warned()[0]


def test_explicit_task_accepts_single_class_and_keeps_label_indices():
    task = Task("multiclass", ("late", "fault", "delivery"))
    assert load_examples(ROWS, task=task).labels.tolist() == [2, 1, 2, 1]
    assert load_examples(ROWS[:1], task=task).labels.tolist() == [2]


@pytest.mark.parametrize("nothing", [None, float("nan"), " ", "NaN", "null"])
def test_missing_labels_are_refused_or_skipped(nothing):
    rows = [*ROWS, {"text": "hello", "label": nothing}]
    with pytest.raises(
        SidelightError,
        match=wordings.UNLABELLED.format(missing=1, rows=5, first=5) + ".*missing-lab",
    ):
        load_examples(rows)
    examples = load_examples(rows, on_missing_label="skip")
    assert (len(examples), examples.skipped.missing_label) == (4, 1)


AB, SPAM = Task("binary", ("a", "b")), Task("binary", ("ham", "spam"))
UNUSABLE = {
    "one class in two spellings": ([True, "1"], {}, r"only one label, '1', in all 2 rows"),
    "free text": (["a", "b", "c", "d"], {}, r"4 distinct values in 4 rows .* free text"),
    "too many labels": (list(range(201)) * 3, {}, r"201 distinct values"),
    "measurement": ([0.73, 0.2, 0.5], {}, r"3 distinct values in 3 rows .* or measurements"),
    "object": ([{"a": 1}, "b"], {}, r"row 1: expected one label .*\. Write one"),
    "list after name": (["a", ["b"]], {}, r"row 2: expected one label .* list of labels in every"),
    "None in a list": ([["a", "b"], ["b", None]], {}, r"row 2: expected one label .* None"),
    "line break": (["a", "b\nc"], {}, r"The label 'b\\nc' cannot name a class.*Rename it"),
    "line break in a list": ([["a"], ["b\tc"]], {}, r"The label .* cannot name a class"),
    "half a character": (["a", "b\ud83d"], {}, r"row 2: .* half a character .* position 1"),
    "name after list": ([["a"], "b"], {}, r"row 2: expected a list of labels"),
    "one label in lists": ([["a"], []], {}, r"Got 1 distinct labels"),
    "unknown positive": (["a", "b"], {"positive": "c"}, r"'c' is not a label\. Known: a, b"),
    "positive of three": (["a", "b", "c"] * 2, {"positive": "c"}, r"two classes, but .* has 3"),
    "misspelt": (
        ["a", *["spam", "ham"] * 10, "spma"],
        {"positive": "spam"},
        r"has 4: .*'spma' \(1 of 22 rows, first Given rows, row 22\) resembles 'spam' \(10 rows\)",
    ),
    "positive of lists": ([["a"], ["b"]], {"positive": "a"}, r"inferred from one column"),
    "positive, task": (["a"], {"positive": "a", "task": AB}, "Leave --positive out"),
    "unknown label": (["ham", "spma"], {"task": SPAM}, r"row 2: .* 'spma'\. Did .* 'spam'\? Known"),
    "0/1 for names": ([1, 0], {"task": SPAM}, r"unknown label '1'"),
    "name for multilabel": (["a"], {"task": Task("multilabel", ("a", "b"))}, r"needs lists"),
    "lists for classes": ([["a"]], {"task": Task("multiclass", ("a", "b"))}, r"several labels"),
    "no label at all": (
        [None, None],
        {"on_missing_label": "skip"},
        r"2 of 2 rows .* Label them, or name",
    ),
    "no label column": (["a"], {"label": "lable"}, r"no column 'lable'\. Did you .* --label"),
    "no response": (["a"], {"response": "answer"}, r"no column 'answer'.* --response \(response="),
    "no column of that text": (["a", "b"], {"text": "txt"}, r"no column 'txt'.* --text \(text= in"),
    "split of rows": (["a", "b"], {"split": "test"}, r"split='test' selects"),
}


@pytest.mark.parametrize(("values", "options", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_labels_raise_errors_with_remedy(values, options, message):
    columns = {"label": "label", **options}
    rows = [{"text": text, "label": value} for text, value in labelled(values)]
    with pytest.raises(SidelightError, match=message):
        load_examples(rows, **columns)


def test_flag_columns_must_hold_flags_and_match_task():
    rows = [{"text": "a", "x": 2, "y": 0}]
    with pytest.raises(
        SidelightError, match=wordings.ROW_HOLDS.format(row=1, name="x", cell="'2'")
    ):
        load_examples(rows, label="x,y")
    with pytest.raises(
        SidelightError, match=wordings.COLUMNS_DIFFER.format(labels="x, z", columns="x, y")
    ):
        load_examples(rows, label="x,y", task=Task("multilabel", ("x", "z")))


@pytest.mark.parametrize("pair", [("Spam", "spam"), ("caf\u00e9", "cafe\u0301")])
def test_labels_differing_only_in_case_or_normalisation_trigger_warning(pair, warned):
    load_examples(labelled([*pair, "other"] * 2))
    assert ["use one spelling" in warning for warning in warned()] == [True]
    load_examples(labelled(["spam", "spams", "other"] * 2))
    assert warned() == []


def test_rare_label_resembling_frequent_one_triggers_warning(warned):
    load_examples(labelled([*["benign", "injection"] * 10, "injecton"]))
    (warning,) = warned()
    assert "'injecton' (1 of 21 rows, first Given rows, row 21) resembles 'injection'" in warning
    load_examples(labelled([*["10", "100", "7"] * 10, "101"]))
    assert warned() == []
    imbalanced = [*["safe"] * 90, *["unsafe"] * 9]
    load_examples(labelled(imbalanced))
    assert not any("resembles" in each for each in warned())
