"""Few texts: each of them both teaches the probe and judges it.

A fold is judged by what the other folds taught. Calibration, threshold and figures are made from
these logits of all texts; the probe itself is trained on all texts, for every epoch. A part held
out of few texts would be missed in training, and too small to stop or choose by
(docs/results.md has the comparison).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int

from sidelight.baselines import TfIdf
from sidelight.data import Examples, validation_share
from sidelight.fitting.automatic import FEW_TEXTS
from sidelight.fitting.screening import class_counts, labels_of, task_of
from sidelight.study import Study
from sidelight.training import Job, Trained, train_mechanisms

FOLDS = 5

Folds = tuple[Int[np.ndarray, " _"], ...]


def choose_folds(examples: Examples) -> Folds:
    """Numbers of the texts of each fold; none if there are many texts, or a fold lacks a class."""
    task, labels = task_of(examples), labels_of(examples)
    rarest = int(class_counts(task, labels).min())
    if len(examples) >= FEW_TEXTS or min(rarest, examples.distinct) < FOLDS:
        return ()
    folds = examples.folds(FOLDS, seed=0)
    counts = [class_counts(task, labels[fold]).min() for fold in folds]
    return folds if min(counts) else ()


def why_held_out(examples: Examples) -> list[str]:
    """Says why few texts are not cross-fitted, in place of folds of which one lacks a class."""
    if len(examples) >= FEW_TEXTS:
        return []
    task, counts = task_of(examples), class_counts(task_of(examples), labels_of(examples))
    rarest = int(counts.argmin())
    return [
        f"Few texts are cross-fitted, but of '{task.labels[rarest]}' there are {counts[rarest]}, "
        f"too few or too alike for {FOLDS} folds: {validation_share(len(examples)):.0%} of all "
        "texts were held out from training to choose by. More texts of it would help most."
    ]


def cross_fit(jobs: Sequence[Job], whole: Study, folds: Folds) -> list[Trained | None]:
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
    jobs: Sequence[Job], whole: Study, folds: Folds
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


def cross_fit_baseline(whole: Study, folds: Folds) -> Float[np.ndarray, "text output"]:
    """The logits of TF-IDF with logistic regression, made in the same way."""
    logits = _blank(whole)
    for fold in folds:
        part = _without(whole, fold)
        logits[fold] = TfIdf().fit(part, seed=0).logits(part.validation)
    return logits


def _blank(whole: Study) -> Float[np.ndarray, "text output"]:
    return np.empty((len(whole.training), whole.task.outputs))


def _without(whole: Study, fold: Int[np.ndarray, " text"]) -> Study:
    """The other folds to learn from, and this one."""
    rest = np.setdiff1d(np.arange(len(whole.training)), fold)
    return Study(whole.backbone, whole.training.select(rest), whole.training.select(fold))
