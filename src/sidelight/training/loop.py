"""Training of many mechanisms from one cache: each shard that is read updates all of them."""

import math
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from sidelight.errors import SidelightError
from sidelight.models.fingerprint import hash_of
from sidelight.models.machine import keeps_shapes, lacks_bfloat16
from sidelight.probes.ragged import Ragged
from sidelight.probes.standardisation import Projection, inverse_rms
from sidelight.progress import Progress, progress, say
from sidelight.states.cache import Shard, random_batches
from sidelight.states.compression import Compression
from sidelight.training.checkpoints import resume, save_checkpoint
from sidelight.training.dataset import Split
from sidelight.training.optimisation import TrainingRun, validation_score
from sidelight.training.scaling import Scaling
from sidelight.training.settings import TrainingSettings
from sidelight.training.targets import Targets
from sidelight.training.validation import Folds
from sidelight.types import MechanismSpec

# A mechanism to train, and its settings.
Candidate = tuple[MechanismSpec, TrainingSettings]

_VALIDATION_BATCH = 128
# Maximum columns of a matmul in training, so that many runs with many classes do not fill the
# memory.
_MOST_PROJECTIONS = 256
# Where matmuls keep memory for each shape, their rows are padded to a multiple of this.
_ROW_MULTIPLE = 512
# Probability of showing a part of an unlabelled text instead of the whole.
_SEGMENT_SHARE = 0.7
_NOTHING = np.array([], dtype=np.int64)


def train_mechanisms(
    candidates: Sequence[Candidate],
    *,
    split: Split,
    left_out: Folds = (),
    device: torch.device | str = "cpu",
    shares_matmuls: bool = False,
    checkpoint: Path | None = None,
) -> list[TrainingRun | None]:
    """Train all candidates side by side; the result of one does not depend on its neighbours.

    The texts that are left out are scored by a probe that was not trained on them: calibration,
    thresholds and metrics are based on these logits. One part is held out: the returned run is
    trained on the rest, with early stopping on the part without its contexts. Of several parts,
    which are folds, each is scored by a run of its own, from the same reads, and the returned run
    is trained on every text: with few texts, a held-out part would be missed in training, and would
    be too small for early stopping. Then, and without any part, all epochs are run.

    Args:
        candidates: Mechanisms to train.
        split: The texts.
        left_out: Rows of each part to leave out. ``TrainingRun.logits`` has theirs, in their order
            in the split.
        device: Device to train on.
        shares_matmuls: Whether runs share matmuls in float32 as well, which is several times as
            fast for many folds. The results then depend on other runs, within rounding.
        checkpoint: File that is written after each epoch, and from which the same training run
            resumes after an interruption; the caller removes it.

    Returns:
        A run for each candidate, in order; None for one that diverged, on a fold or on all texts.
    """
    is_held_out, count = len(left_out) == 1, len(candidates)
    training, validation, folds = split, None, left_out
    if is_held_out:
        training, folds = split.without(left_out[0]), ()
        validation = split.select(left_out[0]).without_contexts()
    trainer = _Trainer(
        candidates, training, torch.device(device), (_NOTHING, *folds), shares=shares_matmuls
    )
    trainer.train(validation, checkpoint)
    returned = trainer.runs[:count]
    rows = np.sort(np.concatenate([_NOTHING, *left_out]))
    for run in returned:
        run.logits = np.full((len(rows), split.task.outputs), np.nan)
    for number, fold in enumerate(left_out):
        first = 0 if is_held_out else (1 + number) * count
        runs = trainer.runs[first : first + count]
        scores = trainer.score(runs, split.select(fold), dtype=torch.float32)
        for result, run, (logits, token_logits) in zip(returned, runs, scores, strict=True):
            result.logits[np.searchsorted(rows, fold)] = np.nan if run.has_diverged else logits
            if is_held_out:
                result.token_logits = token_logits
    finite = [not run.has_diverged and np.isfinite(run.logits).all() for run in returned]
    return [run if is_finite else None for run, is_finite in zip(returned, finite, strict=True)]


def divergence(spec: MechanismSpec, settings: TrainingSettings) -> SidelightError:
    """The error for a training run that diverged."""
    return SidelightError(
        f"Training '{spec.name}' with seed {settings.seed} diverged: its loss or outputs are not "
        "finite. Lower the learning rate with --set learning_rate= (it was "
        f"{settings.learning_rate})."
    )


class _Trainer:
    """Runs of all candidates on each part of the texts, part by part.

    Args:
        candidates: Mechanisms to train.
        training: The texts.
        device: Device to train on.
        left_out: Indices of the texts that each part leaves out.
        shares: Whether runs share matmuls in float32.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        training: Split,
        device: torch.device,
        left_out: Folds,
        *,
        shares: bool = False,
    ):
        self._states = training.states
        compression = training.states.compression
        self._compression = None if compression is None else compression.to(device)
        self._targets = training.targets.to(device)
        # The separately classified parts of each unlabelled text.
        texts = zip(training.labels, training.segments, strict=True)
        self._segments = [[] if np.any(labels) else segments for labels, segments in texts]
        self._device = device
        self._shares = shares
        # Without bfloat16 arithmetic, a CPU takes eight times as long for the same products.
        self._dtype = torch.float32 if lacks_bfloat16(device) else torch.bfloat16
        inclusions = [torch.ones(len(training), dtype=torch.bool) for _ in left_out]
        for is_included, rows in zip(inclusions, left_out, strict=True):
            is_included[rows] = False
        scaling = Scaling(training, inclusions)
        self.runs: list[TrainingRun] = []
        takes_prefixes = self._targets.takes_prefixes(training.states.reads)
        for fold, is_included in enumerate(inclusions):
            targets = self._targets.select(is_included.nonzero()[:, 0].to(device))
            for spec, options in candidates:
                settings = options.resolved_for(len(training), training.task)
                run = TrainingRun(
                    spec,
                    settings,
                    scaling.standardisation(settings, fold).to(device),
                    training.task,
                    targets,
                    is_included,
                    steps=self._steps_per_epoch(settings.batch_size),
                    adds_prefixes=settings.prefixes and takes_prefixes,
                )
                self.runs.append(run)

    def _steps_per_epoch(self, batch_size: int) -> int:
        """An upper bound on the steps of an epoch."""
        sizes = [*map(len, self._states.shards)]
        # A shard's random offset can add a batch.
        steps = sum(math.ceil(size / batch_size) + 1 for size in sizes if size >= batch_size)
        return steps + math.ceil(sum(size for size in sizes if size < batch_size) / batch_size)

    def train(self, validation: Split | None, checkpoint: Path | None = None) -> None:
        """Train every run, and restore its best epoch."""
        tokens = sum(self._states.lengths)
        epochs = max(run.settings.epochs for run in self.runs)
        run_sha256 = "" if checkpoint is None else self._run_sha256()
        done = 0 if checkpoint is None else resume(self.runs, checkpoint, run_sha256=run_sha256)
        if done:
            say(f"Resuming training after {done} of at most {epochs} epochs.")
        with progress("Training", (epochs - done) * tokens, unit="tokens") as advance:
            for epoch in range(done, epochs):
                active = [run for run in self.runs if not run.has_finished]
                if not active:
                    break
                self._train_epoch(active, epoch, advance)
                if validation is None:
                    for run in active:
                        run.end_epoch(None)
                else:
                    self._validate(active, validation)
                if checkpoint is not None:
                    save_checkpoint(self.runs, checkpoint, epochs=epoch + 1, run_sha256=run_sha256)
        for run in self.runs:
            run.restore_best(self._compression)

    def _run_sha256(self) -> str:
        """A hash of everything that determines the steps of a training run and their results."""
        states = self._states
        scales = [
            sha256(run.standardisation.scale.cpu().numpy().tobytes()).hexdigest()
            for run in self.runs
        ]
        runs = [(run.spec, run.settings, run.texts.tolist()) for run in self.runs]
        versions = (version("sidelight"), torch.__version__)
        return hash_of(
            states.key, states.record, states.shards, runs, scales, self._device, versions
        )

    def _train_epoch(self, runs: Sequence[TrainingRun], epoch: int, advance: Progress) -> None:
        # Runs with the same texts in the same order share each batch.
        groups: dict[tuple[int, int], list[TrainingRun]] = {}
        for run in runs:
            groups.setdefault((run.settings.seed, run.settings.batch_size), []).append(run)
        shards = self._states.shards
        order = torch.randperm(len(shards), generator=torch.Generator().manual_seed(epoch))
        for texts in map(shards.__getitem__, order.tolist()):
            for (seed, batch_size), group in groups.items():
                shuffle = torch.Generator().manual_seed(seed * 7919 + epoch)
                # A shard with fewer texts than a batch is part of a batch.
                share = min(1.0, len(texts) / batch_size)
                for batch in random_batches(texts, size=batch_size, shuffle=shuffle):
                    self._train_batch(group, *self._draw_segments(batch, shuffle), share)
            advance(sum(self._states.lengths[text] for text in texts))
        for run in runs:
            run.step()

    def _draw_segments(
        self, texts: Sequence[int], random: torch.Generator
    ) -> tuple[Shard, Targets]:
        """Replace most unlabelled texts of a batch with a random part.

        Serving uses the highest logit of the parts that are classified, such as turns, and no part
        of an unlabelled text has a label.
        """
        chosen: dict[int, Int[np.ndarray, " _"]] = {}
        for text in texts:
            segments = self._segments[text]
            if segments and float(torch.rand((), generator=random)) < _SEGMENT_SHARE:
                chosen[text] = segments[int(torch.randint(len(segments), (), generator=random))]
        batch = self._states.read(texts, chosen)
        return batch, self._targets.select(batch.rows.to(self._device))

    def _train_batch(
        self, runs: Sequence[TrainingRun], batch: Shard, targets: Targets, share: float
    ) -> None:
        batch = batch.to(self._device)
        lengths = batch.lengths.to(self._device)
        active = [run for run in runs if run.texts[batch.rows].any()]
        for group in self._sharing_a_matmul(active):
            losses: list[Tensor] = []
            for run, projections in zip(
                group, self._projections(batch, group, self._dtype), strict=True
            ):
                tokens, wanted, is_included = (
                    Ragged(projections, lengths),
                    targets,
                    run.texts[batch.rows],
                )
                if not is_included.all():
                    texts = is_included.nonzero()[:, 0].to(self._device)
                    tokens, wanted = tokens.select(texts), targets.select(texts)
                losses.append(run.loss(tokens, wanted))
            # Parameters are disjoint, so the gradient of the sum is that of each run.
            (torch.stack(losses).sum() * share).backward()
        for run in active:
            run.take(share)

    def _validate(self, runs: Sequence[TrainingRun], validation: Split) -> None:
        targets = validation.targets
        labels = targets.labels.values.numpy()
        scores = self.score(runs, validation, dtype=self._dtype)
        for run, (logits, token_logits) in zip(runs, scores, strict=True):
            measured = targets.compared(logits, token_logits)
            if np.isfinite(measured).all():
                run.end_epoch(validation_score(validation.task, measured, labels))
            else:
                run.has_diverged = True

    def _projections(
        self, shard: Shard, runs: Sequence[TrainingRun], dtype: torch.dtype
    ) -> Sequence[Float[Tensor, "token layer _"]]:
        return project_runs(shard, runs, dtype=dtype, compression=self._compression)

    def _sharing_a_matmul(self, runs: Sequence[TrainingRun]) -> list[list[TrainingRun]]:
        """Groups of runs that share a matmul.

        In float32, sums depend on the width of a product, so runs are separate unless
        ``shares_matmuls``.
        """
        is_separate = self._dtype == torch.float32 and not self._shares
        return [[run] for run in runs] if is_separate else _grouped(runs)

    @torch.inference_mode()
    def score(
        self, runs: Sequence[TrainingRun], split: Split, *, dtype: torch.dtype
    ) -> list[tuple[Float[np.ndarray, "text output"], list[Float[np.ndarray, "_ output"]]]]:
        """By run, the logits of each text as in serving, and of its tokens if they are labelled.

        Args:
            runs: Runs to score with.
            split: The texts.
            dtype: Dtype of the matmuls; float32, as in serving, for logits that calibration is
                fitted to.
        """
        states, targets = split.states, split.targets
        logits = {run: np.zeros((len(split), split.task.outputs)) for run in runs}
        token_logits = {run: dict[int, Float[np.ndarray, "_ output"]]() for run in runs}
        for shard in states.shards:
            shuffle = torch.Generator().manual_seed(0)
            for texts in random_batches(shard, size=_VALIDATION_BATCH, shuffle=shuffle):
                batch = states.read(texts).to(self._device)
                segments = [split.segments[text] for text in texts]
                for group in self._sharing_a_matmul(runs):
                    for run, projections in zip(
                        group, self._projections(batch, group, dtype), strict=True
                    ):
                        tokens = Ragged(projections, batch.lengths.to(self._device))
                        logits[run][texts] = _served(run, tokens, segments).cpu().numpy()
                        # Empty for labels of whole texts.
                        of_tokens = targets.token_logits(run.mechanism, tokens)
                        token_logits[run] |= zip(texts, of_tokens, strict=False)
        return [
            (
                logits[run],
                [token_logits[run][text] for text in sorted(token_logits[run])],
            )
            for run in runs
        ]


def _grouped(runs: Sequence[TrainingRun]) -> list[list[TrainingRun]]:
    """Group runs up to a number of columns, either all with normalised states or none; a larger run
    is alone.
    """
    groups: list[list[TrainingRun]] = []
    filled = 0
    for run in sorted(runs, key=lambda run: (run.standardisation.is_normalised, run.depth)):
        width = run.mechanism.projections().shape[2]
        is_normalised = run.standardisation.is_normalised
        fits = filled + width <= _MOST_PROJECTIONS
        if groups and fits and groups[-1][0].standardisation.is_normalised == is_normalised:
            groups[-1].append(run)
            filled += width
        else:
            groups.append([run])
            filled = width
    return groups


def project_runs(
    shard: Shard,
    runs: Sequence[TrainingRun],
    *,
    dtype: torch.dtype,
    compression: Compression | None = None,
) -> Sequence[Float[Tensor, "token layer _"]]:
    """Each run's projections of every token, with one matmul per layer.

    Args:
        shard: The states.
        runs: Runs that read them.
        dtype: Dtype of the matmuls.
        compression: Compression of the states.
    """
    folded = [
        run.standardisation.fold(run.mechanism.projections(), dtype=dtype)
        if compression is None
        else compression.fold(run.standardisation, run.mechanism.projections(), dtype=dtype)
        for run in runs
    ]
    joined = Projection.joined(folded)
    # Rounded like the states; calibration, which is fitted in float32, absorbs the effect.
    joined = replace(joined, shift=joined.shift.to(dtype))
    layers = len(runs[0].standardisation.scale)
    depth = min(len(shard.hidden), max(run.depth for run in runs))
    projections = layer_products(shard.limited(depth), joined.limited(depth))
    projections = pad(projections, (0, 0, 0, 0, 0, layers - depth)).transpose(0, 1)
    return projections.split([projection.weight.shape[2] for projection in folded], 2)


def layer_products(shard: Shard, projection: Projection) -> Float[Tensor, "layer token column"]:
    """The projections of every token, with one matmul per layer in the dtype of the projection."""
    hidden, dtype = shard.hidden, projection.weight.dtype
    if hidden.dtype == dtype:
        return projection.layers(hidden)
    if shard.factors is None and not torch.is_grad_enabled():
        products = [projection.layer(i, layer.to(dtype)) for i, layer in enumerate(hidden)]
        return torch.stack(products)
    projections = _LayerProducts.apply(hidden, projection.weight)
    assert isinstance(projections, Tensor)
    if shard.factors is not None:
        projections = projections * shard.factors[..., None].to(dtype)
    elif projection.is_normalised is not None:
        inverse = torch.stack([inverse_rms(layer) for layer in hidden])
        projections = projections * torch.where(projection.is_normalised, inverse, 1).to(dtype)
    return projections + projection.shift[:, None]


def _padded_rows(matrix: Tensor, like: Tensor) -> Tensor:
    """The matrix in the dtype of ``like``, with rows of zeros where products keep each shape."""
    matrix = matrix.to(like.dtype)
    missing = -len(matrix) % _ROW_MULTIPLE if keeps_shapes(like.device, like.dtype) else 0
    return pad(matrix, (0, 0, 0, missing)) if missing else matrix


class _LayerProducts(torch.autograd.Function):
    """``hidden @ weight`` in the dtype of the weight, layer by layer.

    Copying all layers to another dtype costs more than the matmuls, as does autograd's gradient of
    a narrow weight, ``hidden.T @ gradient``. Hidden states get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        tokens = hidden.shape[1]
        projections = weight.new_empty(len(hidden), tokens, weight.shape[2])
        for layer, layer_weight, out in zip(hidden, weight, projections, strict=True):
            out[:] = torch.mm(_padded_rows(layer, weight), layer_weight)[:tokens]
        return projections

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (hidden,), (gradient,) = ctx.saved_tensors, gradients
        shape = (len(hidden), gradient.shape[2], hidden.shape[2])
        turned = gradient.new_empty(shape)
        for layer, layer_gradient, out in zip(hidden, gradient, turned, strict=True):
            states = _padded_rows(layer, gradient)
            torch.mm(_padded_rows(layer_gradient, gradient).T, states, out=out)
        return None, turned.transpose(1, 2)


def _served(
    run: TrainingRun, tokens: Ragged, segments: Sequence[Sequence[Int[np.ndarray, " _"]]]
) -> Float[Tensor, "text output"]:
    """The highest logit of each label over the classified parts of a text and the whole text."""
    logits = run.score(tokens)
    starts = (tokens.lengths.cumsum(0) - tokens.lengths).tolist()
    rows = [
        start + segment for start, text in zip(starts, segments, strict=True) for segment in text
    ]
    if not rows:
        return logits
    device = tokens.values.device
    lengths = torch.tensor([*map(len, rows)], device=device)
    owners = torch.tensor([i for i, text in enumerate(segments) for _ in text], device=device)
    segment_logits = run.score(Ragged(tokens.values[np.concatenate(rows)], lengths))
    index = owners[:, None].expand_as(segment_logits)
    return logits.scatter_reduce(0, index, segment_logits, "amax")
