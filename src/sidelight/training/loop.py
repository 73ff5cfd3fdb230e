"""Trains many mechanisms from one cache: each shard that is read updates all of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sidelight.errors import SidelightError
from sidelight.mechanisms.base import Geometry, Mechanism
from sidelight.mechanisms.linear import Linear
from sidelight.progress import Progress, progress
from sidelight.ragged import Ragged
from sidelight.standardisation import Projection, Standardisation
from sidelight.states.cache import Shard, States
from sidelight.training.dataset import Folds, Split
from sidelight.training.layer_weights import layer_weights, pooled_sample
from sidelight.training.linear import LinearSolution, solve_linear, strength_folds
from sidelight.training.optimisation import TrainingRun, make_loss, validation_score
from sidelight.training.settings import Job, TrainingSettings, require_labels_of_parts

_VALIDATION_BATCH = 128
# Enough tokens to know a mean to about a hundredth of a standard deviation.
_MOMENT_TOKENS = 8192


@dataclass(frozen=True)
class Trained:
    """A trained mechanism.

    Attributes:
        job: The job that it was trained for.
        mechanism: The mechanism with the parameters of its best epoch.
        standardisation: How the states that it reads are standardised.
        logits: The logits of the texts to score, ``[text, output]``, in their order.
        history: The validation score of each epoch; empty without validation texts.
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
    training: Split,
    validation: Split | None,
    to_score: Split | None = None,
    device: torch.device | str = "cpu",
    title: str = "Training",
) -> list[Trained | None]:
    """Trains all jobs side by side; the result of a job does not depend on its neighbours.

    Args:
        jobs: What to train.
        training: What the parameters are fitted to.
        validation: What early stopping looks at; None trains every epoch and keeps the last.
        to_score: The texts that get logits after training; None takes the validation texts.
        device: Where to train.
        title: Of the progress bar.

    Returns:
        The results in the order of the jobs; None for a job whose numbers are no longer finite.
    """
    trainer = _Trainer(jobs, training, validation, torch.device(device))
    trainer.solve()
    trained = [run.job.settings.epochs for run in trainer.runs if not run.has_finished]
    epochs, tokens = max(trained, default=0), sum(trainer.states.plan.tokens)
    with progress(title, epochs * tokens, unit="tokens") as shown:
        for epoch in range(epochs):
            active = [run for run in trainer.runs if not (run.has_finished or run.has_diverged)]
            if not active:
                break
            trainer.train_epoch(active, epoch, shown)
            trainer.end_epoch(active)
    return trainer.results(to_score)


def divergence(job: Job) -> SidelightError:
    """The error for a job that diverged."""
    return SidelightError(
        f"Training '{job.spec.name}' with seed {job.seed} diverged: its numbers are not finite. "
        f"Lower --learning-rate (it was {job.settings.learning_rate})."
    )


def with_strengths(jobs: Sequence[Job], training: Split, folds: Folds) -> list[Job]:
    """The jobs, where each linear one has the strength that these folds choose."""
    made: list[Job] = []
    for job in jobs:
        settings = job.settings.fitted_to(len(training), training.task)
        if job.spec.name == "linear" and settings.strength is None:
            strength = _solution(training, settings, folds).strength
            job = replace(job, settings=replace(job.settings, strength=strength))
        made.append(job)
    return made


def _solution(
    training: Split, settings: TrainingSettings, folds: Folds | None = None
) -> LinearSolution:
    if folds is None and settings.strength is None:
        folds = strength_folds(training.examples)
    return solve_linear(
        training.pooled_normalised if settings.normalise else training.pooled,
        training.labels,
        training.task,
        folds=folds or (),
        strength=settings.strength,
        balanced=settings.class_weight == "balanced",
    )


class _Trainer:
    def __init__(
        self,
        jobs: Sequence[Job],
        training: Split,
        validation: Split | None,
        device: torch.device,
    ):
        self.states = training.own_states()
        self._training = training
        self._validation = validation
        self._validation_states = None if validation is None else validation.own_states()
        self._task = task = training.task
        self._device = device
        self._labels = torch.from_numpy(training.labels).to(device)
        fingerprint = self.states.fingerprint
        geometry = Geometry(fingerprint.layers, fingerprint.width, task.outputs)
        self._raw = Standardisation.identity(geometry)
        self._scalings: dict[tuple[bool, bool, bool], Standardisation] = {}
        if any(job.settings.long_inputs for job in jobs):
            require_labels_of_parts(task)
        is_response = self.states.reads.side == "response"
        self.runs: list[TrainingRun] = []
        for job in jobs:
            settings = job.settings.fitted_to(len(training.labels), task)
            run = TrainingRun(
                replace(job, settings=settings),
                geometry,
                steps=self._steps_per_epoch(settings.batch_size),
                loss=make_loss(task, self._labels, balanced=settings.class_weight == "balanced"),
                reads_beginnings=settings.beginnings and is_response,
                device=device,
            )
            self.runs.append(run)

    def _steps_per_epoch(self, batch_size: int) -> int:
        """An upper bound of the steps in an epoch."""
        sizes = [len(rows) for rows in self.states.plan.rows]
        # A shard's random first cut can add a batch.
        whole = sum(math.ceil(size / batch_size) + 1 for size in sizes if size >= batch_size)
        return whole + math.ceil(sum(size for size in sizes if size < batch_size) / batch_size)

    def _scaling(self, job: Job) -> Standardisation:
        is_weighted = job.settings.layer_weights == "predictive"
        normalise = bool(job.settings.normalise)
        key = (job.standardise, normalise, job.standardise and is_weighted)
        if key not in self._scalings:
            self._scalings[key] = self._measure(*key).to(self._device)
        return self._scalings[key]

    def _measure(self, standardise: bool, normalise: bool, is_weighted: bool) -> Standardisation:
        if not standardise:
            return replace(self._raw, is_normalised=normalise)
        measured = measure_standardisation(self.states, is_normalised=normalise)
        if not is_weighted:
            return measured
        pooled, rows = pooled_sample(self.states, is_normalised=normalise)
        labels = self._training.labels[rows.numpy()]
        return measured.weighted(layer_weights(pooled, labels, task=self._task))

    def solve(self) -> None:
        """Gives the linear mechanisms their optimum, which needs no epoch."""
        for run in self.runs:
            if isinstance(run.mechanism, Linear):
                solution = _solution(self._training, run.job.settings)
                run.settle(solution.standardised(self._scaling(run.job)))
                settings = replace(run.job.settings, strength=solution.strength)
                run.job = replace(run.job, settings=settings)

    def train_epoch(self, runs: Sequence[TrainingRun], epoch: int, shown: Progress) -> None:
        # Runs that see the same texts in the same order share each batch.
        groups: dict[tuple[int, int], list[TrainingRun]] = {}
        for run in runs:
            groups.setdefault((run.job.seed, run.job.settings.batch_size), []).append(run)
        order = torch.randperm(len(self.states), generator=torch.Generator().manual_seed(epoch))
        for index in order.tolist():
            shard = self.states.read(index)
            for (seed, batch_size), group in groups.items():
                shuffle = torch.Generator().manual_seed(seed * 7919 + epoch)
                # A shard with fewer texts than a batch is a part of one.
                share = min(1.0, len(shard.rows) / batch_size)
                for batch in shard.batches(size=batch_size, shuffle=shuffle):
                    self._train_batch(group, batch, share)
            shown.advance(shard.hidden.shape[1])
        for run in runs:
            run.finish_batch()

    def _train_batch(self, runs: Sequence[TrainingRun], batch: Shard, share: float) -> None:
        labels = self._labels[batch.rows]
        parts = self._project(batch, runs, dtype=torch.bfloat16)
        losses = [run.loss(part, labels) for run, part in zip(runs, parts, strict=True)]
        # Parameters are disjoint, so the sum's gradient is each run's own.
        (torch.stack(losses).sum() * share).backward()
        for run in runs:
            run.take(share)

    def _project(
        self, batch: Shard, runs: Sequence[TrainingRun], *, dtype: torch.dtype
    ) -> list[Ragged]:
        """Each run's columns of every token, ``[token, layer, column]``.

        One matmul a layer, or two if some runs read normalised states and others do not: a run is
        rounded the same whoever runs beside it.
        """
        folded = [self._scaling(run.job).fold(run.mechanism.columns(), dtype=dtype) for run in runs]
        hidden, lengths = batch.hidden.to(self._device, dtype), batch.lengths.to(self._device)
        columns: dict[int, Tensor] = {}
        for normalise in (False, True):
            members = [i for i, run in enumerate(runs) if run.job.settings.normalise == normalise]
            if not members:
                continue
            joined = Projection.joined([folded[i] for i in members])
            # Rounded like the states; calibration, fitted in float32, absorbs what that moves.
            projected = replace(joined, shift=joined.shift.to(dtype)).layers(hidden)
            widths = [folded[i].weight.shape[2] for i in members]
            columns.update(zip(members, projected.transpose(0, 1).split(widths, 2), strict=True))
        return [Ragged(columns[i], lengths) for i in range(len(runs))]

    def end_epoch(self, runs: Sequence[TrainingRun]) -> None:
        if self._validation is None or self._validation_states is None:
            for run in runs:
                run.end_epoch(None)
            return
        scores = self._score(runs, self._validation_states, dtype=torch.bfloat16)
        for run, logits in zip(runs, scores, strict=True):
            if np.isfinite(logits).all():
                run.end_epoch(validation_score(self._task, logits, self._validation.labels))
            else:
                run.has_diverged = True

    @torch.inference_mode()
    def _score(
        self, runs: Sequence[TrainingRun], states: States, *, dtype: torch.dtype
    ) -> list[np.ndarray]:
        """The logits of every text, ``[text, output]``, for each run."""
        shape = (sum(map(len, states.plan.rows)), self._task.outputs)
        scores = [np.empty(shape) for _ in runs]
        for index in range(len(states)):
            shuffle = torch.Generator().manual_seed(0)
            for batch in states.read(index).batches(size=_VALIDATION_BATCH, shuffle=shuffle):
                parts = self._project(batch, runs, dtype=dtype)
                for run, own, part in zip(runs, scores, parts, strict=True):
                    own[batch.rows] = run.logits(part).cpu().numpy()
        return scores

    def results(self, to_score: Split | None) -> list[Trained | None]:
        """What each job gave; None if it diverged."""
        states = self._validation_states if to_score is None else to_score.own_states()
        for run in self.runs:
            run.restore_best()
        finite = [run for run in self.runs if not run.has_diverged]
        scores = [np.empty((0, self._task.outputs)) for _ in finite]
        if states is not None and finite:
            # In float32, as in serving: calibration is fitted to these.
            scores = self._score(finite, states, dtype=torch.float32)
        made = {
            run: Trained(
                job=run.job,
                mechanism=run.mechanism,
                standardisation=self._scaling(run.job),
                logits=logits,
                history=tuple(run.history),
                best_epoch=run.best_epoch,
            )
            for run, logits in zip(finite, scores, strict=True)
            if np.isfinite(logits).all()
        }
        return [made.get(run) for run in self.runs]


def measure_standardisation(states: States, *, is_normalised: bool = False) -> Standardisation:
    """Mean and scale of each layer's values, from the first shards: random samples of the texts."""
    hidden: list[Tensor] = []
    tokens = 0
    for index in range(len(states)):
        shard = states.read(index)
        hidden.append((shard.normalised() if is_normalised else shard).hidden)
        tokens += hidden[-1].shape[1]
        if tokens >= _MOMENT_TOKENS:
            break
    measured = Standardisation.measured(torch.cat(hidden, 1)[:, :_MOMENT_TOKENS])
    return replace(measured, is_normalised=is_normalised)
