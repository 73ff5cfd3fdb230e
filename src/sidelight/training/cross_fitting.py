"""Whether examples can be trained on, and what is doubtful about them.

Few texts: each of them both teaches the probe and judges it.

A fold is judged by what the other folds taught. Calibration, threshold and figures are made from
these logits of all texts; the probe itself is trained on all texts, for every epoch. A part held
out of few texts would be missed in training, and too small to stop or choose by
(docs/results.md has the comparison).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int

from sidelight.data.examples import LabelledExamples
from sidelight.data.splitting import validation_share
from sidelight.errors import SidelightError
from sidelight.prompts import EncodedPrompt
from sidelight.training.dataset import ProbeDataset
from sidelight.training.loop import Trained, train_mechanisms
from sidelight.training.settings import FEW_TEXTS, Job
from sidelight.training.tfidf import fit_tfidf
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


def rarity(validation: LabelledExamples) -> list[str]:
    """Says where few texts of a class make the chosen threshold and calibration doubtful."""
    smallest = int(class_counts(validation.task, validation.labels).min())
    if smallest >= 10:
        return []
    return [
        f"The rarest class has {smallest} validation texts: threshold, calibration and the "
        "validation figures are rough. More labelled texts of it would help most."
    ]


def shared_texts(training: LabelledExamples, validation: LabelledExamples) -> list[str]:
    """Says how many texts are on both sides, with the same response if any."""
    seen = {(item.text, item.response) for item in training.items}
    shared = sum((item.text, item.response) in seen for item in validation.items)
    return [f"{shared} validation texts are also training texts."] if shared else []


def require_same_task(training: LabelledExamples, validation: LabelledExamples) -> None:
    """Checks that validation can choose what training needs.

    Raises:
        SidelightError: Other labels, no text of a class of a binary task, or of a multi-label task
            no label that some texts have and others have not.
    """
    task = training.task
    if validation.task != task:
        raise SidelightError(
            f"The validation data has the labels {validation.task}, the training data {task}. "
            "Load it with task=training.task."
        )
    counts = class_counts(task, validation.labels)
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


FOLDS = 5

Folds = tuple[Int[np.ndarray, " _"], ...]


def choose_folds(examples: LabelledExamples) -> Folds:
    """Numbers of the texts of each fold; none if there are many texts, or a fold lacks a class."""
    task, labels = examples.task, examples.labels
    rarest = int(class_counts(task, labels).min())
    if len(examples) >= FEW_TEXTS or min(rarest, examples.distinct) < FOLDS:
        return ()
    folds = examples.folds(FOLDS, seed=0)
    counts = [class_counts(task, labels[fold]).min() for fold in folds]
    return folds if min(counts) else ()


def why_held_out(examples: LabelledExamples) -> list[str]:
    """Says why few texts are not cross-fitted, in place of folds of which one lacks a class."""
    if len(examples) >= FEW_TEXTS:
        return []
    task, counts = examples.task, class_counts(examples.task, examples.labels)
    rarest = int(counts.argmin())
    return [
        f"Few texts are cross-fitted, but of '{task.labels[rarest]}' there are {counts[rarest]}, "
        f"too few or too alike for {FOLDS} folds: {validation_share(len(examples)):.0%} of all "
        "texts were held out from training to choose by. More texts of it would help most."
    ]


def cross_fit(jobs: Sequence[Job], whole: ProbeDataset, folds: Folds) -> list[Trained | None]:
    """Each job trained on all texts; the logits of a text are those of its fold.

    Args:
        jobs: What to train.
        whole: All texts, as both of its splits.
        folds: Of ``choose_folds``.

    Returns:
        None for a job that diverged, on a fold or on all texts.
    """
    judged = judge_by_folds(jobs, whole, folds)
    final = train_mechanisms(
        jobs,
        task=whole.task,
        training=whole.training.training_set(),
        validation=None,
        device=whole.backbone.device,
        title="Training on all texts",
    )
    return [
        None if one is None or logits is None else replace(one, logits=logits)
        for one, logits in zip(final, judged, strict=True)
    ]


def judge_by_folds(
    jobs: Sequence[Job], whole: ProbeDataset, folds: Folds
) -> list[Float[np.ndarray, "text output"] | None]:
    """For each job the logits of all texts, each from what the other folds taught.

    Args:
        jobs: What to train.
        whole: All texts, as both of its splits.
        folds: Of ``choose_folds``.

    Returns:
        None for a job that diverged.
    """
    logits = [_blank(whole) for _ in jobs]
    diverged: set[int] = set()
    for place, fold in enumerate(folds, 1):
        part = _without(whole, fold)
        trained = train_mechanisms(
            jobs,
            task=whole.task,
            training=part.training.training_set(),
            validation=None,
            judged=part.validation.training_set(),
            device=whole.backbone.device,
            title=f"Training, fold {place} of {len(folds)}",
        )
        for number, one in enumerate(trained):
            if one is None:
                diverged.add(number)
            else:
                logits[number][fold] = one.logits
    return [None if number in diverged else own for number, own in enumerate(logits)]


def cross_fit_baseline(whole: ProbeDataset, folds: Folds) -> Float[np.ndarray, "text output"]:
    """The logits of TF-IDF with logistic regression, made in the same way."""
    logits = _blank(whole)
    for fold in folds:
        part = _without(whole, fold)
        words = fit_tfidf(part.training.texts, part.training.labels, part.task)
        logits[fold] = words.logits(part.validation.texts)
    return logits


def _blank(whole: ProbeDataset) -> Float[np.ndarray, "text output"]:
    return np.empty((len(whole.training), whole.task.outputs))


def _without(whole: ProbeDataset, fold: Int[np.ndarray, " text"]) -> ProbeDataset:
    """The other folds to learn from, and this one."""
    rest = np.setdiff1d(np.arange(len(whole.training)), fold)
    return ProbeDataset(whole.backbone, whole.training.select(rest), whole.training.select(fold))
