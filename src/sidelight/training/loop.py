"""Trains many mechanisms from one activation cache: each shard that is read updates all of them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from sidelight.errors import SidelightError
from sidelight.mechanisms.base import Geometry, Mechanism
from sidelight.progress import Progress, progress
from sidelight.ragged import Ragged
from sidelight.standardisation import Standardisation
from sidelight.states.cache import Shard, States
from sidelight.training.batches import batches, on_device
from sidelight.training.layer_weights import layer_weights
from sidelight.training.run import TrainingRun, make_loss, measured, pooled_sample, validation_score
from sidelight.training.settings import Job, require_labels_of_parts
from sidelight.types import Task

_VALIDATION_BATCH = 128


@dataclass(frozen=True)
class TrainingSet:
    """Hidden states and labels of one split.

    Attributes:
        states: Of every text.
        labels: As in ``Examples.labels``, in the order of the texts.
    """

    states: States
    labels: np.ndarray


@dataclass(frozen=True)
class Trained:
    """A trained mechanism.

    Attributes:
        job: What was asked for.
        mechanism: With the parameters of its best epoch.
        standardisation: Of the states that it reads.
        logits: Of the texts to judge, ``[text, output]``, of the best epoch, in the order of the
            texts.
        history: Validation score of each epoch; empty without validation texts.
        best_epoch: Counted from 1.
    """

    job: Job
    mechanism: Mechanism
    standardisation: Standardisation
    logits: np.ndarray
    history: tuple[float, ...]
    best_epoch: int


def train_mechanisms(
    jobs: Sequence[Job],
    *,
    task: Task,
    training: TrainingSet,
    validation: TrainingSet | None,
    judged: TrainingSet | None = None,
    device: torch.device | str = "cpu",
    title: str = "Training",
) -> list[Trained | None]:
    """All jobs, trained side by side; the result of a job does not depend on its neighbours.

    Args:
        jobs: What to train.
        task: The classes.
        training: What the parameters are fitted to.
        validation: What early stopping looks at; None trains every epoch and keeps the last.
        judged: What gets logits when training is over; None: the validation texts, if any.
        device: Where to train.
        title: Of the progress bar.

    Returns:
        None for a job that diverged: its numbers are not finite.
    """
    place = torch.device(device)
    run = _Run(task=task, training=training, validation=validation, device=place)
    trainees = run.enrol(jobs)
    epochs = max((trainee.job.settings.epochs for trainee in trainees), default=0)
    tokens = sum(training.states.plan.tokens)
    with progress(title, epochs * tokens, unit="tokens") as shown:
        for epoch in range(epochs):
            active = [t for t in trainees if not (t.has_finished or t.has_diverged)]
            if not active:
                break
            run.train_epoch(active, epoch, shown)
            run.end_epoch(active)
    return run.results(trainees, judged or validation)


def divergence(job: Job) -> SidelightError:
    """The error to raise for a job that diverged."""
    return SidelightError(
        f"Training '{job.spec.name}' with seed {job.seed} diverged: its numbers are not finite. "
        f"Lower --learning-rate (it was {job.settings.learning_rate})."
    )


class _Run:
    def __init__(
        self,
        *,
        task: Task,
        training: TrainingSet,
        validation: TrainingSet | None,
        device: torch.device,
    ):
        self._task = task
        self._training = training
        self._validation = validation
        self._device = device
        sizes = training.states.fingerprint
        self._geometry = Geometry(sizes.layers, sizes.width, task.outputs)
        self._labels = torch.from_numpy(training.labels).to(device)
        self._raw = Standardisation.identity(self._geometry).to(device)
        self._measured = measured(training.states).to(device)

    @cached_property
    def _weighted(self) -> Standardisation:
        """As measured, with predictive layer weights: only computed if some job wants them."""
        pooled, rows = pooled_sample(self._training.states)
        labels = self._training.labels[rows.numpy()]
        return self._measured.weighted(layer_weights(pooled, labels, task=self._task))

    def standardisation(self, job: Job) -> Standardisation:
        if not job.standardise:
            return self._raw
        return self._weighted if job.settings.layer_weights == "predictive" else self._measured

    def enrol(self, jobs: Sequence[Job]) -> list[TrainingRun]:
        if any(job.settings.long_inputs for job in jobs):
            require_labels_of_parts(self._task)
        texts = len(self._training.labels)
        is_written = self._training.states.reads.side == "response"
        fitted = [replace(job, settings=job.settings.fitted_to(texts)) for job in jobs]
        return [
            TrainingRun(
                job,
                self._geometry,
                steps=self._steps(job.settings.batch_size),
                loss=make_loss(
                    self._task,
                    self._labels,
                    balanced=job.settings.class_weight == "balanced",
                ),
                reads_beginnings=job.settings.beginnings and is_written,
                device=self._device,
            )
            for job in fitted
        ]

    def _steps(self, batch_size: int) -> int:
        """Of an epoch, at most."""
        sizes = [len(rows) for rows in self._training.states.plan.rows]
        # A shard's random first cut can add a batch.
        whole = sum(math.ceil(size / batch_size) + 1 for size in sizes if size >= batch_size)
        return whole + math.ceil(sum(size for size in sizes if size < batch_size) / batch_size)

    def train_epoch(self, trainees: Sequence[TrainingRun], epoch: int, shown: Progress) -> None:
        order = torch.randperm(
            len(self._training.states), generator=torch.Generator().manual_seed(epoch)
        )
        for index in order.tolist():
            shard = self._training.states.read(index)
            for group in _grouped_by_batches(trainees):
                self._train_group(group, shard, epoch=epoch)
            shown.advance(shard.hidden.shape[1])
        for trainee in trainees:
            trainee.finish_batch()

    def _train_group(self, group: Sequence[TrainingRun], shard: Shard, *, epoch: int) -> None:
        job = group[0].job
        shuffle = torch.Generator().manual_seed(job.seed * 7919 + epoch)
        for chosen in batches(shard, size=job.settings.batch_size, shuffle=shuffle):
            batch = on_device(chosen, self._device, torch.bfloat16)
            labels = self._labels[batch.rows]
            parts = self._project(batch, group)
            losses = [t.loss(part, labels) for t, part in zip(group, parts, strict=True)]
            # The texts of a wide backbone's shard can be fewer than a batch: they are a part of it.
            share = min(1.0, len(shard.rows) / job.settings.batch_size)
            # Parameters are disjoint, so the sum's gradient is each one's own.
            (torch.stack(losses).sum() * share).backward()
            for trainee in group:
                trainee.take(share)

    def _project(self, batch: Shard, trainees: Sequence[TrainingRun]) -> list[Ragged]:
        """Each trainee's columns of every token, from one matmul a layer."""
        dtype = batch.hidden.dtype
        folded = [
            self.standardisation(t.job).fold(t.mechanism.columns(), dtype=dtype) for t in trainees
        ]
        weight = torch.cat([own.weight for own in folded], 2)
        # Rounded like the states; calibration, fitted in float32, absorbs what that moves.
        shift = torch.cat([own.shift for own in folded], 1).to(dtype)
        projected = torch.baddbmm(shift[:, None], batch.hidden, weight)
        parts = projected.transpose(0, 1).split([own.weight.shape[2] for own in folded], 2)
        return [Ragged(part, batch.lengths) for part in parts]  # (T, L, M)

    def end_epoch(self, trainees: Sequence[TrainingRun]) -> None:
        if self._validation is None:
            for trainee in trainees:
                trainee.end_epoch(None)
            return
        scores = self._judge(trainees, self._validation, dtype=torch.bfloat16)
        for trainee, logits in zip(trainees, scores, strict=True):
            if np.isfinite(logits).all():
                trainee.end_epoch(validation_score(self._task, logits, self._validation.labels))
            else:
                trainee.has_diverged = True

    @torch.inference_mode()
    def _judge(
        self, trainees: Sequence[TrainingRun], judged: TrainingSet, *, dtype: torch.dtype
    ) -> list[np.ndarray]:
        states = judged.states
        shape = (len(judged.labels), self._task.outputs)
        scores = {id(trainee): np.empty(shape) for trainee in trainees}
        for index in range(len(states)):
            shuffle = torch.Generator().manual_seed(0)
            for chosen in batches(states.read(index), size=_VALIDATION_BATCH, shuffle=shuffle):
                batch = on_device(chosen, self._device, dtype)
                for trainee, part in zip(trainees, self._project(batch, trainees), strict=True):
                    scores[id(trainee)][batch.rows] = trainee.logits(part).cpu().numpy()
        return [scores[id(trainee)] for trainee in trainees]

    def results(
        self, trainees: Sequence[TrainingRun], judged: TrainingSet | None
    ) -> list[Trained | None]:
        """What each gave; None where it diverged."""
        for trainee in trainees:
            trainee.restore_best()
        left = [trainee for trainee in trainees if not trainee.has_diverged]
        scores = [np.empty((0, self._task.outputs)) for _ in left]
        if judged is not None and left:
            # As in serving: the calibration is fitted to these.
            scores = self._judge(left, judged, dtype=torch.float32)
        found = {
            id(trainee): self._trained(trainee, logits)
            for trainee, logits in zip(left, scores, strict=True)
            if np.isfinite(logits).all()
        }
        return [found.get(id(trainee)) for trainee in trainees]

    def _trained(self, trainee: TrainingRun, logits: np.ndarray) -> Trained:
        return Trained(
            job=trainee.job,
            mechanism=trainee.mechanism,
            standardisation=self.standardisation(trainee.job),
            logits=logits,
            history=tuple(trainee.history),
            best_epoch=trainee.best_epoch,
        )


def _grouped_by_batches(trainees: Sequence[TrainingRun]) -> Iterator[list[TrainingRun]]:
    """Trainees that see the same texts in the same order, so that they share each batch."""
    groups: dict[tuple[int, int], list[TrainingRun]] = {}
    for trainee in trainees:
        key = (trainee.job.seed, trainee.job.settings.batch_size)
        groups.setdefault(key, []).append(trainee)
    yield from groups.values()
