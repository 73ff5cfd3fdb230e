"""Every source gives the same rows, and what cannot be read is an error that names its place."""

import gzip
import os
import sys

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import wordings
from sidelight.data.loading import load_examples
from sidelight.errors import SidelightError
from sidelight.models.conversation import Message
from sidelight.types import Task
from worlds.data import ROWS, WRITERS, DatasetsError, HubTable, stand_in_for_datasets, write

SHARED = [HealthCheck.function_scoped_fixture]


@settings(max_examples=12, deadline=None, suppress_health_check=SHARED)
@given(
    texts=st.lists(st.text(min_size=1, max_size=40), min_size=6, max_size=12),
    names=st.sampled_from([("no", "yes"), ("0", "1", "2"), ("billing", "élan", 'a "b", c')]),
)
def test_every_format_loads_same_examples(tmp_path, texts, names):
    rows = [
        {"text": "x" + text, "label": names[number % len(names)], "source": str(number)}
        for number, text in enumerate(texts)
    ]
    expected = load_examples(rows)
    pairs = load_examples([(row["text"], row["label"]) for row in rows])
    assert pairs.content_hash == expected.content_hash
    for ending in WRITERS:
        path = write(tmp_path / f"rows{ending}", rows)
        loaded = load_examples(path)
        assert loaded.items == expected.items, path
        assert loaded.task == expected.task
        assert loaded.labels.tolist() == expected.labels.tolist()
        assert loaded.content_hash == expected.content_hash
        sources = ([row.get("source") for row in read.rows] for read in (loaded, expected))
        assert len({*map(tuple, sources)}) == 1


def test_chat_rows_preserve_turns_and_response(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    row = {"chat": turns, "answer": "Because.", "label": None}
    files = [write(tmp_path / f"chats{ending}", [row]) for ending in (".jsonl", ".parquet")]
    for source in ([row], *files):
        item = load_examples(source, text="chat", response="answer", label=None).items[0]
        assert item.messages == (Message("system", "Be brief."), Message("user", "Why?"))
        assert item.response == "Because."
        assert item.text == "Be brief.\nWhy?"


def test_tool_call_arguments_may_be_objects():
    call = {"function": {"name": "forecast", "arguments": {"city": "Köln"}}}
    turns = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "tool_calls": [call]}]
    item = load_examples([{"text": turns}], label=None).items[0]
    assert item.messages[1].content == '{"name": "forecast", "arguments": {"city": "Köln"}}'


def test_examples_record_file_and_line(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"two\nlines",a\n,a\nc,b\n')
    examples = load_examples(path)
    assert [item.place for item in examples.items] == ["rows.csv, line 2", "rows.csv, line 5"]
    assert examples.skipped.first_empty == "rows.csv, line 4"
    assert examples.items == load_examples([("two\nlines", "a"), ("c", "b")]).items
    answered = load_examples([{"text": "a", "answer": "b"}], label=None, response="answer")
    assert answered.items[0].place == "Given rows, row 1"


def test_csv_reader_accepts_long_texts_and_bom(tmp_path):
    path = tmp_path / "rows.csv"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text(f"text,label\n{'word ' * 60_000},x\nb,y\n", encoding=encoding)
        assert [len(item.text) for item in load_examples(path).items] == [300_000, 1]


MALFORMED = {
    "semicolons": (
        "a.csv",
        b"\ntext;label\nhow are you, you;ham\n",
        r"separated by ';' instead of ','\. Save the file as \.csv with commas",
    ),
    "pipes": ("a.csv", b'"text"|"label"\nhow are you|ham\n', r"separated by '\|' instead of ','"),
    "commas": ("a.tsv", b"text,label\nhow are you,ham\n", r"separated by ',' instead of '\\t'"),
    "plain gzip": ("a.csv.gz", b"text,label\na,x\nb,y\n", r"not compressed.* it to a\.csv\."),
    "gzip without .gz": ("a.csv", gzip.compress(b"text"), r"compressed .* Rename it to a\.csv\.gz"),
    "lines in quotes": ("a.csv", b'text,label\n"a\nb",x\n\nb\n', r"line 5: 1 fields, .* has 2"),
    "one field too many": ("a.csv", b"text,label\na,x\nb,y,z\n", r"line 3: 3 fields"),
    "open quote": ("a.csv", b'text,label\n"a,x\n', r"line 2: unexpected end of data"),
    "column twice": (
        "a.csv",
        b"text,text\na,b\n",
        r"line 1: column 'text' .*text\)\. Rename or remove one of the two\.$",
    ),
    "header only": ("a.csv", b"text,label\n", r"has no rows"),
    "not UTF-8": ("a.csv", b"text,label\na,x\n\xff,y\n", r"a\.csv, line 3: .* 0xff.*iconv"),
    "damaged gzip": (
        "a.jsonl.gz",
        gzip.compress(b"{}" * 99)[:-9],
        r"Cannot read a\.jsonl\.gz: .* Copy it again",
    ),
    "damaged Parquet": ("a.parquet", b"PAR1", r"not a complete Parquet file"),
    "empty file": ("a.jsonl", b"", r"has no rows"),
    "not JSON": ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": \n', r"line 2: not valid JSON"),
    "deep JSON": ("a.jsonl", b"[" * 100_000, r"line 1: not valid JSON"),
    "line is no object": ("a.jsonl", b'\n["a", 1]\n', r"line 2: expected an object .* got"),
    "element is no object": ("a.json", b'[{"text": "a"}, 3]', r"row 2: expected an object"),
    "object for array": ("a.json", b'{"data": []}', r"expected one array"),
    "text is a number": ("a.jsonl", b'{"text": 3, "label": 1}', r"line 1: expected a text .* 3"),
    "half a character": ("a.jsonl", b'{"text": "\\ud800", "label": 1}', r"line 1: .*half"),
    "message without role": ("a.jsonl", b'{"text": [{"content": "a"}], "label": 1}', r"'role'"),
    "image part": (
        "a.jsonl",
        b'{"label": 1, "text": [{"role": "user", "content": [{"type": "image"}]}]}',
        r"expected text parts .* 'image'",
    ),
    "call of a user": (
        "a.jsonl",
        b'{"text": [{"role": "user", "content": "a", "tool_calls": [{}]}], "label": 1}',
        r"line 1: only the assistant calls tools, but .* 'user'",
    ),
    "call without arguments": (
        "a.jsonl",
        b'{"text": [{"role": "assistant", "tool_calls": [{"function": {}}]}], "label": 1}',
        r"line 1: expected tool calls .* got \{'function': \{\}\}",
    ),
    "former tool call": (
        "a.jsonl",
        b'{"text": [{"role": "assistant", "content": "", "function_call": 1}], "label": 1}',
        r"line 1: 'function_call' is deprecated and not read\. Write 'tool_calls'",
    ),
    "unknown ending": ("a.xlsx", b"", r"'a\.xlsx': its name must end in \.csv, \.json"),
}


@pytest.mark.parametrize(("name", "content", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_file_error_names_location(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SidelightError, match=message):
        load_examples(path)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("trian.jsonl", r"Did you mean 'train\.jsonl'"),
        ("", r"is a folder.* Known: train\.jsonl"),
        ("pipe.jsonl", r"is a pipe or a device\. Write its rows to a file"),
        ("absent/train.jsonl", r"^No file .*: /.*absent is not a folder. Check the path.$"),
        ("empty/train.jsonl", r"^No file .*: /.*empty contains no data files. Check the path.$"),
    ],
)
def test_missing_file_error_suggests_alternatives(tmp_path, place, says):
    write(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(SidelightError, match=says):
        load_examples(tmp_path / place)


def test_hub_name_error_names_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    remedy = r"No file 'owner/.*pip install '\.\[datasets\]'"
    with pytest.raises(SidelightError, match=remedy):
        load_examples("owner/name:config")


def test_hub_labels_use_names_for_multiclass_and_numbers_for_binary(monkeypatch):
    asked, values = [], [0, 1, 2, 0, 1, 2, -1]
    table = HubTable(
        [{"text": str(i), "label": v, "flag": (i + 1) % 3 - 1} for i, v in enumerate(values)],
        label=["sad", "glad", "calm"],
        flag=["negative", "positive"],
    )

    def load_dataset(name, config, *, split):
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
        DatasetsError("An error occurred while generating the dataset"),
    ],
)
def test_hub_failures_raise_sidelight_errors(monkeypatch, error):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setitem(sys.modules, "datasets", stand_in_for_datasets(load_dataset))
    with pytest.raises(
        SidelightError,
        match="^" + wordings.NO_FILE.format(path="'owner/name'") + f".*{error}.*network",
    ):
        load_examples("owner/name")
