"""The bundled demonstration data: their tasks, their balance, and no text in both parts."""

import re
from pathlib import Path

import numpy as np
import pytest

import sidelight
from sidelight.data.examples import LabelledExamples
from sidelight.data.loading import load_examples
from sidelight.types import Task

INTENTS = ("account_access", "billing", "cancel", "other", "refund", "technical_issue")
# The task, and the texts of each label for training and for testing.
DEMONSTRATIONS = {
    "prompt_injection": (Task("binary", ("benign", "injection")), 80, 30),
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
