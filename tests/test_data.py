"""Laws of loading and splitting labelled texts, and of the bundled demonstration data."""

import csv
import gzip
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sidelight
from sidelight.data.examples import Examples, LabelledExamples
from sidelight.data.loading import load_examples
from sidelight.errors import SidelightError
from sidelight.prompts import Message
from sidelight.types import Task

ROWS = [
    {"text": "where is my parcel", "label": "delivery"},
    {"text": "the app closes by itself", "label": "fault"},
    {"text": "still no parcel", "label": "delivery"},
    {"text": "screen stays black", "label": "fault"},
]
in_temporary_folder = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write_json_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_delimited(path: Path, rows: Sequence[Mapping[str, object]], delimiter: str) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_all_formats(folder: Path, rows: Sequence[Mapping[str, object]]) -> list[Path]:
    lines = write_json_lines(folder / "rows.jsonl", rows)
    compressed = folder / "rows_again.jsonl.gz"
    compressed.write_bytes(gzip.compress(lines.read_bytes()))
    array = folder / "rows.json"
    array.write_text(json.dumps(list(rows)))
    table = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), table)
    commas = write_delimited(folder / "rows.csv", rows, ",")
    tabs = write_delimited(folder / "rows.tsv", rows, "\t")
    return [lines, compressed, array, table, commas, tabs]


def labelled(names: Sequence[object]) -> list[tuple[str, object]]:
    return [(f"text {number}", name) for number, name in enumerate(names)]


def numbers(examples: LabelledExamples) -> list[int]:
    return examples.labels.tolist()


@in_temporary_folder
@given(
    texts=st.lists(st.text(min_size=1, max_size=40), min_size=6, max_size=12),
    names=st.sampled_from([("no", "yes"), ("0", "1", "2"), ("billing", "élan", 'a "b", c')]),
)
def test_every_format_gives_the_same_examples(
    tmp_path: Path, texts: list[str], names: tuple[str, ...]
) -> None:
    rows = [
        {"text": "x" + text, "label": names[number % len(names)], "source": str(number)}
        for number, text in enumerate(texts)
    ]
    expected = load_examples(rows)
    for path in write_all_formats(tmp_path, rows):
        loaded = load_examples(path)
        assert loaded.items == expected.items, path
        assert loaded.task == expected.task
        assert numbers(loaded) == numbers(expected)
        assert loaded.content_hash == expected.content_hash
        assert loaded.column("source") == expected.column("source")


def test_pairs_equal_mappings() -> None:
    pairs = load_examples([(row["text"], row["label"]) for row in ROWS])
    assert pairs.content_hash == load_examples(ROWS).content_hash


def test_content_hash_depends_on_texts_labels_and_order_only() -> None:
    base = load_examples(ROWS)
    other_text = load_examples([{**ROWS[0], "text": "where is it"}, *ROWS[1:]])
    other_label = load_examples([{**ROWS[0], "label": "fault"}, *ROWS[1:]])
    reordered = load_examples(ROWS[::-1])
    other_column = load_examples([{**row, "id": 7} for row in ROWS])
    other_polarity = load_examples(ROWS, positive="delivery")
    assert len({e.content_hash for e in (base, other_text, other_label, reordered)}) == 4
    assert other_column.content_hash == other_polarity.content_hash == base.content_hash


def test_a_plain_text_is_a_chat_of_one_user_message() -> None:
    chat = [{"role": "user", "content": "where is my parcel"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "where is my parcel"}]}]
    for cell in ("where is my parcel", chat, parts):
        examples = load_examples([{"text": cell}], label=None)
        assert examples.items[0].messages == (Message("user", "where is my parcel"),)


def test_a_chat_keeps_its_turns_and_its_response(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    row = {"chat": turns, "answer": "Because.", "label": None}
    table = tmp_path / "chats.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), table)
    for source in ([row], write_json_lines(tmp_path / "chats.jsonl", [row]), table):
        item = load_examples(source, text="chat", response="answer", label=None).items[0]
        assert item.messages == (Message("system", "Be brief."), Message("user", "Why?"))
        assert item.response == "Because."
        assert item.text == "Be brief.\nWhy?"


@pytest.mark.parametrize(
    ("negative", "positive", "names"),
    [
        ([0, "0", "0.0", 0.0], [1, " 1 ", "1.0", 1.0], ("0", "1")),
        ([False, "False", "FALSE"], [True, "true", "TRUE"], ("false", "true")),
        (["no", "No"], ["yes", "YES"], ("no", "yes")),
        ([False, 0, "no"], [True, 1, "1"], ("0", "1")),
        ([np.int64(0), np.bool_(False)], [np.int64(1), np.float32(1)], ("0", "1")),
    ],
)
def test_truth_values_are_one_task_however_they_are_spelled(
    negative: list[object], positive: list[object], names: tuple[str, ...]
) -> None:
    examples = load_examples(labelled([*positive, *negative]))
    assert examples.task == Task("binary", names)
    assert numbers(examples) == [1] * len(positive) + [0] * len(negative)
    assert examples.warnings == ()


def test_of_minus_one_and_one_one_is_positive() -> None:
    examples = load_examples(labelled([1, "1", -1, 1.0]))
    assert examples.task == Task("binary", ("-1", "1"))
    assert numbers(examples) == [1, 1, 0, 1]
    assert examples.warnings == ()
    turned = load_examples(labelled([1, 1, -1]), positive="-1")
    assert turned.task == Task("binary", ("1", "-1"))
    three = load_examples(labelled([-1, 0, 1] * 2))
    assert three.task == Task("multiclass", ("-1", "0", "1"))


@pytest.mark.parametrize("trained", [("0", "1"), ("false", "true"), ("no", "yes")])
def test_a_task_of_truth_values_accepts_every_spelling(trained: tuple[str, ...]) -> None:
    values = [1, "1", True, 1.0, "TRUE", "Yes", 0, "0", False, 0.0, "no"]
    expected = [1] * 6 + [0] * 5
    examples = load_examples(labelled(values), task=Task("binary", trained))
    assert numbers(examples) == expected
    reverse = load_examples(labelled(values), task=Task("binary", trained[::-1]))
    assert numbers(reverse) == [1 - number for number in expected]


def test_the_rarer_label_is_positive_and_the_user_is_told() -> None:
    examples = load_examples(labelled(["spam", "ham", "ham"]))
    assert examples.task == Task("binary", ("ham", "spam"))
    assert "'spam' is taken" in examples.warnings[0]


def test_of_two_equally_frequent_labels_the_last_in_the_alphabet_is_positive() -> None:
    assert load_examples(ROWS).task == Task("binary", ("delivery", "fault"))


@pytest.mark.parametrize(("values", "positive"), [(["a", "b", "b"], "b"), ([True, False], "0")])
def test_the_named_positive_class_wins(values: list[object], positive: str) -> None:
    examples = load_examples(labelled(values), positive=positive)
    assert examples.task.labels[1] in (positive, "false")
    assert examples.warnings == ()


def test_numeric_classes_are_in_numeric_order() -> None:
    examples = load_examples(labelled([10, 9, "2", 10.0, "9", 2]))
    assert examples.task == Task("multiclass", ("2", "9", "10"))
    assert numbers(examples) == [2, 1, 0, 2, 1, 0]


def test_lists_and_flag_columns_make_the_same_multilabel_task() -> None:
    lists = [("a", ["rude", "spam"]), ("b", []), ("c", ["spam"]), ("d", ["rude"])]
    flags = [
        {"text": text, "rude": int("rude" in names), "spam": "spam" in names}
        for text, names in lists
    ]
    by_list, by_flag = load_examples(lists), load_examples(flags, label="rude, spam")
    assert by_list.task == by_flag.task == Task("multilabel", ("rude", "spam"))
    assert numbers(by_list) == numbers(by_flag) == [[1, 1], [0, 0], [0, 1], [1, 0]]
    assert by_list.content_hash == by_flag.content_hash


def test_arrays_and_tuples_of_labels_are_lists() -> None:
    lists = [["rude", "spam"], [], ["spam"], ["rude"]]
    expected = load_examples(labelled(lists))
    arrays = [np.array(names, dtype=object) for names in lists]
    for cells in (arrays, [np.array(names, dtype="U4") for names in lists], map(tuple, lists)):
        loaded = load_examples(labelled(list(cells)))
        assert (loaded.task, numbers(loaded)) == (expected.task, numbers(expected))


def test_arrays_of_messages_are_chats() -> None:
    parts = np.array([{"type": "text", "text": "Why?"}])
    chat = np.array([{"role": "user", "content": parts}])
    examples = load_examples([{"text": chat}], label=None)
    assert examples.items[0].messages == (Message("user", "Why?"),)


def test_a_number_of_any_type_is_the_same_label() -> None:
    ones = [1, 1.0, np.int8(1), np.float64(1), np.bool_(True), Decimal("1"), Decimal("1.0")]
    examples = load_examples(labelled([*ones, 0]))
    assert numbers(examples) == [1] * len(ones) + [0]


def test_a_trained_task_orders_the_flag_columns() -> None:
    task = Task("multilabel", ("spam", "rude"))
    rows = [{"text": "a", "rude": 1, "spam": 0}]
    assert numbers(load_examples(rows, label="rude,spam", task=task)) == [[0, 1]]


def test_a_multilabel_column_that_never_varies_is_a_warning() -> None:
    rows = [{"text": str(number), "a": number % 2, "b": 0} for number in range(4)]
    assert "'b' holds in 0 of 4 rows" in load_examples(rows, label="a,b").warnings[0]


def test_a_task_allows_one_class_only_and_keeps_its_numbers() -> None:
    task = Task("multiclass", ("late", "fault", "delivery"))
    assert numbers(load_examples(ROWS, task=task)) == [2, 1, 2, 1]
    assert numbers(load_examples(ROWS[:1], task=task)) == [2]


def test_without_labels_the_label_column_need_not_exist() -> None:
    examples = load_examples([{"text": "hello"}], label=None)
    assert (type(examples), len(examples)) == (Examples, 1)


def test_empty_texts_and_responses_are_left_out_and_counted() -> None:
    rows = [{**row, "answer": "ok"} for row in ROWS]
    rows += [{"text": " \n", "label": "fault", "answer": "ok"}, {"label": "fault", "answer": "ok"}]
    rows += [{"text": "hello", "label": "fault", "answer": ""}]
    examples = load_examples(rows, response="answer")
    assert len(examples) == 4
    assert examples.skipped.empty_text == 3
    assert "Left out 3 rows with an empty text" in examples.warnings[0]


@pytest.mark.parametrize("nothing", [None, float("nan"), "", " ", "NaN", "null"])
def test_missing_labels_are_an_error_or_are_left_out(nothing: object) -> None:
    rows = [*ROWS, {"text": "hello", "label": nothing}]
    with pytest.raises(
        SidelightError, match=r"1 of 5 rows have no label .* row 5\. .* skip \(on_missing_label="
    ):
        load_examples(rows)
    examples = load_examples(rows, on_missing_label="skip")
    assert (len(examples), examples.skipped.missing_label) == (4, 1)


def test_conflicting_labels_of_one_text_are_a_warning() -> None:
    rows = [*ROWS, {**ROWS[0], "label": "fault"}, ROWS[1]]
    assert "1 texts appear more than once" in load_examples(rows).warnings[-1]


def test_an_example_knows_where_it_stood(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"two\nlines",a\n,a\nc,b\n')
    examples = load_examples(path)
    assert [item.place for item in examples.items] == ["rows.csv, line 2", "rows.csv, line 5"]
    assert examples.skipped.first_empty == "rows.csv, line 4"
    assert examples.items == load_examples([("two\nlines", "a"), ("c", "b")]).items
    answered = load_examples([{"text": "a", "answer": "b"}], label=None, response="answer")
    assert answered.items[0].place == "Given rows, row 1"


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,x\nb,y\n", encoding="utf-8-sig")
    assert [item.text for item in load_examples(path).items] == ["a", "b"]


def test_a_text_of_any_length_is_read_from_csv(tmp_path: Path) -> None:
    rows = [{"text": "word " * 60_000, "label": "a"}, {"text": "short", "label": "b"}]
    limit = csv.field_size_limit()
    examples = load_examples(write_delimited(tmp_path / "rows.csv", rows, ","))
    assert len(examples.items[0].text) == 300_000
    assert csv.field_size_limit() == limit


def test_a_line_number_counts_the_lines_inside_quotes(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"two\nlines",x\n\nb\n')
    with pytest.raises(SidelightError, match=r"rows\.csv, line 5: 1 fields, but the header has 2"):
        load_examples(path)


MALFORMED = {
    "one field too many": ("a.csv", b"text,label\na,x\nb,y,z\n", r"line 3: 3 fields"),
    "open quote": ("a.csv", b'text,label\n"a,x\n', r"line 2: unexpected end of data"),
    "column twice": ("a.csv", b"text,text\na,b\n", r"'text' appears twice"),
    "header only": ("a.csv", b"text,label\n", r"has no rows"),
    "not UTF-8": ("a.csv", b"text,label\na,x\n\xff,y\n", r"line 3: byte 0xff is not UTF-8"),
    "binary": ("a.jsonl", b"\x89PNG\r\n", r"line 1: byte 0x89 is not UTF-8"),
    "damaged gzip": ("a.jsonl.gz", gzip.compress(b"{}" * 99)[:-9], r"not a complete gzip file"),
    "damaged Parquet": ("a.parquet", b"PAR1", r"not a complete Parquet file"),
    "empty file": ("a.jsonl", b"", r"has no rows"),
    "empty array": ("a.json", b"[]", r"has no rows"),
    "not JSON": ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": \n', r"line 2: not valid JSON"),
    "member twice": (
        "a.jsonl",
        b'{"text": "a", "label": 1}\n{"text": "a", "text": "b", "label": 1}',
        r"line 2: 'text' appears twice",
    ),
    "member of a message twice": (
        "a.json",
        b'[{"text": [{"role": "user", "role": "system", "content": "a"}], "label": 1}]',
        r"a\.json: 'role' appears twice",
    ),
    "deep JSON": ("a.jsonl", b"[" * 100_000, r"line 1: not valid JSON"),
    "line is no object": ("a.jsonl", b'\n["a", 1]\n', r"line 2: expected an object .* got"),
    "element is no object": ("a.json", b'[{"text": "a"}, 3]', r"row 2: expected an object"),
    "object for array": ("a.json", b'{"data": []}', r"expected one array"),
    "text is a number": ("a.jsonl", b'{"text": 3, "label": 1}', r"line 1: expected a text .* 3"),
    "half a character": ("a.jsonl", b'{"text": "\\ud800", "label": 1}', r"line 1: .*half"),
    "message without role": ("a.jsonl", b'{"text": [{"content": "a"}], "label": 1}', r"'role'"),
    "image part": (
        "a.jsonl",
        b'{"text": [{"role": "user", "content": [{"type": "image"}]}], "label": 1}',
        r"reads only text",
    ),
    "unknown ending": ("a.xlsx", b"", r"'a\.xlsx': its name must end in \.csv, \.json"),
}


@pytest.mark.parametrize(("name", "content", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_an_error_that_names_the_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SidelightError, match=message):
        load_examples(path)


UNUSABLE = {
    "one class": (["a", "a"], {}, r"only one label, 'a', in all 2 rows"),
    "one class in two spellings": ([True, "1"], {}, r"only one label"),
    "free text": (["a", "b", "c", "d"], {}, r"4 distinct values in 4 rows .* free text"),
    "too many labels": (list(range(201)) * 3, {}, r"201 distinct values"),
    "measurement": ([0.73, 0.2], {}, r"row 1: the label 0\.73 is a measurement"),
    "measurement as text": (["1", "2.5e-1"], {}, r"row 2: .* measurement"),
    "object": ([{"a": 1}, "b"], {}, r"row 1: expected one label .*\. Write one"),
    "list after name": (["a", ["b"]], {}, r"row 2: expected one label .* list of labels in every"),
    "bytes": ([b"spam", b"ham"], {}, r"row 1: expected one label .* got b'spam'"),
    "sets": (["a", {"b"}], {}, r"row 2: expected one label"),
    "list in a list": ([["a"], ["b", ["a"]]], {}, r"row 2: expected one label"),
    "bytes in a list": ([["a"], [b"b"]], {}, r"row 2: expected one label"),
    "None in a list": ([["a", "b"], ["b", None]], {}, r"row 2: the list .* holds an empty one"),
    "nothing in an array": ([["a", "b"], np.array(["b", ""])], {}, r"row 2: .* an empty one"),
    "half a character": (["a", "b\ud83d"], {}, r"row 2: .* half a character .* position 1"),
    "half a character in a list": ([["a"], ["\ud83d"]], {}, r"row 2: .* half a character"),
    "name after list": ([["a"], "b"], {}, r"row 2: expected a list of labels"),
    "one label in lists": ([["a"], []], {}, r"Got 1 distinct labels"),
    "unknown positive": (["a", "b"], {"positive": "c"}, r"positive='c' is not a label\. Known: a, b"),
    "positive of three": (["a", "b", "c"] * 2, {"positive": "c"}, r"two classes, .* has 3"),
    "positive of lists": ([["a"], ["b"]], {"positive": "a"}, r"may have several labels"),
    "positive and task": (
        ["a", "b"],
        {"positive": "a", "task": Task("binary", ("a", "b"))},
        r"Leave it out",
    ),
    "unknown label": (
        ["ham", "spma"],
        {"task": Task("binary", ("ham", "spam"))},
        r"row 2: unknown label 'spma'\. Did you mean 'spam'\? Known: ham, spam\. .* `sidel",
    ),
    "0/1 for names": ([1, 0], {"task": Task("binary", ("ham", "spam"))}, r"unknown label '1'"),
    "name for multilabel": (["a"], {"task": Task("multilabel", ("a", "b"))}, r"Give lists"),
    "list for multiclass": ([["a"]], {"task": Task("multiclass", ("a", "b"))}, r"may have several labels"),
    "no label at all": ([None, None], {"on_missing_label": "skip"}, r"2 of 2 rows have no label"),
    "no label column": (
        ["a", "b"],
        {"label": "lable"},
        r"no column 'lable'\. Did you .* --label \(label= in",
    ),
    "no text column": (
        ["a", "b"],
        {"response": "answer"},
        r"no column 'answer'.* --response \(response= in",
    ),
    "no column of that text": (["a", "b"], {"text": "txt"}, r"no column 'txt'.* --text \(text= in"),
    "split of rows": (["a", "b"], {"split": "test"}, r"split='test' chooses"),
}


@pytest.mark.parametrize(("values", "options", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_labels_are_an_error_with_the_remedy(
    values: list[object], options: dict[str, object], message: str
) -> None:
    columns = {"label": "label", **options}
    rows = [{"text": text, "label": value} for text, value in labelled(values)]
    with pytest.raises(SidelightError, match=message):
        load_examples(rows, **columns)  # pyright: ignore[reportArgumentType]


def test_flag_columns_must_be_flags_of_the_task() -> None:
    rows = [{"text": "a", "x": 2, "y": 0}]
    with pytest.raises(SidelightError, match=r"row 1: column 'x' holds '2'"):
        load_examples(rows, label="x,y")
    with pytest.raises(SidelightError, match=r"labels x, z, but the columns are x, y"):
        load_examples(rows, label="x,y", task=Task("multilabel", ("x", "z")))


def test_rows_without_any_text_are_an_error() -> None:
    with pytest.raises(SidelightError, match=r"'text' is empty in all 2 rows"):
        load_examples([("", "a"), (" ", "b")])
    with pytest.raises(SidelightError, match=r"'text' is empty in all 1 rows\. .*\(text="):
        load_examples([{"text": "", "answer": "b", "label": 1}], response="answer")
    with pytest.raises(SidelightError, match=r"'answer' is empty in all 1 rows\. .* --response"):
        load_examples([{"text": "a", "answer": " ", "label": 1}], response="answer")
    halves = [{"text": "a", "label": 0}, {"answer": "b", "label": 1}]
    with pytest.raises(SidelightError, match=r"none of the 2 rows has both a 'text' and a 'answe"):
        load_examples(halves, response="answer")
    with pytest.raises(SidelightError, match=r"There are no rows"):
        load_examples([])
    with pytest.raises(SidelightError, match=r"row 1: expected a mapping or a \(text, label\)"):
        load_examples([("a",)])


def test_an_absent_file_names_its_neighbours(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(SidelightError, match=r"Did you mean 'train\.jsonl'"):
        load_examples(tmp_path / "trian.jsonl")
    with pytest.raises(SidelightError, match=r"is a directory\. Give one file"):
        load_examples(str(tmp_path))
    with pytest.raises(SidelightError, match=r"there is no directory"):
        load_examples(tmp_path / "absent" / "train.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SidelightError, match=r"empty' has no file that can be read"):
        load_examples(tmp_path / "empty" / "train.jsonl")


def test_a_hub_name_without_the_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    remedy = r"no file 'owner/name:config'.*pip install 'sidelight\[datasets\]'"
    with pytest.raises(SidelightError, match=remedy):
        load_examples("owner/name:config")


def test_a_parquet_column_that_appears_twice_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = [pyarrow.array(["a", "b"])] * 2
    pyarrow.parquet.write_table(pyarrow.table(columns, names=["text", "text"]), path)
    with pytest.raises(SidelightError, match=r"^a\.parquet: 'text' appears twice\. Give"):
        load_examples(path)


def test_parquet_without_pyarrow_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SidelightError, match=r"pip install pyarrow"):
        load_examples(tmp_path / "a.parquet")


class ClassLabel:
    """Stands for the type of the same name in the package `datasets`."""

    def __init__(self, names: Sequence[str]):
        self.names = names


class DatasetsError(Exception):
    """Stands for what all errors of the package `datasets` are."""


def stand_in_for_datasets(load_dataset: Callable[..., "HubTable"]) -> SimpleNamespace:
    exceptions = SimpleNamespace(DatasetsError=DatasetsError)
    return SimpleNamespace(load_dataset=load_dataset, ClassLabel=ClassLabel, exceptions=exceptions)


class HubTable(list[dict[str, object]]):
    """Stands for a loaded split of the package `datasets`."""

    features: Mapping[str, ClassLabel] = {
        "label": ClassLabel(["sad", "glad", "calm"]),
        "flag": ClassLabel(["negative", "positive"]),
    }


def test_the_hub_gives_class_names_for_three_classes_and_numbers_for_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[object, ...]] = []
    values = [0, 1, 2, 0, 1, 2, -1]
    table = HubTable(
        {"text": str(i), "label": v, "flag": (i + 1) % 3 - 1} for i, v in enumerate(values)
    )

    def load_dataset(name: str, config: str | None, *, split: str) -> HubTable:
        asked.append((name, config, split))
        return table

    monkeypatch.setitem(sys.modules, "datasets", stand_in_for_datasets(load_dataset))
    examples = load_examples("owner/name:config", split="test", on_missing_label="skip")
    flags = load_examples("name", label="flag", on_missing_label="skip")
    assert examples.task == Task("multiclass", ("calm", "glad", "sad"))
    assert examples.skipped.missing_label == 1
    assert flags.task == Task("binary", ("0", "1"))
    assert flags.skipped.missing_label == 2
    assert asked == [("owner/name", "config", "test"), ("name", None, "train")]


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("offline"),
        httpx.ConnectTimeout("too slow"),
        ValueError("Unknown split"),
        RuntimeError("Dataset scripts are no longer supported"),
        DatasetsError("An error occurred while generating the dataset"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_hub_that_fails_is_an_error_of_the_user(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load_dataset(*_: str | None, **__: str) -> HubTable:
        raise error

    monkeypatch.setitem(sys.modules, "datasets", stand_in_for_datasets(load_dataset))
    with pytest.raises(SidelightError, match=rf"{error}.*network"):
        load_examples("owner/name")


def test_select_keeps_texts_labels_and_columns_together() -> None:
    examples = load_examples([{**row, "id": number} for number, row in enumerate(ROWS)])
    part = examples.select([3, 0])
    assert [item.text for item in part.items] == ["screen stays black", "where is my parcel"]
    assert numbers(part) == [1, 0]
    assert part.column("id") == (3, 0)
    with pytest.raises(SidelightError, match=r"no column 'idd'\. Did you mean 'id'"):
        part.column("idd")


@settings(deadline=None)
@given(
    picks=st.lists(st.integers(0, 25), min_size=8, max_size=60),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 9),
)
def test_a_split_parts_no_text_and_loses_no_row(
    picks: list[int], fraction: float, seed: int
) -> None:
    picks += [0, 1, 2, 3, 4, 5]  # two texts of each of three labels
    rows = [
        {"text": f"Text  {pick}" if number % 2 else f"text {pick}", "label": "abc"[pick % 3]}
        for number, pick in enumerate(picks)
    ]
    examples = load_examples([{**row, "id": number} for number, row in enumerate(rows)])
    training, held_out = examples.split(fraction, seed)
    sides = [
        {item.text.casefold().replace("  ", " ") for item in part.items}
        for part in (training, held_out)
    ]
    assert not sides[0] & sides[1]
    assert sorted((*training.column("id"), *held_out.column("id"))) == list(range(len(rows)))  # pyright: ignore[reportArgumentType]
    assert set(numbers(training)) == set(numbers(held_out)) == {0, 1, 2}
    assert training.warnings == ()


@given(fraction=st.floats(0.05, 0.95), seed=st.integers(0, 99))
def test_a_split_of_distinct_texts_keeps_the_share_of_each_label(
    fraction: float, seed: int
) -> None:
    examples = load_examples(labelled(["a"] * 40 + ["b"] * 9 + ["c"] * 3))
    _, held_out = examples.split(fraction, seed)
    for label, count in enumerate([40, 9, 3]):
        share = numbers(held_out).count(label)
        assert abs(share - fraction * count) <= 1, "one row is the finest step"


def test_a_multilabel_split_gives_every_label_to_both_sides() -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"text": str(number), "often": int(rng.random() < 0.5), "rare": int(number % 50 == 0)}
        for number in range(200)
    ]
    for part in load_examples(rows, label="often,rare").split(0.25, 0):
        assert part.labels.any(axis=0).all()
        assert part.labels[:, 1].sum() in (1, 3)


def test_answers_to_one_prompt_are_split_by_answer() -> None:
    rows = [
        {"text": "Reply." if number % 3 else "reply. ", "answer": answer, "label": number % 2}
        for number in range(40)
        for answer in (f"answer {number}", f"Answer  {number}")
    ]
    examples = load_examples(rows, response="answer")
    answers = [
        {" ".join((item.response or "").casefold().split()) for item in part.items}
        for part in examples.split(0.3, 0)
    ]
    assert [len(part) for part in answers] == [28, 12]
    assert not answers[0] & answers[1]
    folds = examples.folds(5, seed=0)
    assert sorted(np.concatenate(folds).tolist()) == list(range(len(examples)))


def test_the_key_of_a_text_leaves_out_case_and_spacing_only() -> None:
    keys = [item.text_key for item in load_examples([("A  b", 0), ("a b\n", 1), ("ab", 1)]).items]
    assert keys[0] == keys[1] != keys[2]


def test_the_seed_decides_a_split() -> None:
    examples = load_examples(labelled(["a", "b"] * 20))
    first, again, other = (examples.split(0.3, seed)[1].content_hash for seed in (0, 0, 1))
    assert first == again != other


def test_examples_without_labels_can_be_split() -> None:
    examples = load_examples([{"text": str(number)} for number in range(10)], label=None)
    assert [len(part) for part in examples.split(0.3, 0)] == [7, 3]


def test_a_label_with_one_text_stays_in_training_with_a_warning() -> None:
    rows = labelled(["a", "b"] * 10)
    examples = load_examples([*rows, ("rare", "c"), ("Rare ", "c")])
    training, held_out = examples.split(0.5, 0)
    assert numbers(training).count(2) == 2
    assert numbers(held_out).count(2) == 0
    assert training.warnings == (
        "Label 'c' has only one distinct text: it stays in the training part.",
    )


def test_folds_have_each_row_once_and_part_no_text() -> None:
    rows = labelled(["a"] * 40 + ["b"] * 9 + ["c"] * 5)
    examples = load_examples([*rows, *[(f"{text} ", label) for text, label in rows[:20]]])
    folds = examples.folds(5, seed=0)
    assert sorted(np.concatenate(folds).tolist()) == list(range(len(examples)))
    texts = [{examples.items[row].text.strip() for row in fold} for fold in folds]
    assert sum(map(len, texts)) == len(set.union(*texts))
    for fold in folds:
        found = numbers(examples.select(fold))
        assert set(found) == {0, 1, 2}
        assert found.count(2) == 1


def test_drawn_rows_keep_the_share_of_each_label_and_lose_none() -> None:
    labels = ["a"] * 70 + ["b"] * 28 + ["c"] * 2
    rows = [{"text": f"text {n}", "label": label} for n, label in enumerate(labels)]
    examples = load_examples(rows)
    drawn = examples.draw(20, seed=0)
    assert len(set(drawn.tolist())) == 20
    assert (np.diff(drawn) > 0).all()
    counts = np.bincount(examples.select(drawn).labels)
    assert counts[2] == 1
    assert abs(counts[0] - 14) <= 1
    assert (examples.draw(20, seed=1) != drawn).any()
    assert (examples.draw(500, seed=0) == np.arange(100)).all()
    with pytest.raises(SidelightError, match="2 examples cannot show 3 labels"):
        examples.draw(2, seed=0)


def test_drawn_rows_of_several_labels_have_each_label() -> None:
    rows = [{"text": f"text {n}", "a": int(n < 50), "b": int(n == 7)} for n in range(60)]
    examples = load_examples(rows, label="a,b")
    assert examples.select(examples.draw(6, seed=0)).labels.any(0).all()


def test_an_impossible_split_is_an_error() -> None:
    with pytest.raises(SidelightError, match=r"Cannot make 5 parts"):
        load_examples(ROWS[:2]).folds(5, 0)
    with pytest.raises(SidelightError, match=r"Cannot hold out 1"):
        load_examples(ROWS).split(1.0, 0)
    with pytest.raises(SidelightError, match=r"all examples have the same text"):
        load_examples([("a", 0), ("A", 1)]).split(0.5, 0)
    answered = [{"text": "a", "answer": answer, "label": answer == "b"} for answer in "bB "]
    with pytest.raises(SidelightError, match=r"and the same response"):
        load_examples(answered, response="answer", task=Task("binary", ("0", "1"))).split(0.5, 0)


DEMONSTRATIONS = {
    "prompt_injection": Task("binary", ("benign", "injection")),
    "intent": Task(
        "multiclass",
        ("account_access", "billing", "cancel", "other", "refund", "technical_issue"),
    ),
    "urgency": Task("binary", ("routine", "urgent")),
}
SHARED_FIVE_GRAMS = 0.005  # "at the end of the" may occur anywhere; a copied sentence may not.


def demonstration(name: str, part: str) -> LabelledExamples:
    folder = Path(sidelight.__file__).parent / "demo" / "data"
    return load_examples(folder / f"{name}_{part}.jsonl", task=DEMONSTRATIONS[name])


def word_runs(examples: Examples, length: int) -> set[tuple[str, ...]]:
    texts = [re.findall(r"\w+", item.text.casefold()) for item in examples.items]
    return {
        tuple(words[start : start + length])
        for words in texts
        for start in range(len(words) - length + 1)
    }


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_demonstration_data_derive_the_documented_task(name: str) -> None:
    for part in ("train", "test"):
        examples = demonstration(name, part)
        inferred = load_examples(
            [(i.text, row["label"]) for i, row in zip(examples.items, examples.rows, strict=True)]
        )
        assert inferred.task == DEMONSTRATIONS[name]
        assert examples.warnings == ()


@pytest.mark.parametrize(
    ("name", "part", "per_label"),
    [
        ("prompt_injection", "train", 80),
        ("prompt_injection", "test", 30),
        ("intent", "train", 40),
        ("intent", "test", 15),
        ("urgency", "train", 80),
        ("urgency", "test", 30),
    ],
)
def test_demonstration_labels_are_balanced(name: str, part: str, per_label: int) -> None:
    labels = numbers(demonstration(name, part))
    assert np.bincount(labels).tolist() == [per_label] * len(DEMONSTRATIONS[name].labels)


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_demonstration_train_and_test_share_no_text(name: str) -> None:
    training, test = demonstration(name, "train"), demonstration(name, "test")
    texts = [" ".join(item.text.casefold().split()) for item in (*training.items, *test.items)]
    assert len(set(texts)) == len(texts)
    runs = word_runs(test, 5)
    assert len(runs & word_runs(training, 5)) <= SHARED_FIVE_GRAMS * len(runs)
