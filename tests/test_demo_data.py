"""The bundled demonstration data: their tasks, their balance, and no text in both parts."""

import re
from pathlib import Path

import numpy as np
import pytest

import sidelight
from sidelight.data.examples import LabelledExamples
from sidelight.data.loading import load_examples
from sidelight.types import Task

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


def word_runs(examples: LabelledExamples, length: int) -> set[tuple[str, ...]]:
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
    labels = demonstration(name, part).labels
    assert np.bincount(labels).tolist() == [per_label] * len(DEMONSTRATIONS[name].labels)


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_demonstration_train_and_test_share_no_text(name: str) -> None:
    training, test = demonstration(name, "train"), demonstration(name, "test")
    texts = [" ".join(item.text.casefold().split()) for item in (*training.items, *test.items)]
    assert len(set(texts)) == len(texts)
    runs = word_runs(test, 5)
    assert len(runs & word_runs(training, 5)) <= SHARED_FIVE_GRAMS * len(runs)
