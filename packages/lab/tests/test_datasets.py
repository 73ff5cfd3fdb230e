"""Laws of the data sets by name: layouts, splits, subsets and what their notes say."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from sidelight.errors import SidelightError
from sidelight.types import Task
from sidelight_lab.datasets import PUBLISHED, from_files, load_data_set
from worlds.data import WRITERS, HubTable, stand_in_for_datasets, write

Rows = list[dict[str, object]]

EMOTIONS = ("sadness", "joy", "love", "anger", "fear", "surprise")
SPLITS = ("training", "validation", "test")


@dataclass(frozen=True)
class Invented:
    """Twenty rows a split in the form of a set, locally and on the hub (by split and config)."""

    folder: str
    local: dict[str, Rows]
    hub: dict[tuple[str, str | None, str], Rows]
    task: Task
    class_names: tuple[str, ...] = ()


def rows_for(split: str, text: str, /, **cells: Sequence[object]) -> Rows:
    """Twenty rows of texts that no other split has; the cells of each column take turns."""
    return [
        {text: f"{split} text {n}", **{key: of[n % len(of)] for key, of in cells.items()}}
        for n in range(20)
    ]


def invented(
    folder: str,
    source: str,
    task: Task,
    *,
    splits: Sequence[str] = ("train", "test"),
    texts: tuple[str, str] = ("text", "text"),
    training_file: str = "train",
    class_names: tuple[str, ...] = (),
    **cells: Sequence[object],
) -> Invented:
    """``source`` is the hub's name and configuration; ``texts`` the column here and there."""
    name, _, config = source.partition(":")
    files = {split: training_file if split == "train" else split for split in splits}
    return Invented(
        folder,
        {file: rows_for(split, texts[0], **cells) for split, file in files.items()},
        {
            (name, config.format(split=split) or None, split): rows_for(split, texts[1], **cells)
            for split in splits
        },
        task,
        class_names,
    )


BINARY = Task("binary", ("0", "1"))
INVENTED = {
    "toxicchat": invented(
        "toxicchat0124", "lmsys/toxic-chat:toxicchat0124", BINARY, texts=("text", "user_input"),
        toxicity=[0, 1], human_annotation=[True, True, False],
    ),
    "sst2": invented(
        "sst2", "SetFit/sst2", BINARY, splits=("train", "validation", "test"),
        training_file="train_sentences", class_names=("negative", "positive"), label=[1, 0],
    ),
    "emotion": invented(
        "emotion", "dair-ai/emotion:split", Task("multiclass", tuple(sorted(EMOTIONS))),
        splits=("train", "validation", "test"), class_names=EMOTIONS, label=range(6),
        label_name=EMOTIONS,
    ),
    "imdb": invented(
        "imdb", "stanfordnlp/imdb", BINARY, class_names=("neg", "pos"), label=[0, 1]
    ),
    "wildguardmix": invented(
        "wildguardmix", "allenai/wildguardmix:wildguard{split}",
        Task("binary", ("unharmful", "harmful")), texts=("prompt", "prompt"),
        prompt_harm_label=["harmful", "unharmful", "harmful", None],
        adversarial=[True, True, False],
    ),
}  # fmt: skip


def write_set(root: Path, name: str, *, ending: str = ".jsonl", **changed: Rows) -> Path:
    """The made-up set as local files; `changed` replaces some splits."""
    folder = root / INVENTED[name].folder
    folder.mkdir(parents=True)
    for split, content in {**INVENTED[name].local, **changed}.items():
        write(folder / f"{split}{ending}", content)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub has the made-up sets, and no local folder has any."""

    def load_dataset(name: str, config: str | None, *, split: str) -> HubTable:
        known = next(one for one in INVENTED.values() if (name, config, split) in one.hub)
        names = {"label": known.class_names} if known.class_names else {}
        return HubTable(known.hub[name, config, split], **names)

    monkeypatch.setitem(sys.modules, "datasets", stand_in_for_datasets(load_dataset))
    monkeypatch.setenv("SIDELIGHT_DATA", str(tmp_path))


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_local_format_and_the_hub_load_the_same_dataset(name, tmp_path, hub):
    for ending in WRITERS:
        write_set(tmp_path / ending, name, ending=ending)
    lines, *rest = (load_data_set(name, root=tmp_path / ending) for ending in WRITERS)
    for another in (*rest, load_data_set(name)):
        for split in SPLITS:
            ours, theirs = getattr(lines, split), getattr(another, split)
            assert ours.task == theirs.task == INVENTED[name].task
            assert ours.content_hash == theirs.content_hash
        assert {key: [*rows] for key, rows in lines.subsets.items()} == {
            key: [*rows] for key, rows in another.subsets.items()
        }
        assert lines.notes == another.notes


def test_local_folder_takes_precedence_over_the_hub(hub, tmp_path, monkeypatch):
    rows = [{**row, "text": f"own {row['text']}"} for row in INVENTED["imdb"].local["test"]]
    write_set(tmp_path, "imdb", test=rows)
    assert load_data_set("imdb").test.items[0].text == "own test text 0"
    monkeypatch.setenv("SIDELIGHT_DATA", str(tmp_path / "absent"))
    with pytest.raises(SidelightError, match=r"SIDELIGHT_DATA is '.*absent'"):
        load_data_set("imdb")


def test_validation_uses_the_official_split_or_a_training_share(tmp_path):
    write_set(tmp_path, "emotion")
    official = load_data_set("emotion", root=tmp_path)
    assert all(item.text.startswith("validation") for item in official.validation.items)
    write_set(tmp_path, "imdb")
    shared = load_data_set("imdb", root=tmp_path)
    texts = {item.text for split in (shared.training, shared.validation) for item in split.items}
    assert (len(shared.training), len(shared.validation), len(texts)) == (14, 6, 20)
    assert "There is no validation split: 30 % of the training rows are held out." in shared.notes


def test_unlabelled_rows_are_skipped_and_counted(tmp_path):
    write_set(tmp_path, "wildguardmix")
    loaded = load_data_set("wildguardmix", root=tmp_path)
    assert len(loaded.test) == 15
    for name in ("train", "test"):
        assert f"The {name} split: Left out 5 rows without a label." in loaded.notes
    # Unlabelled rows count: what is compared with the official number is the rows of the file.
    assert "The test split has 20 rows; the official one has 1,725." in loaded.notes


@pytest.mark.parametrize(
    ("name", "column", "subsets"),
    [
        ("toxicchat", "human_annotation", {"human": True}),
        ("wildguardmix", "adversarial", {"adversarial": True, "vanilla": False}),
    ],
)
def test_subsets_are_test_row_positions_and_missing_ones_are_noted(name, column, subsets, tmp_path):
    write_set(tmp_path, name)
    loaded = load_data_set(name, root=tmp_path)
    assert loaded.subsets.keys() == subsets.keys()
    for subset, value in subsets.items():
        rows = [row.get(column) for row in loaded.test.rows]
        assert list(loaded.subsets[subset]) == [i for i, cell in enumerate(rows) if cell == value]
    plain = [{k: v for k, v in row.items() if k != column} for row in INVENTED[name].local["test"]]
    write_set(tmp_path / "plain", name, test=plain)
    loaded = load_data_set(name, root=tmp_path / "plain")
    assert not loaded.subsets
    assert any(f"(column '{column}')" in note for note in loaded.notes)


def test_partial_split_is_noted_with_its_row_count(tmp_path):
    write_set(tmp_path, "toxicchat")
    notes = load_data_set("toxicchat", root=tmp_path).notes
    assert "The train split has 20 rows; the official one has 5,082." in notes


def test_train_test_duplicates_are_counted_with_hub_column_names(
    tmp_path,
):
    remote = INVENTED["toxicchat"].hub["lmsys/toxic-chat", "toxicchat0124", "train"]
    test = [*INVENTED["toxicchat"].local["test"], {"text": " TRAIN  text 3", "toxicity": 1}]
    write_set(tmp_path, "toxicchat", train=remote, test=test)
    loaded = load_data_set("toxicchat", root=tmp_path)
    assert {item.text for item in loaded.training.items} <= {f"train text {n}" for n in range(20)}
    assert "1 of 21 test texts also occur in the training data." in loaded.notes


def test_unreadable_dataset_errors_name_location_and_remedy(tmp_path, monkeypatch):
    def refused(name: str, says: str, root: Path | None = tmp_path) -> None:
        with pytest.raises(SidelightError, match=says):
            load_data_set(name, root=root)

    refused("toxic-chat", "Did you mean 'toxicchat'")
    refused("sst2", rf"'{tmp_path / 'sst2'}' with train_sentences, validation, test")
    folder = write_set(tmp_path, "imdb")
    (folder / "test.jsonl").rename(folder / "tests.jsonl")
    refused("imdb", r"lacks the split 'test'; it contains tests\.jsonl, train")
    write(folder / "train.csv", INVENTED["imdb"].local["train"])
    refused("imdb", r"several files for 'train': train\.csv, train\.js")
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setenv("SIDELIGHT_DATA", str(tmp_path))
    refused("sst2", r"pip install '\.\[datasets\].*set SIDELIGHT_DATA to", None)


def test_from_files_builds_a_dataset_from_any_files(tmp_path):
    cells = {"urgent": ["no", "yes"]}
    train, held_out, test = (
        write(tmp_path / f"{split}.jsonl", rows_for(split, "words", **cells))
        for split in ("urgent_train", "urgent_dev", "urgent_test")
    )
    loaded = from_files(train, str(test), held_out, text="words", label="urgent")
    assert loaded.title == "urgent_train, tested on urgent_test"
    assert [len(getattr(loaded, split)) for split in SPLITS] == [20, 20, 20]
    assert loaded.test.task == Task("binary", ("no", "yes"))
