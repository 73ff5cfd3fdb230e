"""Cross-fitting for small data.

Every text trains the probe, and is scored by a probe that did not train on it: a fold is scored by
probes that were trained on the other folds. Calibration, threshold and figures are made from these
logits of all texts; the probe itself is trained on all texts, for every epoch. A part held out of
few texts would be missed in training, and too small to stop or choose by (docs/results.md has the
comparison).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int

from sidelight.training.dataset import Folds, ProbeDataset
from sidelight.training.loop import Trained, train_mechanisms
from sidelight.training.settings import Job
from sidelight.training.tfidf import fit_tfidf


def cross_fit(jobs: Sequence[Job], whole: ProbeDataset, folds: Folds) -> list[Trained | None]:
    """Each job trained on all texts; the logits of a text are those of its fold.

    Args:
        jobs: What to train.
        whole: All texts, as both of its splits.
        folds: The folds that ``choose_folds`` gives.

    Returns:
        One result per job; None if it diverged, on a fold or on all texts.
    """
    scored = score_by_folds(jobs, whole, folds)
    final = train_mechanisms(
        jobs,
        training=whole.training,
        validation=None,
        device=whole.backbone.device,
        title="Training on all texts",
    )
    return [
        None if one is None or logits is None else replace(one, logits=logits)
        for one, logits in zip(final, scored, strict=True)
    ]


def score_by_folds(
    jobs: Sequence[Job], whole: ProbeDataset, folds: Folds
) -> list[Float[np.ndarray, "text output"] | None]:
    """For each job the logits of all texts, each by a probe trained on the other folds.

    Args:
        jobs: What to train.
        whole: All texts, as both of its splits.
        folds: The folds that ``choose_folds`` gives.

    Returns:
        One result per job; None if it diverged.
    """
    logits = [_blank(whole) for _ in jobs]
    diverged: set[int] = set()
    for index, fold in enumerate(folds, 1):
        part = _without(whole, fold)
        trained = train_mechanisms(
            jobs,
            training=part.training,
            validation=None,
            to_score=part.validation,
            device=whole.backbone.device,
            title=f"Training, fold {index} of {len(folds)}",
        )
        for job, one in enumerate(trained):
            if one is None:
                diverged.add(job)
            else:
                logits[job][fold] = one.logits
    return [None if job in diverged else own for job, own in enumerate(logits)]


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
    """The other folds for training, and this one to score."""
    rest = np.setdiff1d(np.arange(len(whole.training)), fold)
    return ProbeDataset(whole.backbone, whole.training.select(rest), whole.training.select(fold))
