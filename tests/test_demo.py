"""The demonstration, and its bundled data: tasks, balance, and no text in both parts."""

import re
from pathlib import Path

import numpy as np
import pytest

import sidelight
from sidelight import demo
from sidelight.artifact import load_probe
from sidelight.data.examples import LabelledExamples
from sidelight.data.loading import load_examples
from sidelight.types import Task
from worlds.data import brief_trainings, install_guards
from worlds.models import saved
from worlds.servers import cli

INTENTS = ("account_access", "billing", "cancel", "other", "refund", "technical_issue")
# The task, and the texts of each label for training and for testing.
DEMONSTRATIONS = {
    "intent": (Task("multiclass", INTENTS), 40, 15),
    "urgency": (Task("binary", ("routine", "urgent")), 80, 30),
}
SHARED_FIVE_GRAMS = 0.005  # "at the end of the" may occur anywhere; a copied sentence may not.


def five_grams(examples: LabelledExamples) -> set[tuple[str, ...]]:
    texts = [re.findall(r"\w+", item.text.casefold()) for item in examples.items]
    return {tuple(words[at : at + 5]) for words in texts for at in range(len(words) - 4)}


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_demonstration_data_are_balanced_of_the_documented_task_and_share_no_text(name: str):
    task, *sizes = DEMONSTRATIONS[name]
    folder = Path(sidelight.__file__).parent / "demo" / "data"
    files = [folder / f"{name}_{part}.jsonl" for part in ("train", "test")]
    assert [load_examples(file).task for file in files] == [task] * 2
    training, test = (load_examples(file, task=task) for file in files)
    for examples, size in zip((training, test), sizes, strict=True):
        assert examples.warnings == ()
        assert np.bincount(examples.labels).tolist() == [size] * len(task.labels)
    texts = [" ".join(item.text.casefold().split()) for item in (*training.items, *test.items)]
    assert len(set(texts)) == len(texts)
    runs = five_grams(test)
    assert len(runs & five_grams(training)) <= SHARED_FIVE_GRAMS * len(runs)


def test_the_demonstrations_guard_learns_packaged_texts_of_both_labels_alike():
    packaged = {item.text_key for item in load_examples("guard:injection").items}
    training, test = demo.demo_texts()["injection"]
    assert {item.text_key for item in training.items} <= packaged
    assert np.ptp(training.label_counts) == 0
    assert demo.demo_texts()["injection"][0].items == training.items
    assert load_examples(test).task == training.task


def test_the_demonstration_without_the_guards_package_says_first_what_to_install(
    tmp_path, monkeypatch, capsys
):
    # Nothing of the environment, as if no package were installed.
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert cli("demo") == 2
    said = capsys.readouterr()
    assert said.out == ""
    (error,) = said.err.splitlines()
    assert "Run `pip install sidelight-guards`." in error


def test_the_demonstration_trains_serves_and_asks(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SIDELIGHT_CACHE", str(tmp_path / "a cache"))
    install_guards(tmp_path, monkeypatch, "demo_guards")
    monkeypatch.setattr(demo, "EMBEDDED_NAME", saved(tiny, tmp_path / "smollm2"))
    texts = {"shouts": (load_examples("guard:shouts"), "guard:shouts:unseen")}
    monkeypatch.setattr(demo, "demo_texts", lambda: texts)
    with brief_trainings(tmp_path, monkeypatch):
        assert cli("demo", "--port", "0") == 0
    said = capsys.readouterr().out
    assert "Training 'shouts' on 60 texts" in said
    assert "On 24 other texts: " in said
    assert re.search(r"shouts: (OTHER|SHOUTING)", said)
    folder = tmp_path / "a cache" / "demo" / "shouts"
    # As a shell takes it, whose words end at blanks.
    assert f"sidelight serve --playground --probe '{folder}'" in said
    assert load_probe(folder).name == "shouts"
