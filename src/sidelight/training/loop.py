"""Trains many mechanisms from one cache: each shard that is read updates all of them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sidelight.errors import SidelightError
from sidelight.mechanisms.base import Geometry, Mechanism
from sidelight.mechanisms.linear import Linear
from sidelight.mechanisms.readout import Readout
from sidelight.progress import Progress, progress
from sidelight.ragged import Ragged
from sidelight.standardisation import Projection, Standardisation, normalised
from sidelight.states.cache import Pooled, Shard, States
from sidelight.training.dataset import FOLDS, Folds, Split
from sidelight.training.layer_weights import (
    SAMPLE_TEXTS,
    layer_weights,
    pooled_sample,
    view_worths,
)
from sidelight.training.linear import LinearSolution, solve_linear
from sidelight.training.optimisation import TrainingRun, make_loss, validation_score
from sidelight.training.pooled_readouts import readout_logits
from sidelight.training.settings import Job, TrainingSettings

_VALIDATION_BATCH = 128
# Enough tokens to know a mean to about a hundredth of a standard deviation.
_MOMENT_TOKENS = 8192
# Of one matmul while training, so that many runs with many classes do not fill the memory.
_MOST_COLUMNS = 256
# What a readout's means take, in columns.
_COLUMNS_OF_MEANS = 32
# Of so many, one fold is enough to choose a strength by.
_MANY_TEXTS = 2048
_NOTHING = np.array([], dtype=np.int64)


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

    With many classes, float32 sums are rounded by what stands beside them (``pooled_readouts``).

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
    trainer.train(title)
    return trainer.results(to_score)


def train_folds(
    jobs: Sequence[Job],
    *,
    training: Split,
    left_out: Folds,
    device: torch.device | str = "cpu",
    title: str = "Training",
) -> list[list[Trained | None]]:
    """Trains each job on all texts but those of a part, for each part, side by side from one read.

    Every epoch is trained. A part's logits are those of the texts that it leaves out.

    Args:
        jobs: What to train.
        training: The texts.
        left_out: Indices of the texts of each part; an empty one leaves out none.
        device: Where to train.
        title: Of the progress bar.

    Returns:
        For each part what ``train_mechanisms`` gives.
    """
    trainer = _Trainer(jobs, training, None, torch.device(device), left_out)
    trainer.train(title)
    found = trainer.results_of_parts()
    return [found[start : start + len(jobs)] for start in range(0, len(found), len(jobs))]


def divergence(job: Job) -> SidelightError:
    """The error for a job that diverged."""
    return SidelightError(
        f"Training '{job.spec.name}' with seed {job.seed} diverged: its numbers are not finite. "
        f"Lower the rate (--set learning_rate=; it was {job.settings.learning_rate})."
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
    training: Split,
    settings: TrainingSettings,
    folds: Folds | None = None,
    *,
    worths: Tensor | None = None,
) -> LinearSolution:
    if folds is None and settings.strength is None:
        folds = training.folds(FOLDS)
        folds = folds[:1] if len(training) > _MANY_TEXTS else folds
    pooled = training.pooled_normalised if settings.normalise else training.pooled
    return solve_linear(
        pooled,
        training.labels,
        training.task,
        folds=folds or (),
        strength=settings.strength,
        worths=worths,
        counted=np.random.default_rng(0).permutation(training.first_rows),
        balanced=settings.class_weight == "balanced",
    )


class _Trainer:
    def __init__(
        self,
        jobs: Sequence[Job],
        training: Split,
        validation: Split | None,
        device: torch.device,
        left_out: Folds = (_NOTHING,),
    ):
        self.states = training.own_states()
        self._training = training
        self._validation = validation
        self._task = task = training.task
        self._device = device
        self._labels = torch.from_numpy(training.labels).to(device)
        fingerprint = self.states.fingerprint
        geometry = Geometry(fingerprint.layers, fingerprint.width, task.outputs)
        self._raw = Standardisation.identity(geometry)
        self._left_out = left_out
        self._trains_on = [torch.ones(len(training), dtype=torch.bool) for _ in left_out]
        for kept, part in zip(self._trains_on, left_out, strict=True):
            kept[part] = False
        self._is_first = torch.zeros(len(training), dtype=torch.bool)
        self._is_first[training.first_rows] = True
        self._moments: dict[bool, Standardisation] = {}
        self._samples: dict[bool, tuple[Pooled, Tensor]] = {}
        self._found_worths: dict[tuple[int, bool], Tensor] = {}
        self._scalings: dict[tuple[bool, bool, int | None], Standardisation] = {}
        is_response = self.states.reads.side == "response"
        self.runs: list[TrainingRun] = []
        for part, kept in enumerate(self._trains_on):
            labels = torch.from_numpy(training.labels)[kept].to(device)
            for job in jobs:
                settings = job.settings.fitted_to(len(training.labels), task)
                run = TrainingRun(
                    replace(job, settings=settings),
                    geometry,
                    steps=self._steps_per_epoch(settings.batch_size),
                    loss=make_loss(task, labels, balanced=settings.class_weight == "balanced"),
                    reads_beginnings=settings.beginnings and is_response,
                    part=part,
                    device=device,
                )
                self.runs.append(run)

    def _steps_per_epoch(self, batch_size: int) -> int:
        """An upper bound of the steps in an epoch."""
        sizes = [len(rows) for rows in self.states.plan.rows]
        # A shard's random first cut can add a batch.
        whole = sum(math.ceil(size / batch_size) + 1 for size in sizes if size >= batch_size)
        return whole + math.ceil(sum(size for size in sizes if size < batch_size) / batch_size)

    def _scaling(self, run: TrainingRun) -> Standardisation:
        job, normalise = run.job, bool(run.job.settings.normalise)
        is_weighted = job.standardise and job.settings.layer_weights == "predictive"
        key = (job.standardise, normalise, run.part if is_weighted else None)
        if key not in self._scalings:
            self._scalings[key] = self._measure(*key).to(self._device)
        return self._scalings[key]

    def _measure(self, standardise: bool, normalise: bool, part: int | None) -> Standardisation:
        """How states are scaled; with layer weights that the texts outside a part decide."""
        if not standardise:
            return replace(self._raw, is_normalised=normalise)
        if normalise not in self._moments:
            found = measure_standardisation(self.states, is_normalised=normalise)
            self._moments[normalise] = found
        measured = self._moments[normalise]
        if part is None:
            return measured
        return measured.weighted(layer_weights(self._worths(part, normalise)))

    def _worths(self, part: int, normalise: bool) -> Tensor:
        """What each view of each layer is worth to the texts outside a part, ``[view, layer]``."""
        if normalise not in self._samples:
            self._samples[normalise] = self._sample(normalise)
        if (part, normalise) not in self._found_worths:
            pooled, rows = self._samples[normalise]
            kept = self._trains_on[part][rows].nonzero()[:, 0]
            labels = self._training.labels[rows[kept].numpy()]
            own = pooled.chosen(kept)
            self._found_worths[part, normalise] = view_worths(own, labels, self._task)
        return self._found_worths[part, normalise]

    def _sample(self, normalise: bool) -> tuple[Pooled, Tensor]:
        """Pooled states of a few hundred distinct texts, and which they are."""
        solved = [run for run in self.runs if isinstance(run.mechanism, Linear)]
        if not any(bool(run.job.settings.normalise) == normalise for run in solved):
            return pooled_sample(self.states, self._is_first, is_normalised=normalise)
        # Those of all texts are needed anyway.
        training = self._training
        pooled = training.pooled_normalised if normalise else training.pooled
        rows = torch.tensor([*chain(*self.states.plan.rows)])
        rows = rows[self._is_first[rows]][:SAMPLE_TEXTS]
        return pooled.chosen(rows), rows

    def train(self, title: str) -> None:
        """Solves or trains every run."""
        self._solve()
        trained = [run.job.settings.epochs for run in self.runs if not run.has_finished]
        epochs, tokens = max(trained, default=0), sum(self.states.plan.tokens)
        with progress(title, epochs * tokens, unit="tokens") as shown:
            for epoch in range(epochs):
                active = [run for run in self.runs if not (run.has_finished or run.has_diverged)]
                if not active:
                    break
                self._train_epoch(active, epoch, shown)
                self._end_epoch(active)

    def _solve(self) -> None:
        """Gives the linear mechanisms their optimum, which needs no epoch."""
        for run in self.runs:
            if isinstance(run.mechanism, Linear):
                part = self._left_out[run.part]
                texts = self._training.without(part) if len(part) else self._training
                worths = self._worths(run.part, bool(run.job.settings.normalise))
                solution = _solution(texts, run.job.settings, worths=worths)
                run.settle(solution.standardised(self._scaling(run)))
                settings = replace(run.job.settings, strength=solution.strength)
                run.job = replace(run.job, settings=settings)

    def _train_epoch(self, runs: Sequence[TrainingRun], epoch: int, shown: Progress) -> None:
        # Runs that see the same texts in the same order share each batch.
        groups: dict[tuple[int, int], list[TrainingRun]] = {}
        for run in runs:
            groups.setdefault((run.job.seed, run.job.settings.batch_size), []).append(run)
        order = torch.randperm(len(self.states), generator=torch.Generator().manual_seed(epoch))
        for index in order.tolist():
            texts = len(self.states.plan.rows[index])
            for (seed, batch_size), group in groups.items():
                shuffle = torch.Generator().manual_seed(seed * 7919 + epoch)
                # A shard with fewer texts than a batch is a part of one.
                share = min(1.0, texts / batch_size)
                for batch in self.states.batches(index, size=batch_size, shuffle=shuffle):
                    self._train_batch(group, batch, share)
            shown.advance(self.states.plan.tokens[index])
        for run in runs:
            run.finish_batch()

    def _train_batch(self, runs: Sequence[TrainingRun], batch: Shard, share: float) -> None:
        batch = replace(batch, hidden=batch.hidden.to(self._device))
        active = [run for run in runs if self._trains_on[run.part][batch.rows].any()]
        by_means = [run for run in active if run.trains_on_means]
        by_tokens = [run for run in active if not run.trains_on_means]
        # Parameters are disjoint, so the sum's gradient is each run's own.
        for group in self._projected_together(by_tokens):
            (torch.stack(self._losses(batch, group)).sum() * share).backward()
        for group in self._projected_together(by_means):
            (torch.stack(self._losses_by_means(batch, group)).sum() * share).backward()
        for run in active:
            run.take(share)

    def _losses(self, batch: Shard, runs: Sequence[TrainingRun]) -> list[Tensor]:
        losses: list[Tensor] = []
        for run, tokens in zip(runs, self._project(batch, runs, dtype=torch.bfloat16), strict=True):
            kept, labels = self._trains_on[run.part][batch.rows], self._labels[batch.rows]
            if not kept.all():
                texts = kept.nonzero()[:, 0].to(self._device)
                tokens, labels = tokens.chosen(texts), labels[texts]
            losses.append(run.loss(tokens, labels))
        return losses

    def _losses_by_means(self, batch: Shard, runs: Sequence[TrainingRun]) -> list[Tensor]:
        """As ``_losses``, of readouts, whose logits need no column for each class."""
        readouts = [cast(Readout, run.mechanism) for run in runs]
        columns = [readout.token_columns() for readout in readouts]
        tokens = self._project(batch, runs, dtype=torch.bfloat16, columns=columns)
        scalings = [self._scaling(run) for run in runs]
        found = readout_logits(readouts, tokens, scalings, batch.hidden, dtype=torch.bfloat16)
        losses: list[Tensor] = []
        for run, logits in zip(runs, found, strict=True):
            texts = self._trains_on[run.part][batch.rows].nonzero()[:, 0].to(self._device)
            losses.append(run.loss_of_logits(logits[texts], self._labels[batch.rows][texts]))
        return losses

    def _projected_together(self, runs: Sequence[TrainingRun]) -> Iterator[list[TrainingRun]]:
        """The runs in groups of up to so many columns; a run with more is alone."""
        group: list[TrainingRun] = []
        columns = 0
        for run in runs:
            own = run.mechanism.columns().shape[2]
            if run.trains_on_means:
                own = cast(Readout, run.mechanism).token_columns().shape[2] + _COLUMNS_OF_MEANS
            if group and columns + own > _MOST_COLUMNS:
                yield group
                group, columns = [], 0
            group.append(run)
            columns += own
        if group:
            yield group

    def _project(
        self,
        batch: Shard,
        runs: Sequence[TrainingRun],
        *,
        dtype: torch.dtype,
        columns: Sequence[Tensor] = (),
    ) -> list[Ragged]:
        """Each run's columns of every token, ``[token, layer, column]``.

        They are those of serving, unless others are given.

        One matmul a layer, or two if some runs read normalised states and others do not: a run is
        rounded the same whoever runs beside it.
        """
        columns = columns or [run.mechanism.columns() for run in runs]
        pairs = zip(runs, columns, strict=True)
        folded = [self._scaling(run).fold(own, dtype=dtype) for run, own in pairs]
        hidden, lengths = batch.hidden.to(self._device), batch.lengths.to(self._device)
        found: dict[int, Tensor] = {}
        for normalise in (False, True):
            members = [i for i, run in enumerate(runs) if run.job.settings.normalise == normalise]
            if not members:
                continue
            joined = Projection.joined([folded[i] for i in members])
            # Rounded like the states; calibration, fitted in float32, absorbs what that moves.
            joined = replace(joined, shift=joined.shift.to(dtype))
            if hidden.dtype == dtype:
                projected = joined.layers(hidden)
            else:
                # A copy of all layers in another dtype costs more than the matmuls.
                layers = enumerate(hidden)
                projected = torch.stack([joined.layer(i, one.to(dtype)) for i, one in layers])
            widths = [folded[i].weight.shape[2] for i in members]
            found.update(zip(members, projected.transpose(0, 1).split(widths, 2), strict=True))
        return [Ragged(found[i], lengths) for i in range(len(runs))]

    def _end_epoch(self, runs: Sequence[TrainingRun]) -> None:
        if self._validation is None:
            for run in runs:
                run.end_epoch(None)
            return
        scores = self._score(runs, self._validation, dtype=torch.bfloat16)
        for run, logits in zip(runs, scores, strict=True):
            if np.isfinite(logits).all():
                run.end_epoch(validation_score(self._task, logits, self._validation.labels))
            else:
                run.has_diverged = True

    @torch.inference_mode()
    def _score(
        self,
        runs: Sequence[TrainingRun],
        split: Split,
        *,
        dtype: torch.dtype,
        left_out: bool = False,
    ) -> list[np.ndarray]:
        """The logits of every text as they are served, ``[text, output]``, for each run.

        Args:
            runs: What scores.
            split: The texts.
            dtype: Of the matmuls.
            left_out: Whether the texts are the training texts, of which a run scores only those
                that it left out; the others keep 0.
        """
        states = self.states if left_out else split.own_states()
        scores = [np.zeros((len(split), self._task.outputs)) for _ in runs]
        found = dict(zip(runs, scores, strict=True))
        for index in range(len(states)):
            shuffle = torch.Generator().manual_seed(0)
            for batch in states.batches(index, size=_VALIDATION_BATCH, shuffle=shuffle):
                for part, own in self._parts(batch, runs, left_out=left_out):
                    units = [split.units[row] for row in part.rows.tolist()]
                    for group in self._projected_together(own):
                        projected = self._project(part, group, dtype=dtype)
                        for run, tokens in zip(group, projected, strict=True):
                            found[run][part.rows] = _served(run, tokens, units).cpu().numpy()
        return scores

    def _parts(
        self, batch: Shard, runs: Sequence[TrainingRun], *, left_out: bool
    ) -> Iterator[tuple[Shard, list[TrainingRun]]]:
        """The texts that runs score, with those runs."""
        if not left_out:
            yield batch, list(runs)
            return
        for part, kept in enumerate(self._trains_on):
            texts = (~kept[batch.rows]).nonzero()[:, 0]
            if len(texts):
                yield batch.chosen(texts), [run for run in runs if run.part == part]

    def results(self, to_score: Split | None) -> list[Trained | None]:
        """What each job gave; None if it diverged."""
        split = self._validation if to_score is None else to_score
        finite = self._restored()
        scores = [np.empty((0, self._task.outputs)) for _ in finite]
        if split is not None and finite:
            # In float32, as in serving: calibration is fitted to these.
            scores = self._score(finite, split, dtype=torch.float32)
        return self._results(dict(zip(finite, scores, strict=True)))

    def results_of_parts(self) -> list[Trained | None]:
        """What each job gave for each part, with the logits of the texts that it left out."""
        finite = self._restored()
        scores = self._score(finite, self._training, dtype=torch.float32, left_out=True)
        pairs = zip(finite, scores, strict=True)
        return self._results({run: logits[self._left_out[run.part]] for run, logits in pairs})

    def _restored(self) -> list[TrainingRun]:
        """The runs that did not diverge, with the parameters of their best epochs."""
        for run in self.runs:
            run.restore_best()
        return [run for run in self.runs if not run.has_diverged]

    def _results(self, logits: Mapping[TrainingRun, np.ndarray]) -> list[Trained | None]:
        made = {
            run: Trained(
                job=run.job,
                mechanism=run.mechanism,
                standardisation=self._scaling(run),
                logits=own,
                history=tuple(run.history),
                best_epoch=run.best_epoch,
            )
            for run, own in logits.items()
            if np.isfinite(own).all()
        }
        return [made.get(run) for run in self.runs]


def _served(
    run: TrainingRun, tokens: Ragged, units: Sequence[Sequence[Int[np.ndarray, " _"]]]
) -> Float[Tensor, "text output"]:
    """The highest logit of each label, of the parts of a text that are judged and of the whole."""
    logits = run.logits(tokens)
    starts = (tokens.lengths.cumsum(0) - tokens.lengths).tolist()
    parts = [start + unit for start, own in zip(starts, units, strict=True) for unit in own]
    if not parts:
        return logits
    device = tokens.values.device
    rows = torch.from_numpy(np.concatenate(parts)).to(device)
    lengths = torch.tensor([*map(len, parts)], device=device)
    owners = torch.tensor([text for text, own in enumerate(units) for _ in own], device=device)
    of_parts = run.logits(Ragged(tokens.values[rows], lengths))
    index = owners[:, None].expand_as(of_parts)
    return logits.scatter_reduce(0, index, of_parts, "amax")


def measure_standardisation(states: States, *, is_normalised: bool = False) -> Standardisation:
    """Mean and scale of each layer's values, from the first shards: random samples of the texts."""
    hidden: list[Tensor] = []
    left = _MOMENT_TOKENS
    for index in range(len(states)):
        first = states.read(index).hidden[:, :left]
        hidden.append(first)
        left -= first.shape[1]
        if not left:
            break
    # Layer by layer: all of them in float32 would be large.
    layers = map(torch.cat, zip(*hidden, strict=True))
    measured = Standardisation.measured(map(normalised, layers) if is_normalised else layers)
    return replace(measured, is_normalised=is_normalised)
