"""Trains many mechanisms from one cache: each shard that is read updates all of them."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sidelight.errors import SidelightError
from sidelight.progress import Progress, progress
from sidelight.ragged import Ragged
from sidelight.standardisation import Projection
from sidelight.states.cache import Shard
from sidelight.training.dataset import Split
from sidelight.training.optimisation import TrainingRun, validation_score
from sidelight.training.scaling import Scaling
from sidelight.training.settings import TrainingSettings
from sidelight.training.validation import Folds
from sidelight.types import MechanismSpec

# A mechanism to train, and how.
Candidate = tuple[MechanismSpec, TrainingSettings]

_VALIDATION_BATCH = 128
# Columns of one matmul while training, so that many runs with many classes do not fill the memory.
_MOST_COLUMNS = 256
# How often a part of a text without a label is shown in place of the whole.
_UNIT_ALONE = 0.7
_NOTHING = np.array([], dtype=np.int64)


def train_mechanisms(
    candidates: Sequence[Candidate],
    *,
    training: Split,
    validation: Split | None,
    to_score: Split | None = None,
    device: torch.device | str = "cpu",
) -> list[TrainingRun | None]:
    """Trains all candidates side by side; the result of one does not depend on its neighbours.

    Args:
        candidates: What to train.
        training: What the parameters are fitted to.
        validation: What early stopping looks at; None trains every epoch and keeps the last.
        to_score: The texts that get logits after training; None takes the validation texts.
        device: Where to train.

    Returns:
        A run for each candidate, in their order; None for one whose numbers are no longer finite.
    """
    trainer = _Trainer(candidates, training, torch.device(device))
    trainer.train(validation)
    texts = validation if to_score is None else to_score
    if texts is not None:
        logits = trainer.score(trainer.runs, texts, dtype=torch.float32)
        for run, scores in zip(trainer.runs, logits, strict=True):
            run.logits = scores
        if training.token_labels is not None:
            ends = np.cumsum(texts.own_states().lengths)[:-1]
            logits = trainer.score(trainer.runs, texts, dtype=torch.float32, of_tokens=True)
            for run, scores in zip(trainer.runs, logits, strict=True):
                run.token_logits = np.split(scores, ends)
    return [_if_finite(run) for run in trainer.runs]


def cross_fit(
    candidates: Sequence[Candidate],
    training: Split,
    folds: Folds,
    *,
    device: torch.device | str = "cpu",
) -> list[TrainingRun | None]:
    """Trains each candidate on all texts and without each fold, side by side from one read.

    Every text trains the probe, and is scored by a probe that did not train on it: calibration,
    threshold and figures are made from these logits. A part held out of few texts would be missed
    in training, and too small to stop or choose by. Every epoch is trained.

    Returns:
        The probes of all texts with the logits of each fold by the run without it; None for one
        that diverged, on a fold or on all texts.
    """
    trainer = _Trainer(candidates, training, torch.device(device), (_NOTHING, *folds))
    trainer.train(None)
    whole = trainer.runs[: len(candidates)]
    for run in whole:
        run.logits = np.empty((len(training), training.task.outputs))
    for part, fold in enumerate(folds, start=1):
        runs = trainer.runs[part * len(candidates) : (part + 1) * len(candidates)]
        logits = trainer.score(runs, training.select(fold), dtype=torch.float32)
        for result, run, scores in zip(whole, runs, logits, strict=True):
            result.logits[fold] = np.nan if run.has_diverged else scores
    return [_if_finite(run) for run in whole]


def divergence(spec: MechanismSpec, settings: TrainingSettings) -> SidelightError:
    """The error for a training that diverged."""
    return SidelightError(
        f"Training '{spec.name}' with seed {settings.seed} diverged: its numbers are not finite. "
        f"Lower the rate (--set learning_rate=; it was {settings.learning_rate})."
    )


def _if_finite(run: TrainingRun) -> TrainingRun | None:
    return None if run.has_diverged or not np.isfinite(run.logits).all() else run


class _Trainer:
    """A run for each part of the texts and each candidate, part by part.

    Args:
        candidates: What to train.
        training: The texts.
        device: Where to train.
        left_out: Indices of the texts that each part leaves out.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        training: Split,
        device: torch.device,
        left_out: Folds = (_NOTHING,),
    ):
        self._states = states = training.own_states()
        self._labels = _labels_of(training, device)
        self._weights = _weights_of(training, device)
        self._units = _units_without_label(training)
        self._rationales = training.rationales
        self._device = device
        kept_texts = [torch.ones(len(training), dtype=torch.bool) for _ in left_out]
        for kept, rows in zip(kept_texts, left_out, strict=True):
            kept[rows] = False
        scaling = Scaling(training, states, kept_texts)
        self.runs: list[TrainingRun] = []
        for part, kept in enumerate(kept_texts):
            for spec, given in candidates:
                settings = given.resolved_for(len(training), training.task)
                run = TrainingRun(
                    spec,
                    settings,
                    scaling.standardisation(settings, part).to(device),
                    training.task,
                    self._labels.select(kept.nonzero()[:, 0].to(device)).values,
                    kept,
                    steps=self._steps_per_epoch(settings.batch_size),
                    reads_beginnings=settings.beginnings
                    and training.states.reads.side == "response"
                    and training.token_labels is None,
                    labels_tokens=training.token_labels is not None,
                )
                self.runs.append(run)

    def _steps_per_epoch(self, batch_size: int) -> int:
        """An upper bound of the steps in an epoch."""
        sizes = [*map(len, self._states.shards)]
        # A shard's random first cut can add a batch.
        whole = sum(math.ceil(size / batch_size) + 1 for size in sizes if size >= batch_size)
        return whole + math.ceil(sum(size for size in sizes if size < batch_size) / batch_size)

    def train(self, validation: Split | None) -> None:
        """Trains every run, and restores its best epoch."""
        tokens = sum(self._states.lengths)
        epochs = max(run.settings.epochs for run in self.runs)
        with progress("Training", epochs * tokens, unit="tokens") as shown:
            for epoch in range(epochs):
                active = [run for run in self.runs if not run.has_finished]
                if not active:
                    break
                self._train_epoch(active, epoch, shown)
                if validation is None:
                    for run in active:
                        run.end_epoch(None)
                else:
                    self._validate(active, validation)
        for run in self.runs:
            run.restore_best()

    def _train_epoch(self, runs: Sequence[TrainingRun], epoch: int, shown: Progress) -> None:
        # Runs that see the same texts in the same order share each batch.
        groups: dict[tuple[int, int], list[TrainingRun]] = {}
        for run in runs:
            groups.setdefault((run.settings.seed, run.settings.batch_size), []).append(run)
        order = torch.randperm(len(self._states), generator=torch.Generator().manual_seed(epoch))
        for index in order.tolist():
            texts = self._states.shards[index]
            for (seed, batch_size), group in groups.items():
                shuffle = torch.Generator().manual_seed(seed * 7919 + epoch)
                # A shard with fewer texts than a batch is a part of one.
                share = min(1.0, len(texts) / batch_size)
                for batch in self._states.batches(index, size=batch_size, shuffle=shuffle):
                    self._train_batch(group, self._as_judged(batch, shuffle), share)
            shown.advance(sum(self._states.lengths[text] for text in texts))
        for run in runs:
            run.step()

    def _as_judged(self, batch: Shard, random: torch.Generator) -> Shard:
        """The batch, with a random part of most texts that have no label in place of the whole.

        Serving takes the highest logit of the parts that it judges, such as a turn, and no part of
        a text without a label has one.
        """
        starts = (batch.lengths.cumsum(0) - batch.lengths).tolist()
        tokens: list[Int[np.ndarray, " _"]] = []
        for text, start, length in zip(
            batch.rows.tolist(), starts, batch.lengths.tolist(), strict=True
        ):
            units = self._units[text]
            chosen = np.arange(length)
            if units and float(torch.rand((), generator=random)) < _UNIT_ALONE:
                chosen = units[int(torch.randint(len(units), (), generator=random))]
            tokens.append(start + chosen)
        lengths = torch.tensor([*map(len, tokens)])
        if bool((lengths == batch.lengths).all()):
            return batch
        hidden = batch.hidden[:, torch.from_numpy(np.concatenate(tokens))]
        return replace(batch, hidden=hidden, lengths=lengths)

    def _train_batch(self, runs: Sequence[TrainingRun], batch: Shard, share: float) -> None:
        hidden, lengths = batch.hidden.to(self._device), batch.lengths.to(self._device)
        rows = batch.rows.to(self._device)
        labels = self._labels.select(rows)
        weights = None if self._weights is None else self._weights[rows]
        rationales = self._rationales_of(batch)
        active = [run for run in runs if run.texts[batch.rows].any()]
        for group in _sharing_a_matmul(active):
            losses: list[Tensor] = []
            for run, columns in zip(group, _project(hidden, group, torch.bfloat16), strict=True):
                tokens, targets, kept = Ragged(columns, lengths), labels, run.texts[batch.rows]
                counted, words = weights, rationales
                if not kept.all():
                    texts = kept.nonzero()[:, 0].to(self._device)
                    tokens, targets = tokens.select(texts), labels.select(texts)
                    counted = None if weights is None else weights[texts]
                    words = None if rationales is None else rationales.select(texts)
                if counted is not None:
                    counted = counted.repeat_interleave(targets.lengths)
                marks = None if words is None else words.values
                losses.append(run.loss(tokens, targets.values, counted, marks))
            # Parameters are disjoint, so the sum's gradient is each run's own.
            (torch.stack(losses).sum() * share).backward()
        for run in active:
            run.take(share)

    def _rationales_of(self, batch: Shard) -> Ragged | None:
        """The tokens of a batch that its texts have their labels for; None if none has any."""
        if self._rationales is None:
            return None
        sizes = zip(batch.rows.tolist(), batch.lengths.tolist(), strict=True)
        # A text that is shown in part has no label, and so no rationale.
        marks = [
            self._rationales[text] if len(self._rationales[text]) == size else np.zeros(size, bool)
            for text, size in sizes
        ]
        flat = torch.from_numpy(np.concatenate(marks)).to(self._device)
        return Ragged(flat, batch.lengths.to(self._device)) if flat.any() else None

    def _validate(self, runs: Sequence[TrainingRun], validation: Split) -> None:
        labels = _labels_of(validation, torch.device("cpu")).values.numpy()
        of_tokens = validation.token_labels is not None
        scores = self.score(runs, validation, dtype=torch.bfloat16, of_tokens=of_tokens)
        for run, logits in zip(runs, scores, strict=True):
            if np.isfinite(logits).all():
                run.end_epoch(validation_score(validation.task, logits, labels))
            else:
                run.has_diverged = True

    @torch.inference_mode()
    def score(
        self,
        runs: Sequence[TrainingRun],
        split: Split,
        *,
        dtype: torch.dtype,
        of_tokens: bool = False,
    ) -> list[Float[np.ndarray, "row output"]]:
        """The logits of every text as they are served, or of all tokens text after text, by run.

        Args:
            runs: What scores.
            split: The texts.
            dtype: Of the matmuls; float32, as in serving, for what calibration is fitted to.
            of_tokens: Whether tokens are scored.
        """
        states = split.own_states()
        lengths = np.array(states.lengths) if of_tokens else np.ones(len(split), np.int64)
        rows_of = np.split(np.arange(lengths.sum()), lengths.cumsum()[:-1])
        logits = {run: np.zeros((int(lengths.sum()), split.task.outputs)) for run in runs}
        for index in range(len(states)):
            shuffle = torch.Generator().manual_seed(0)
            for batch in states.batches(index, size=_VALIDATION_BATCH, shuffle=shuffle):
                hidden = batch.hidden.to(self._device)
                texts = batch.rows.tolist()
                rows = np.concatenate([rows_of[text] for text in texts])
                units = [split.units[text] for text in texts]
                for group in _sharing_a_matmul(runs):
                    for run, columns in zip(group, _project(hidden, group, dtype), strict=True):
                        tokens = Ragged(columns, batch.lengths.to(self._device))
                        scores = (
                            run.score_tokens(tokens) if of_tokens else _served(run, tokens, units)
                        )
                        logits[run][rows] = scores.cpu().numpy()
        return [*logits.values()]


def _labels_of(split: Split, device: torch.device) -> Ragged:
    """The labels of each text: one row, or one for each of its tokens."""
    if split.token_labels is None:
        return Ragged.one_row_each(torch.from_numpy(split.labels).to(device))
    labels = np.concatenate(split.token_labels).astype(np.int64)
    lengths = torch.tensor([*map(len, split.token_labels)], device=device)
    return Ragged(torch.from_numpy(labels).to(device), lengths)


def _weights_of(split: Split, device: torch.device) -> Float[Tensor, " text"] | None:
    """How much each text counts; None: all count the same."""
    weights = split.weights
    return None if (weights == 1).all() else torch.from_numpy(weights).float().to(device)


def _units_without_label(split: Split) -> list[list[Int[np.ndarray, " _"]]]:
    """The parts that are judged of each text without a label; none of one that has a label."""
    if split.token_labels is not None or split.task.kind == "multiclass":
        return [[] for _ in range(len(split))]
    texts = zip(split.labels, split.units, strict=True)
    return [[] if np.any(labels) else units for labels, units in texts]


def _sharing_a_matmul(runs: Sequence[TrainingRun]) -> list[list[TrainingRun]]:
    """Runs with up to so many columns, all of normalised states or none; one with more is alone.

    Rounding does not depend on the other runs.
    """
    groups: list[list[TrainingRun]] = []
    filled = 0
    for run in sorted(runs, key=lambda run: run.standardisation.is_normalised):
        columns = run.mechanism.columns().shape[2]
        is_normalised = run.standardisation.is_normalised
        fits = filled + columns <= _MOST_COLUMNS
        if groups and fits and groups[-1][0].standardisation.is_normalised == is_normalised:
            groups[-1].append(run)
            filled += columns
        else:
            groups.append([run])
            filled = columns
    return groups


def _project(
    hidden: Float[Tensor, "layer token width"], runs: Sequence[TrainingRun], dtype: torch.dtype
) -> Sequence[Float[Tensor, "token layer _"]]:
    """Each run's columns of every token, with one matmul a layer."""
    folded = [run.standardisation.fold(run.mechanism.columns(), dtype=dtype) for run in runs]
    joined = Projection.joined(folded)
    # Rounded like the states; calibration, fitted in float32, absorbs what that moves.
    joined = replace(joined, shift=joined.shift.to(dtype))
    if hidden.dtype == dtype:
        columns = joined.layers(hidden)
    else:
        # A copy of all layers in another dtype costs more than the matmuls.
        columns = torch.stack([joined.layer(i, layer.to(dtype)) for i, layer in enumerate(hidden)])
    return columns.transpose(0, 1).split([part.weight.shape[2] for part in folded], 2)


def _served(
    run: TrainingRun, tokens: Ragged, units: Sequence[Sequence[Int[np.ndarray, " _"]]]
) -> Float[Tensor, "text output"]:
    """The highest logit of each label, of the parts of a text that are judged and of the whole."""
    logits = run.score(tokens)
    starts = (tokens.lengths.cumsum(0) - tokens.lengths).tolist()
    rows = [start + unit for start, text in zip(starts, units, strict=True) for unit in text]
    if not rows:
        return logits
    device = tokens.values.device
    lengths = torch.tensor([*map(len, rows)], device=device)
    owners = torch.tensor([i for i, text in enumerate(units) for _ in text], device=device)
    of_units = run.score(Ragged(tokens.values[np.concatenate(rows)], lengths))
    index = owners[:, None].expand_as(of_units)
    return logits.scatter_reduce(0, index, of_units, "amax")
