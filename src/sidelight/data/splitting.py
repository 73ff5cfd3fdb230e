"""Chooses examples to hold out, so that labels keep their share and groups stay whole.

Knows only numbers (group and label indices), no texts.
"""

import numpy as np
from jaxtyping import Bool, Int

from sidelight.types import Flags, Numbers

# Enough rows to choose a threshold and a calibration on.
_ENOUGH_VALIDATION_ROWS = 150


def validation_share(rows: int) -> float:
    """The share of the rows to hold out for validation: 15 %, or up to 30 % if there are few."""
    return max(0.15, min(0.3, _ENOUGH_VALIDATION_ROWS / rows))


def indicators(labels: Int[Numbers, "row ..."], *, classes: int) -> Bool[Flags, "row stratum"]:
    """The strata that each row belongs to: one per label.

    A multi-label task (`labels` has two axes) gets one more, for the rows where no label holds.
    """
    if labels.ndim == 1:
        return labels[:, None] == np.arange(classes)
    holds = labels.astype(np.bool_)
    return np.column_stack([holds, ~holds.any(axis=1)])


def hold_out(
    groups: Int[Numbers, " row"],
    strata: Bool[Flags, "row stratum"],
    *,
    fraction: float,
    seed: int,
) -> Bool[Flags, " row"]:
    """Chooses whole groups, the rarest stratum first, until each stratum has its share held out.

    A greedy form of iterative stratification (Sechidis, Tsoumakas & Vlahavas 2011); with one label
    per row it is plain stratified sampling.

    Args:
        groups: Number of each row's group, from 0; rows of one group stay together.
        strata: Which strata each row belongs to, at least one.
        fraction: Share of each stratum's rows to hold out, between 0 and 1.
        seed: Decides the order in which groups are tried.

    Returns:
        Whether each row is held out.
    """
    # The number of rows that each group has in each stratum.
    sizes = np.zeros((int(groups.max(initial=-1)) + 1, strata.shape[1]), dtype=np.int64)
    np.add.at(sizes, groups, strata)
    order = np.random.default_rng(seed).permutation(len(sizes))
    training, held_out = np.zeros((2, len(sizes)), dtype=np.bool_)
    for stratum in np.argsort(sizes.sum(axis=0), kind="stable"):
        _assign(training, held_out, sizes=sizes[:, stratum], order=order, fraction=fraction)
    return held_out[groups]


def _assign(
    training: Bool[Flags, " group"],
    held_out: Bool[Flags, " group"],
    *,
    sizes: Int[Numbers, " group"],
    order: Int[Numbers, " group"],
    fraction: float,
) -> None:
    """Puts every free group of one stratum on a side, in place; each side gets one if it can."""
    free = [group for group in order if sizes[group] and not training[group] | held_out[group]]
    if free and not sizes[training].any():
        training[free.pop(0)] = True
    missing = fraction * sizes.sum() - sizes[held_out].sum()
    if free and not sizes[held_out].any():
        free.sort(key=lambda group: sizes[group])
        missing = max(missing, sizes[free[0]])
    for group in free:
        held_out[group] = sizes[group] <= round(missing)
        training[group] = not held_out[group]
        missing -= sizes[group] * held_out[group]
