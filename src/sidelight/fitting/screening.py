"""Whether examples can be trained on, and what is doubtful about them."""

from collections.abc import Sequence

import numpy as np

from sidelight.data import Examples
from sidelight.errors import SidelightError
from sidelight.prompts import EncodedPrompt
from sidelight.types import Task


def cut_warnings(prompts: Sequence[EncodedPrompt], max_tokens: int) -> list[str]:
    """Says how many texts were cut."""
    cut = [prompt for prompt in prompts if prompt.dropped]
    if not cut:
        return []
    limit = min(max_tokens, max(map(len, cut)))
    return [
        f"{len(cut)} of {len(prompts)} texts were cut to {limit} tokens for training "
        "(--max-tokens); judging never cuts."
    ]


def rarity(validation: Examples) -> list[str]:
    """Says where few texts of a class make the chosen threshold and calibration doubtful."""
    smallest = int(class_counts(task_of(validation), labels_of(validation)).min())
    if smallest >= 10:
        return []
    return [
        f"The rarest class has {smallest} validation texts: threshold, calibration and the "
        "validation figures are rough. More labelled texts of it would help most."
    ]


def shared_texts(training: Examples, validation: Examples) -> list[str]:
    """Says how many texts are on both sides, with the same response if any."""
    seen = {(item.text, item.response) for item in training.items}
    shared = sum((item.text, item.response) in seen for item in validation.items)
    return [f"{shared} validation texts are also training texts."] if shared else []


def require_same_task(training: Examples, validation: Examples) -> None:
    """Checks that validation can choose what training needs.

    Raises:
        SidelightError: Other labels, no text of a class of a binary task, or of a multi-label task
            no label that some texts have and others have not.
    """
    task = task_of(training)
    if validation.task != task:
        raise SidelightError(
            f"The validation data has the labels {validation.task}, the training data {task}. "
            "Load it with task=training.task."
        )
    counts = class_counts(task, labels_of(validation))
    missing = [label for label, count in zip(task.labels, counts, strict=True) if count == 0]
    if missing and task.kind == "binary":
        raise SidelightError(
            f"The validation data has no '{missing[0]}' text, so no threshold can be chosen. "
            "Add some, or leave validation data out: part of the training data is held out then."
        )
    if task.kind == "multilabel" and not ((counts > 0) & (counts < len(validation))).any():
        raise SidelightError(
            "The validation data has no label that some texts have and others have not, so no "
            "threshold can be chosen. Add texts of both."
        )


def class_counts(task: Task, labels: np.ndarray) -> np.ndarray:
    """Texts of each label."""
    if task.kind == "multilabel":
        return labels.sum(0)
    return np.bincount(labels, minlength=len(task.labels))


def labels_of(examples: Examples) -> np.ndarray:
    """The labels.

    Raises:
        SidelightError: There are none.
    """
    if examples.labels is None:
        raise SidelightError(
            "These examples have no labels. Name the column with --label (label= in Python)."
        )
    return examples.labels


def task_of(examples: Examples) -> Task:
    """The task of labelled examples."""
    assert examples.task is not None
    return examples.task
