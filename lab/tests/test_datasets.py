"""Laws of the data sets by name: layouts, splits, subsets and what their notes say."""

import csv
import gzip
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

from sidelight.errors import SidelightError
from sidelight.types import Task
from sidelight_lab.datasets import PUBLISHED, from_files, load_data_set

Rows = list[dict[str, object]]

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("SIDELIGHT_DATA") or ROOT.parent / "shared" / "data")
EMOTIONS = ("sadness", "joy", "love", "anger", "fear", "surprise")


@dataclass(frozen=True)
class MadeUp:
    """Twenty rows a split in the form of a set, locally and on the hub (by split and config)."""

    folder: str
    local: dict[str, Rows]
    hub: dict[tuple[str, str | None, str], Rows]
    task: Task
    class_names: tuple[str, ...] = ()


def rows(split: str, text: str, /, **cells: Sequence[object]) -> Rows:
    """Twenty rows of texts that no other split has; the cells of each column take turns."""
    return [
        {text: f"{split} text {n}", **{key: of[n % len(of)] for key, of in cells.items()}}
        for n in range(20)
    ]


def toxicchat() -> MadeUp:
    cells = {"toxicity": [0, 1], "human_annotation": [True, True, False]}
    name, config, splits = "lmsys/toxic-chat", "toxicchat0124", ("train", "test")
    return MadeUp(
        "toxicchat0124",
        {split: rows(split, "text", **cells) for split in splits},
        {(name, config, split): rows(split, "user_input", **cells) for split in splits},
        Task("binary", ("0", "1")),
    )


def sst2() -> MadeUp:
    name, splits = "stanfordnlp/sst2", ("train_sentences", "validation", "test")
    return MadeUp(
        "sst2",
        {split: rows(split, "text", label=[1, 0]) for split in splits},
        {
            (name, None, "train"): rows("train", "sentence", label=[1, 0]),
            (name, None, "validation"): rows("validation", "sentence", label=[1, 0]),
            (name, None, "test"): rows("test", "sentence", label=[-1]),
        },
        Task("binary", ("0", "1")),
        ("negative", "positive"),
    )


def emotion() -> MadeUp:
    name, splits, numbers = "dair-ai/emotion", ("train", "validation", "test"), range(6)
    return MadeUp(
        "emotion",
        {split: rows(split, "text", label=numbers, label_name=EMOTIONS) for split in splits},
        {(name, "split", split): rows(split, "text", label=numbers) for split in splits},
        Task("multiclass", tuple(sorted(EMOTIONS))),
        EMOTIONS,
    )


def imdb() -> MadeUp:
    splits = ("train", "test")
    made = {split: rows(split, "text", label=[0, 1]) for split in splits}
    hub = {("stanfordnlp/imdb", None, split): made[split] for split in splits}
    return MadeUp("imdb", made, hub, Task("binary", ("0", "1")), ("neg", "pos"))


def wildguardmix() -> MadeUp:
    labels, name = ["harmful", "unharmful", "harmful", None], "allenai/wildguardmix"
    made = {
        split: rows(split, "prompt", prompt_harm_label=labels, adversarial=[True, True, False])
        for split in ("train", "test")
    }
    return MadeUp(
        "wildguardmix",
        made,
        {(name, f"wildguard{split}", split): made[split] for split in made},
        Task("binary", ("unharmful", "harmful")),
    )


MADE_UP = {
    "toxicchat": toxicchat(),
    "sst2": sst2(),
    "emotion": emotion(),
    "imdb": imdb(),
    "wildguardmix": wildguardmix(),
}


def write_json_lines(path: Path, content: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")


def write_compressed(path: Path, content: Rows) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(gzip.compress(lines.encode()))


def write_csv(path: Path, content: Rows) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(content[0]))
        writer.writeheader()
        writer.writerows(content)


def write_parquet(path: Path, content: Rows) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    ".jsonl": write_json_lines,
    ".jsonl.gz": write_compressed,
    ".csv": write_csv,
    ".parquet": write_parquet,
}


def write_set(root: Path, name: str, *, ending: str = ".jsonl", **changed: Rows) -> Path:
    """The made-up set as local files; `changed` replaces some splits."""
    made = MADE_UP[name]
    folder = root / made.folder
    folder.mkdir()
    for split, content in {**made.local, **changed}.items():
        WRITERS[ending](folder / f"{split}{ending}", content)
    return folder


class ClassLabel:
    """Stands for the type of the same name in the package `datasets`."""

    def __init__(self, names: Sequence[str]):
        self.names = names


class HubTable(list[dict[str, object]]):
    """Stands for a loaded split of the package `datasets`."""

    features: Mapping[str, ClassLabel] = {}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub has the made-up sets, and no local folder has any."""

    def load_dataset(name: str, config: str | None, *, split: str) -> HubTable:
        made = next(made for made in MADE_UP.values() if (name, config, split) in made.hub)
        table = HubTable(made.hub[name, config, split])
        if made.class_names:
            table.features = {"label": ClassLabel(list(made.class_names))}
        return table

    stand_in = SimpleNamespace(
        load_dataset=load_dataset, ClassLabel=ClassLabel, __spec__="installed"
    )
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    monkeypatch.setenv("SIDELIGHT_DATA", str(tmp_path))


def test_every_known_set_has_made_up_rows_here():
    assert tuple(PUBLISHED) == tuple(sorted(MADE_UP))


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("name", MADE_UP)
def test_every_local_format_gives_the_same_set(name: str, ending: str, tmp_path: Path):
    (tmp_path / "lines").mkdir()
    (tmp_path / "other").mkdir()
    write_set(tmp_path / "lines", name)
    write_set(tmp_path / "other", name, ending=ending)
    lines, other = (load_data_set(name, root=tmp_path / part) for part in ("lines", "other"))
    assert other.training.task == MADE_UP[name].task
    for part in ("training", "validation", "test"):
        ours, theirs = getattr(lines, part), getattr(other, part)
        assert ours.task == theirs.task == MADE_UP[name].task
        assert ours.content_hash == theirs.content_hash
    assert {key: list(chosen) for key, chosen in lines.subsets.items()} == {
        key: list(chosen) for key, chosen in other.subsets.items()
    }
    assert lines.notes == other.notes


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", sorted(set(MADE_UP) - {"sst2"}))
def test_the_hub_gives_the_set_that_local_files_give(name: str, tmp_path: Path):
    remote = load_data_set(name)
    write_set(tmp_path, name)
    local = load_data_set(name, root=tmp_path)
    for part in ("training", "validation", "test"):
        assert getattr(remote, part).content_hash == getattr(local, part).content_hash
    assert remote.notes == local.notes
    assert remote.subsets.keys() == local.subsets.keys()


@pytest.mark.usefixtures("hub")
def test_hidden_test_labels_make_the_validation_split_the_test():
    loaded = load_data_set("sst2")
    assert all(item.text.startswith("validation") for item in loaded.test.items)
    held_out = {item.text for item in loaded.validation.items}
    learned = {item.text for item in loaded.training.items}
    assert len(held_out) + len(learned) == 20
    assert all(text.startswith("train") for text in held_out | learned)
    assert any("GLUE hides the labels of its 1,821 test rows" in note for note in loaded.notes)


def test_a_folder_under_the_variable_comes_before_the_hub(
    hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    own = [{**row, "text": f"own {row['text']}"} for row in MADE_UP["imdb"].local["test"]]
    write_set(tmp_path, "imdb", test=own)
    assert load_data_set("imdb").test.items[0].text == "own test text 0"
    monkeypatch.setenv("SIDELIGHT_DATA", str(tmp_path / "absent"))
    with pytest.raises(SidelightError, match=r"SIDELIGHT_DATA is '.*absent', but there is no such"):
        load_data_set("imdb")


def test_an_official_validation_split_is_used_whole(tmp_path: Path):
    write_set(tmp_path, "emotion")
    loaded = load_data_set("emotion", root=tmp_path)
    sizes = [len(part) for part in (loaded.training, loaded.validation, loaded.test)]
    assert sizes == [20, 20, 20]
    assert all(item.text.startswith("validation") for item in loaded.validation.items)
    assert not any("held out" in note for note in loaded.notes)


def test_where_there_is_no_validation_split_a_share_of_training_is_held_out(tmp_path: Path):
    train = [*rows("first", "text", label=[0, 1]), *rows("second", "text", label=[0, 1])]
    write_set(tmp_path, "imdb", train=train)
    loaded = load_data_set("imdb", root=tmp_path)
    texts = {item.text for part in (loaded.training, loaded.validation) for item in part.items}
    assert (len(loaded.training), len(loaded.validation)) == (28, 12)
    assert texts == {row["text"] for row in train}
    assert "There is no validation split: 30 % of the training rows are held out." in loaded.notes


def test_a_file_may_have_the_columns_of_the_hub(tmp_path: Path):
    remote = MADE_UP["toxicchat"].hub
    write_set(tmp_path, "toxicchat", train=remote["lmsys/toxic-chat", "toxicchat0124", "train"])
    loaded = load_data_set("toxicchat", root=tmp_path)
    assert {item.text for item in loaded.training.items} <= {f"train text {n}" for n in range(20)}
    assert loaded.test.items[0].text == "test text 0"


def test_rows_without_a_label_are_counted_and_left_out(tmp_path: Path):
    write_set(tmp_path, "wildguardmix")
    loaded = load_data_set("wildguardmix", root=tmp_path)
    assert len(loaded.test) == 15
    for name in ("training", "test"):
        assert f"5 {name} rows without a label are left out." in loaded.notes
    # Unlabelled rows count: what is compared with the official number is the rows of the file.
    assert "The test split has 20 rows; the official one has 1,725." in loaded.notes


@pytest.mark.parametrize("name", ["toxicchat", "wildguardmix"])
def test_subsets_are_positions_of_test_rows(name: str, tmp_path: Path):
    write_set(tmp_path, name)
    loaded = load_data_set(name, root=tmp_path)
    column, chosen, others = {
        "toxicchat": ("human_annotation", "human", None),
        "wildguardmix": ("adversarial", "adversarial", "vanilla"),
    }[name]
    assert set(loaded.subsets) == {chosen, others} - {None}
    assert set(loaded.test.select(loaded.subsets[chosen]).column(column)) == {True}
    assert len(loaded.subsets[chosen]) == loaded.test.column(column).count(True)
    if others:
        assert set(loaded.test.select(loaded.subsets[others]).column(column)) == {False}
        assert len(loaded.subsets[chosen]) + len(loaded.subsets[others]) == len(loaded.test)


def test_an_absent_subset_is_noted_and_a_malformed_one_refused(tmp_path: Path):
    plain = rows("test", "text", toxicity=[0, 1])
    folder = write_set(tmp_path, "toxicchat", test=plain)
    loaded = load_data_set("toxicchat", root=tmp_path)
    assert not loaded.subsets
    assert any("subset 'human' (column 'human_annotation')" in note for note in loaded.notes)
    write_json_lines(folder / "test.jsonl", [*plain, {**plain[0], "human_annotation": "maybe"}])
    with pytest.raises(
        SidelightError, match=r"example 21: column 'human_annotation' holds 'maybe'"
    ):
        load_data_set("toxicchat", root=tmp_path)


def partial_notes(tmp_path: Path, training_rows: int, human: Sequence[bool]) -> list[str]:
    """Notes on the completeness of a ToxicChat whose test split is complete."""
    more = {"human_annotation": human, "toxicity": [0, 0, 0, 1]}
    train = [
        {"text": f"train {n}", **{key: of[n % len(of)] for key, of in more.items()}}
        for n in range(training_rows)
    ]
    test = [{"text": f"test {n}", "toxicity": n % 2, "human_annotation": True} for n in range(5083)]
    write_set(tmp_path, "toxicchat", train=train, test=test)
    notes = load_data_set("toxicchat", root=tmp_path).notes
    return [note for note in notes if "official" in note]


def test_a_complete_set_is_not_called_partial(tmp_path: Path):
    assert partial_notes(tmp_path, 5082, [True, False]) == []


def test_a_partial_split_is_told_by_its_count(tmp_path: Path):
    expected = "The training split has 40 rows; the official one has 5,082."
    assert partial_notes(tmp_path, 40, [True, False]) == [expected]


def test_toxicchat_says_when_only_human_annotated_rows_are_there(tmp_path: Path):
    _, note = partial_notes(tmp_path, 40, [True])
    assert "All training rows are human-annotated" in note
    assert "so 25.0 % are toxic, against 7.33 %" in note


def test_test_texts_that_training_has_are_counted(tmp_path: Path):
    test = [*MADE_UP["imdb"].local["test"], {"text": " TRAIN  text 3", "label": 1}]
    write_set(tmp_path, "imdb", test=test)
    notes = load_data_set("imdb", root=tmp_path).notes
    assert "1 of 21 test texts are among the training texts too." in notes


def test_a_label_that_training_lacks_is_refused(tmp_path: Path):
    test = [*MADE_UP["emotion"].local["test"], {"text": "new", "label_name": "boredom"}]
    write_set(tmp_path, "emotion", test=test)
    with pytest.raises(SidelightError, match=r"test\.jsonl, line 21: unknown label 'boredom'"):
        load_data_set("emotion", root=tmp_path)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(SidelightError, match=r"Did you mean 'toxicchat'\? Known: emotion, imdb"):
        load_data_set("toxic-chat")


def test_an_absent_set_names_the_folder_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "sst2"
    with pytest.raises(SidelightError, match=rf"'{folder}' with train_sentences, validation, test"):
        load_data_set("sst2", root=tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setenv("SIDELIGHT_DATA", str(tmp_path))
    with pytest.raises(SidelightError) as caught:
        load_data_set("sst2")
    message = str(caught.value)
    for fact in (f"'{folder}'", "set SIDELIGHT_DATA to", "pip install 'sidelight[datasets]'"):
        assert fact in message
    assert "There is no file" not in message


def test_an_absent_or_doubled_split_names_the_files_that_are_there(tmp_path: Path):
    folder = write_set(tmp_path, "imdb")
    (folder / "test.jsonl").rename(folder / "tests.jsonl")
    with pytest.raises(SidelightError, match=r"lacks the split 'test': it has tests\.jsonl, train"):
        load_data_set("imdb", root=tmp_path)
    write_csv(folder / "train.csv", MADE_UP["imdb"].local["train"])
    with pytest.raises(SidelightError, match=r"several files for 'train': train\.csv, train\.js"):
        load_data_set("imdb", root=tmp_path)


def test_any_files_make_a_data_set(tmp_path: Path):
    train, held_out, test = (
        tmp_path / f"{split}.jsonl" for split in ("urgent_train", "urgent_dev", "urgent_test")
    )
    for path in (train, held_out, test):
        content = rows(path.stem, "words", urgent=["no", "yes"], hard=["yes", "no", "no"])
        write_json_lines(path, content)
    loaded = from_files(train, str(test), held_out, text="words", label="urgent", subset="hard")
    assert loaded.name == "urgent_train"
    assert loaded.title == "urgent_train, tested on urgent_test"
    sizes = [len(part) for part in (loaded.training, loaded.validation, loaded.test)]
    assert sizes == [20, 20, 20]
    assert loaded.test.task == Task("binary", ("no", "yes"))
    assert list(loaded.subsets["hard"]) == list(range(0, 20, 3))
    shared = from_files(train, test, text="words", label="urgent", positive="no", name="mine")
    assert (shared.name, shared.test.task) == ("mine", Task("binary", ("yes", "no")))
    assert len(shared.training) + len(shared.validation) == 20
    with pytest.raises(SidelightError, match=r"no column 'hrad'\. Did you mean 'hard'"):
        from_files(train, test, text="words", label="urgent", subset="hrad")


@pytest.mark.slow
@pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no data sets at {DATA}: set SIDELIGHT_DATA to their folder"
)
@pytest.mark.parametrize(
    ("name", "sizes", "subsets", "partial"),
    [
        ("toxicchat", [2801, 5083], {"human": 2853}, ["The training split has 2,801 rows"]),
        ("sst2", [6920 + 872, 1821], {}, []),
        ("emotion", [16000 + 2000, 2000], {}, []),
    ],
)
def test_the_real_sets_are_what_their_notes_say(
    name: str, sizes: list[int], subsets: dict[str, int], partial: list[str]
):
    if not (DATA / MADE_UP[name].folder).is_dir():
        pytest.skip(f"{DATA} has no {MADE_UP[name].folder}")
    loaded = load_data_set(name, root=DATA)
    assert [len(loaded.training) + len(loaded.validation), len(loaded.test)] == sizes
    assert loaded.training.task == loaded.test.task == MADE_UP[name].task
    assert {key: len(positions) for key, positions in loaded.subsets.items()} == subsets
    notes = [note for note in loaded.notes if "the official one has" in note]
    assert [note.partition(";")[0] for note in notes] == partial
