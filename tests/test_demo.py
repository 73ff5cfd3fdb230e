"""The demonstration with the packaged guards, and its data: balanced, no text in both parts."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import sidelight
from sidelight import demo
from sidelight.data.examples import LabelledExamples
from sidelight.data.guards import find_guard, guard_names
from sidelight.data.loading import load_examples
from sidelight.policy.rules import read_policy
from sidelight.probes.artifact import load_probe
from sidelight.types import Task
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
def test_demo_data_are_balanced_and_share_no_text(name: str, warned):
    task, *sizes = DEMONSTRATIONS[name]
    folder = Path(sidelight.__file__).parent / "demo" / "data"
    files = [folder / f"{name}_{split}.jsonl" for split in ("train", "test")]
    assert [load_examples(file).task for file in files] == [task] * 2
    warned()
    training, test = (load_examples(file, task=task) for file in files)
    for examples, size in zip((training, test), sizes, strict=True):
        assert np.bincount(examples.labels).tolist() == [size] * len(task.labels)
    assert warned() == []
    texts = [" ".join(item.text.casefold().split()) for item in (*training.items, *test.items)]
    assert len(set(texts)) == len(texts)
    runs = five_grams(test)
    assert len(runs & five_grams(training)) <= SHARED_FIVE_GRAMS * len(runs)


def test_demo_policy_covers_every_guard_and_blocks_injections():
    policy = read_policy(demo.POLICY)
    for side, reads in (("input", "prompt"), ("output", "response")):
        guards = [name for name in guard_names() if find_guard(name).card.reads == reads]
        assert sorted(policy.side(side)) == sorted(guards)
    assert policy.input["injection"].mode == "block"


def test_demo_without_guards_package_prints_install_hint(tmp_path, monkeypatch, capsys):
    # Nothing of the environment, as if no package were installed.
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert cli("demo") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (error,) = captured.err.splitlines()
    assert "In a clone of Sidelight, run `pip install './packages/guards'`." in error


def boxes(text: str) -> dict[str, str]:
    """The content of each panel by its title, in lines as they are shown."""
    boxes = re.findall(r"^╭─ (.+?) ─*╮$(.+?)^╰─+╯$", text, re.DOTALL | re.MULTILINE)
    return {title: "\n".join(re.findall(r"│ (.*?) *│", lines)) for title, lines in boxes}


@pytest.mark.slow
def test_demo_guards_five_chats_and_trains_probe(tmp_path, monkeypatch, capfd):
    """With the embedded model and the packaged probes, as `make demo`."""
    monkeypatch.setenv("SIDELIGHT_CACHE", str(tmp_path / "a cache"))
    assert cli("demo", "--port", "0") == 0
    captured = capfd.readouterr()
    # No warning, and no progress but that of unpacking the model once.
    assert not re.search("Warning|Training", captured.err)
    chats = boxes(captured.out)
    titles = [f"{number}. {title}" for number, title in enumerate(demo.CHATS, 1)]
    assert [*chats] == [*titles, "A question to the new probe"]
    question, document, toxic, personal, tool, refund = chats.values()
    for blocked in (document, tool):
        assert "400 content_filter" in blocked
        assert "injection: injection" in blocked
    for answered in (question, toxic, personal, refund):
        assert "400" not in answered
        assert "injection" in answered.split("not flagged: ")[1]
    assert "toxicity: toxic" in toxic
    assert "toxicity:" not in question
    assert "+1 415 555 0132[PHONE_NUMBER]" in personal
    assert re.search(r"intent: (refund|billing)", refund)
    # On texts that the probe was not trained on, of six classes alike.
    found, of = map(
        int, re.search(r"Out of fold: Classifies (\d+) of (\d+)", captured.out).groups()
    )
    assert of == 240
    assert found > 0.5 * of
    commands = [
        shlex.split(line) for line in captured.out.split("Try next:")[1].splitlines() if line
    ]
    assert [words[1] for words in commands] == ["predict", "serve", "train"]
    # As a shell takes it, whose words end at blanks.
    probes = [commands[1][at + 1] for at, word in enumerate(commands[1]) if word == "--probe"]
    assert probes == [demo.GUARDS, str(tmp_path / "a cache" / "demo" / demo.INTENT)]
    assert load_probe(Path(probes[1])).name == demo.INTENT
    assert cli(*commands[0][1:]) == 0
    assert json.loads(capfd.readouterr().out)["flagged"]
