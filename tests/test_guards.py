"""Ready guards: what ``guard:...`` names in place of a data file."""

import sys
from collections import Counter
from dataclasses import replace
from importlib.metadata import entry_points

import numpy as np
import pytest

import wordings
from sidelight.classifier import train
from sidelight.data.guards import draw_texts, find_guard, guard_of
from sidelight.data.loading import load_examples
from sidelight.errors import SidelightError
from sidelight.probes.artifact import load_probe
from sidelight.training.dataset import make_split
from sidelight.training.settings import FitOptions
from sidelight.types import Task
from worlds.data import GUARD_LABELS, guard_texts, install_guards, write
from worlds.servers import cli

pytestmark = pytest.mark.usefixtures("temporary_cache", "letters")
BRIEF = ("--background", "none", "--set", "epochs=2")
TASK = Task("binary", ("other", "shouting"))


@pytest.fixture(scope="module", autouse=True)
def letters(tmp_path_factory):
    """The folder of a package of guards."""
    with pytest.MonkeyPatch.context() as patch:
        yield install_guards(tmp_path_factory.mktemp("guards"), patch)


def test_guard_loads_training_and_test_examples_with_same_task():
    training, unseen = load_examples("guard:shouts"), load_examples("guard:shouts:unseen")
    assert (len(training), len(unseen)) == (60, 24)
    assert training.task == unseen.task == TASK
    assert training.weights is None
    assert training.items[2].place == "train.jsonl.gz, line 3"


def test_guard_test_set_accepts_probe_with_renamed_classes():
    renamed_task = Task("binary", ("fine", "toxic"))
    np.testing.assert_array_equal(
        load_examples("guard:shouts:unseen", task=renamed_task).labels,
        load_examples("guard:shouts:unseen").labels,
    )


def test_guard_test_set_labels_follow_reversed_class_order():
    reversed_task = Task("binary", TASK.labels[::-1])
    np.testing.assert_array_equal(
        load_examples("guard:shouts:unseen", task=reversed_task).labels,
        1 - load_examples("guard:shouts:unseen").labels,
    )


@pytest.mark.parametrize("names", [(0, 1), ("false", "true"), ("other", "shouting")])
def test_user_rows_accept_any_label_spelling_and_weigh_more(names, tmp_path):
    user_rows = [{**row, "label": names[int(str(row["label"]))]} for row in guard_texts(12, seed=3)]
    joined = load_examples(f"guard:shouts,{write(tmp_path / 'mine.jsonl', user_rows)}")
    assert joined.task == TASK
    np.testing.assert_array_equal(
        joined.labels[60:], [row["label"] for row in guard_texts(12, seed=3)]
    )
    # As much as all packaged rows together, but each as two to ten of these.
    assert joined.weights is not None
    np.testing.assert_array_equal(joined.weights, [1.0] * 60 + [5.0] * 12)
    few = load_examples(f"guard:shouts,{write(tmp_path / 'few.jsonl', user_rows[:2])}")
    assert few.weights is not None
    assert few.weights[-1] == 10
    np.testing.assert_array_equal(few.select([61, 0]).weights, [10, 1])
    drawn = draw_texts(joined, 20)
    np.testing.assert_array_equal(drawn.weights, [1.0] * 20 + [2.0] * 12)
    assert drawn.items[20:] == joined.items[60:]


def test_draw_balances_labels_and_sources_with_background_as_one_source():
    sources = ["rare"] * 6 + ["common"] * 34 + [f"background:{n}" for n in range(20)]
    cells = [
        {"text": f"{source} {n}", "label": n % 2, "source": source}
        for n, source in enumerate(sources)
    ]
    examples = load_examples(cells)
    drawn = draw_texts(examples, 18)
    assert drawn.label_counts.tolist() == [9, 9]
    counts = Counter(drawn.sources)
    assert {*counts} == {"rare", "common", "background"}
    assert min(counts.values()) >= 5
    assert drawn.items == draw_texts(examples, 18).items
    assert len(draw_texts(examples, 100)) == 60


def test_draw_includes_both_labels_of_mixed_source():
    """Else the style of a source would stand for its label."""
    cells = [{"text": f"mixed {n}", "label": n % 2, "source": "mixed"} for n in range(40)]
    cells += [
        {"text": f"harmless {n}", "label": 0, "source": f"harmless {n % 10}"} for n in range(100)
    ]
    drawn = draw_texts(load_examples(cells), 44)
    counts = Counter(zip(drawn.sources, drawn.labels.tolist(), strict=True))
    assert counts["mixed", 0] >= 2
    assert counts["mixed", 1] == 15


def test_response_guard_uses_last_assistant_turn_of_user_chats(tmp_path):
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "No."}]
    user_file = write(tmp_path / "mine.jsonl", [{"messages": turns, "label": 1}])
    last = load_examples(f"guard:replies,{user_file}").items[-1]
    assert (last.text, last.response) == ("Hello", "No.")
    chat = load_examples(f"guard:shouts,{user_file}").items[-1]
    assert (len(chat.messages), chat.response) == (2, None)
    # As in a table of rows of both kinds.
    empty = {"text": None, "response": None}
    mixed = write(tmp_path / "mixed.jsonl", [{**empty, "messages": turns, "label": 1}])
    assert load_examples(f"guard:replies,{mixed}").items[-1] == last
    assert load_examples(f"guard:shouts,{mixed}").items[-1] == chat
    unanswered = write(tmp_path / "open.jsonl", [{"messages": turns[:1], "label": 1}])
    with pytest.raises(
        SidelightError,
        match=wordings.FILE_LINE.format(file="open.jsonl", line=1)
        + ": "
        + wordings.NO_COLUMN.format(name="response")
        + r"\. Your rows",
    ):
        load_examples(f"guard:replies,{unanswered}")


def test_split_normalises_example_weights_to_mean_one(tiny, tmp_path):
    examples = load_examples("guard:shouts").select(range(20))
    weighted = replace(examples, weights=np.repeat([1.0, 4.0], 10))
    options = FitOptions(cache_root=tmp_path)
    plain, split = (make_split(tiny, each, options) for each in (examples, weighted))
    assert (plain.weights == 1).all()
    np.testing.assert_allclose(split.weights, np.repeat([0.4, 1.6], 10))
    np.testing.assert_allclose(split.select(range(10)).weights, 1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("guard:shout", r"no guard 'shout'\. Did you mean 'shouts'\? Known: .*letters, .*shouts"),
        ("guard:", r"no guard ''"),
        ("guard:shouts:seen", r"no test 'seen'\. Did you mean 'unseen'\? Known: unseen"),
        ("guard:shouts:unseen,mine.jsonl", r"Write guard:NAME"),
        ("guard:shouts,", r"Write guard:NAME"),
        ("guard:shouts,absent.jsonl", r"No file 'absent.jsonl'"),
    ],
)
def test_invalid_guard_source_raises_specific_error(source, message):
    with pytest.raises(SidelightError, match=message):
        load_examples(source)


def test_missing_guard_package_error_names_package_to_install(monkeypatch, tmp_path):
    # Nothing of the environment, as if no package were installed.
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert not entry_points(group="sidelight.guards")
    with pytest.raises(
        SidelightError, match=wordings.HOW_TO_INSTALL.format(package="./packages/guards")
    ):
        guard_of("guard:injection")


def test_duplicate_guard_name_across_packages_is_rejected(monkeypatch, tmp_path):
    install_guards(tmp_path, monkeypatch, "other_guards")
    with pytest.raises(SidelightError, match=r"letter_guards, other_guards\. Uninstall"):
        find_guard("shouts")


@pytest.mark.parametrize(
    ("module", "code", "message"),
    [
        ("failing", "import absent_package", r"No module named 'absent_package'"),
        ("failing", "1 / 0", r"division by zero"),
        ("absent", "", r"No module named 'absent'"),
    ],
)
def test_broken_guard_package_error_names_module_and_cause(
    module, code, message, tmp_path, monkeypatch
):
    install_guards(tmp_path, monkeypatch, "failing", prefix="f_")
    (tmp_path / "failing/__init__.py").write_text(code)
    names = tmp_path / "failing-1.0.dist-info/entry_points.txt"
    names.write_text(f"[sidelight.guards]\nf_shouts = {module}\n")
    monkeypatch.delitem(sys.modules, "failing", raising=False)
    with pytest.raises(
        SidelightError, match=wordings.WRONG_PACKAGE.format(name=module, why=message)
    ):
        find_guard("f_shouts")


def test_guard_package_works_without_init_file(tmp_path, monkeypatch):
    home = install_guards(tmp_path, monkeypatch, "plain_guards", prefix="plain_")
    (home / "__init__.py").unlink()
    assert len(load_examples("guard:plain_shouts:unseen")) == 24


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("title = 3", r"title: Input should be a valid string"),
        ('title = "Shouts"\nmood = "good"', r"mood: Extra inputs are not permitted"),
        ("title = ", r"shouts.toml \(Invalid value"),
        pytest.param("title = " + "[" * 3_000, r"shouts.toml \(maximum recursion", id="nested"),
        ('title = "Shouts"\nreads = "both"', r"shouts.toml \(Cannot overwrite"),
        ('title = "Shouts"\nlabels = ["a", "a"]', r"labels: .*two different names"),
        ('title = "Shouts"\nlabels = ["a", "b\\n"]', r"labels: .*two different names"),
    ],
)
def test_invalid_guard_card_error_names_key_or_file(letters, line, message):
    path = letters / "shouts.toml"
    card = path.read_text()
    rest = card.replace(GUARD_LABELS, "") if "labels" in line else card
    path.write_text(rest.replace('title = "shouts"', line, 1))
    try:
        with pytest.raises(SidelightError, match=message):
            find_guard("shouts")
    finally:
        path.write_text(card)


@pytest.mark.parametrize(
    ("source", "columns", "message"),
    [
        (
            "guard:shouts",
            {"label": "toxicity"},
            r"--label toxicity contradicts .*has label\. Leave",
        ),
        ("guard:shouts", {"positive": "other"}, r"--positive other contradicts .*has shouting"),
        ("guard:shouts", {"response": "answer"}, r"--response answer contradicts .*has none"),
        ("guard:shouts", {"spans": "spans"}, r"--spans spans contradicts .*has none"),
        ("guard:shouts", {"split": "test"}, r"--split test contradicts .*has none"),
        ("guard:letters", {}, r"labels spans, not whole texts\. Read them with --spans"),
    ],
)
def test_options_contradicting_guard_card_are_rejected(source, columns, message):
    with pytest.raises(SidelightError, match=message):
        load_examples(source, **columns)
    assert load_examples("guard:shouts", positive="shouting", label="label").task == TASK


def test_user_rows_incompatible_with_guard_are_rejected(tmp_path):
    user_file = write(tmp_path / "mine.jsonl", [{"text": "Ann", "entities": []}])
    with pytest.raises(
        SidelightError,
        match=wordings.FILE_LINE.format(file="mine.jsonl", line=1)
        + ": "
        + wordings.NO_COLUMN.format(name="spans")
        + r"\. Your rows",
    ):
        load_examples(f"guard:letters,{user_file}", spans="spans")
    turns = [{"role": "user", "content": "Ann"}] * 2
    chat = write(tmp_path / "chat.jsonl", [{"messages": turns, "spans": []}])
    with pytest.raises(
        SidelightError,
        match=wordings.FILE_LINE.format(file="chat.jsonl", line=1)
        + ": 2 messages, .* "
        + wordings.ROW_EACH,
    ):
        load_examples(f"guard:letters,{chat}", spans="spans")
    for name, row in (("shouts", {"text": " "}), ("replies", {"text": "a", "response": None})):
        blank = write(tmp_path / "blank.jsonl", [{**row, "label": 1}] * 3)
        with pytest.raises(SidelightError, match=wordings.NO_ROW_BESIDE.format(rows=3)):
            load_examples(f"guard:{name},{blank}")
    wrong = write(tmp_path / "wrong.jsonl", [{"text": "Ann", "label": "calm"}])
    with pytest.raises(
        SidelightError,
        match=wordings.FILE_LINE.format(file="wrong.jsonl", line=1)
        + ": "
        + wordings.UNKNOWN_LABEL.format(label="calm"),
    ):
        load_examples(f"guard:shouts,{wrong}")


def test_span_labels_found_only_in_user_rows_trigger_warning(tmp_path, warned):
    for label, told in (("NUMBER", []), ("number", ["Only your rows have spans labelled number"])):
        spans = [{"start": 0, "end": 2, "label": label}]
        user_file = write(tmp_path / f"{label}s.jsonl", [{"text": "12", "spans": spans}])
        load_examples(f"guard:letters,{user_file}", spans="spans")
        assert [warning.partition(".")[0] for warning in warned()] == told


def test_train_eval_and_predict_accept_guard_as_data(model, tmp_path, capsys):
    out, user_file = tmp_path / "shouts", write(tmp_path / "mine.jsonl", guard_texts(6, seed=3))
    data = f"guard:shouts,{user_file}"
    assert cli("train", "--data", data, "--model", model, "--out", str(out), *BRIEF) == 0
    assert load_probe(out).task == TASK
    assert cli("eval", str(out), "--data", "guard:shouts:unseen") == 0
    assert "24 rows" in capsys.readouterr().out
    assert cli("predict", str(out), "--data", "guard:shouts:unseen") == 0
    assert len(capsys.readouterr().out.splitlines()) == 24


def test_response_guard_trains_response_probe(tiny, model, tmp_path):
    out = tmp_path / "replies"
    data = ("--data", "guard:replies", "--validation", "guard:replies:unseen")
    assert cli("train", *data, "--model", model, "--out", str(out), *BRIEF) == 0
    assert load_probe(out).reads.side == "response"
    unseen = "guard:replies:unseen"
    classifier = train(tiny, "guard:replies", validation=unseen, background="none")
    assert classifier.probe.reads.side == "response"
    assert classifier.evaluate(unseen).rows == 24


def test_span_guard_trains_span_probe(model, tmp_path, capsys):
    user_rows = [{"text": "ab 12", "spans": [{"start": 3, "end": 5, "label": "NUMBER"}]}]
    out, data = tmp_path / "letters", f"guard:letters,{write(tmp_path / 'mine.jsonl', user_rows)}"
    words = ("--model", model, "--out", str(out), "--mechanism", "spans", "--set", "epochs=1")
    assert cli("train", "--data", data, *words) == 0
    assert load_probe(out).spans is not None
    assert cli("eval", str(out), "--data", "guard:letters:unseen") == 0
    assert "24 texts" in capsys.readouterr().out
    assert cli("train", "--data", "guard:letters", "--positive", "SHOUT", *words) == 2
    assert "--positive apply only to labels of whole texts" in capsys.readouterr().err
