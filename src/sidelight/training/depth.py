"""The depth of a probe: the fewest layers that are as good on held-out texts.

A pass without generation stops after the deepest layer that a loaded probe reads, so checking a
probe that reads two thirds of the layers takes two thirds of the time.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from sidelight.probes.card import DepthTrial
from sidelight.training.optimisation import TrainingRun

Losses = Float[np.ndarray, " text"]
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
    runs: Sequence[TrainingRun], losses_of: Callable[[TrainingRun], Losses]
) -> tuple[TrainingRun, tuple[DepthTrial, ...]]:
    """Choose the run with the smallest depth that is not worse than the deepest; also return the
    trials.

    Depths are tried from the deepest down until one loses too much, so the probability of wrongly
    accepting one is that of a single test.

    Args:
        runs: The same training run at several depths, with out-of-fold logits.
        losses_of: Computes the loss of each held-out text by one of them.
    """
    deepest, *rest = sorted(runs, key=lambda run: run.depth, reverse=True)
    if not rest:
        return deepest, ()
    losses = losses_of(deepest)
    chosen, trials = deepest, [DepthTrial(layers=deepest.depth, loss=float(losses.mean()))]
    for run in rest:
        each = losses_of(run)
        trials.append(_compared(run.depth, each, losses))
        if not trials[-1].is_accepted:
            break
        chosen = run
    return chosen, tuple(trials)


def _compared(depth: int, losses: Losses, of_deepest: Losses) -> DepthTrial:
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
