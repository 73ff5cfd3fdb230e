"""The depth of a probe: the fewest layers that are as good on held-out texts.

A pass without generation stops after the deepest layer that a loaded probe reads, so checking a
probe that reads two thirds of the layers takes two thirds of the time.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from sidelight.probes.card import DepthTrial
from sidelight.statistics.calibration import fit_calibration, suggested_calibration
from sidelight.statistics.metrics import log_losses
from sidelight.training.dataset import Split
from sidelight.training.measuring import calibrate_examples
from sidelight.training.optimisation import TrainingRun
from sidelight.training.preparing import ProbeDataset
from sidelight.training.settings import FitOptions
from sidelight.training.traffic import conversations_among
from sidelight.types import Task

# Depths to try, as shares of the deepest layer. Below half, no data set was as good.
_SHARES = (5 / 6, 2 / 3, 1 / 2)
# Maximum loss of a lower depth, relative to the loss at full depth, for the upper end of the
# one-sided 95 % confidence interval of the paired difference.
_TOLERANCE = 0.05
_ONE_SIDED = 1.645


def candidate_depths(deepest: int) -> list[int]:
    """The candidate depths, deepest first."""
    depths = [deepest, *(max(2, round(share * deepest)) for share in _SHARES)]
    return sorted({depth for depth in depths if depth <= deepest}, reverse=True)


def choose_depth(
    runs: Sequence[TrainingRun], dataset: ProbeDataset, options: FitOptions
) -> tuple[TrainingRun, tuple[DepthTrial, ...]]:
    """Choose the run with the smallest depth that is not worse than the deepest; also return the
    trials.

    Depths are tried from the deepest down until one loses too much, so the probability of wrongly
    accepting one is that of a single test.

    Args:
        runs: The same training run at several depths, with out-of-fold logits.
        dataset: Data set that they were trained on.
        options: Options of the training run.
    """
    deepest, *rest = sorted(runs, key=lambda run: run.depth, reverse=True)
    if not rest:
        return deepest, ()
    losses = text_losses(deepest, dataset, options)
    chosen, trials = deepest, [DepthTrial(layers=deepest.depth, loss=float(losses.mean()))]
    for run in rest:
        each = text_losses(run, dataset, options)
        trials.append(_compared(run.depth, each, losses))
        if not trials[-1].is_accepted:
            break
        chosen = run
    return chosen, tuple(trials)


def _compared(
    depth: int, losses: Float[np.ndarray, " text"], of_deepest: Float[np.ndarray, " text"]
) -> DepthTrial:
    lost = losses - of_deepest
    at_most = float(lost.mean() + _ONE_SIDED * lost.std(ddof=1) / np.sqrt(len(lost)))
    is_accepted = at_most <= _TOLERANCE * float(of_deepest.mean())
    return DepthTrial(
        layers=depth,
        loss=float(losses.mean()),
        lost=float(lost.mean()),
        lost_at_most=at_most,
        is_accepted=is_accepted,
    )


def text_losses(
    run: TrainingRun, dataset: ProbeDataset, options: FitOptions
) -> Float[np.ndarray, " text"]:
    """The calibrated log loss of each text with its contexts, or the mean over the tokens of each
    text.
    """
    measured = dataset.measured
    if measured.examples.spans is not None:
        return _token_losses(run, measured)
    task, texts = dataset.task, len(dataset.validation)
    logits, in_contexts = run.logits[:texts], run.logits[texts:]
    calibrated = calibrate_examples(
        logits,
        dataset.validation.examples,
        dataset.folds,
        kind=options.calibration,
        rule=options.threshold,
        background=conversations_among(dataset.contexts, in_contexts),
    )
    losses = calibrated.losses
    if len(in_contexts):
        probabilities = calibrated.calibration.apply(in_contexts)
        rest = log_losses(task, probabilities, measured.labels[texts:])
        losses = np.concatenate([losses, rest])
    # A text and its contexts are one observation, as is a single conversation.
    owners = np.arange(len(losses))
    for row, context in enumerate(dataset.contexts, start=texts):
        owners[row] = row if context.text is None else context.text
    owners = np.unique(owners, return_inverse=True)[1]
    weights = measured.weights
    sums = np.bincount(owners, losses * weights)
    return sums * len(sums) / weights.sum()


def _token_losses(run: TrainingRun, measured: Split) -> Float[np.ndarray, " text"]:
    task: Task = measured.task
    labels = task.labels_of(measured.targets.labels.values.numpy())
    logits = np.concatenate(run.token_logits)
    calibration = fit_calibration(suggested_calibration(task), logits, labels, task)
    losses = log_losses(task, calibration.apply(logits), labels)
    ends = np.cumsum([*map(len, run.token_logits)])
    return np.array([each.mean() for each in np.split(losses, ends[:-1])])
