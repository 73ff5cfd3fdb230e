"""Validation score over the learning rate, and over the number of labels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Int

from sidelight.mechanisms.base import spec_titles
from sidelight.training.dataset import ProbeDataset
from sidelight.training.loop import TrainingSet, train_mechanisms
from sidelight.training.run import validation_score
from sidelight.training.settings import Job, TrainingSettings

# As in the paper's search, and on to where the cheap mechanisms do best.
LEARNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
# Steps of a training on few labels at least, where an epoch is a step or two.
_LEAST_STEPS = 60


@dataclass(frozen=True)
class Point:
    """One training of a curve.

    Attributes:
        mechanism: With its options where several of that name were given.
        at: Learning rate, or number of labels.
        draw: Seed of the probe, or number of the draw of labels.
        score: On validation data; see ``validation_score``.
    """

    mechanism: str
    at: float
    draw: int
    score: float


def sensitivity(
    dataset: ProbeDataset, jobs: Sequence[Job], *, rates: Sequence[float] = LEARNING_RATES
) -> list[Point]:
    """Every job with every learning rate, from one reading of the states per epoch.

    A rate at which a job diverges has no point.
    """
    named = list(zip(_titles(jobs), jobs, strict=True))
    varied = [(name, _at_rate(job, rate)) for name, job in named for rate in rates]
    scores = _scores(dataset, dataset.training.training_set(), [job for _, job in varied])
    return [
        Point(name, job.settings.learning_rate, job.seed, score)
        for (name, job), score in zip(varied, scores, strict=True)
        if score is not None
    ]


def learning_curve(
    dataset: ProbeDataset, jobs: Sequence[Job], *, draws: int, counts: Sequence[int] | None = None
) -> list[Point]:
    """Every job on growing parts of the training labels; validation labels stay as they are.

    A draw's smaller parts are in its larger ones, and classes keep their shares in each. Few labels
    get more epochs, so that no training ends within a handful of steps.

    Args:
        study: The splits.
        jobs: One per mechanism; each draw has another seed, of the parts and of the parameters.
        draws: Draws of the labels.
        counts: Numbers of labels; None takes 16, 64, 256... and all.
    """
    points: list[Point] = []
    for draw in range(draws):
        order = _drawn(dataset.training.labels, seed=draw)
        for count in counts or label_counts(len(order)):
            part = dataset.training.select(order[:count]).training_set()
            seeded = [_for_few(replace(job, seed=job.seed + draw), count) for job in jobs]
            scores = _scores(dataset, part, seeded)
            make = partial(Point, at=float(count), draw=draw)
            named = zip(_titles(jobs), scores, strict=True)
            points += [make(name, score=score) for name, score in named if score is not None]
    return points


def label_counts(total: int) -> tuple[int, ...]:
    """16 and its multiples by four below the total, then the total."""
    steps = max(0, math.ceil(math.log(total / 16, 4))) if total > 16 else 0
    return (*(16 * 4**step for step in range(steps)), total)


def _scores(
    dataset: ProbeDataset, training: TrainingSet, jobs: Sequence[Job]
) -> list[float | None]:
    """On the validation texts; None for a job that diverged."""
    trained = train_mechanisms(
        jobs,
        task=dataset.task,
        training=training,
        validation=dataset.validation.training_set(),
        device=dataset.backbone.device,
    )
    labels = dataset.validation.labels
    return [one and validation_score(dataset.task, one.logits, labels) for one in trained]


def _at_rate(job: Job, rate: float) -> Job:
    return replace(job, settings=replace(job.settings, learning_rate=rate))


def _for_few(job: Job, count: int) -> Job:
    settings: TrainingSettings = job.settings
    batch = max(1, min(settings.batch_size, count // 4))
    epochs = max(settings.epochs, math.ceil(_LEAST_STEPS * batch / count))
    # The best epoch is kept either way.
    patience = max(settings.patience, epochs // 2)
    return replace(
        job, settings=replace(settings, batch_size=batch, epochs=epochs, patience=patience)
    )


def _drawn(labels: np.ndarray, *, seed: int) -> Int[np.ndarray, " text"]:
    """Texts in random order, such that every start of it has each class by its share.

    The first text of each class comes before all others. A text of several labels counts for the
    first of them.
    """
    one = labels if labels.ndim == 1 else np.where(labels.any(1), labels.argmax(1), -1)
    random = np.random.default_rng(seed)
    place = np.empty(len(one))
    for name in np.unique(one):
        own = random.permutation(np.flatnonzero(one == name))
        place[own] = (np.arange(len(own)) + 0.5 * (np.arange(len(own)) > 0)) / len(own)
    return np.lexsort((random.random(len(one)), place))


def _titles(jobs: Sequence[Job]) -> list[str]:
    return spec_titles([job.spec for job in jobs])
