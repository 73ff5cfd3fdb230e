"""Which examples to hold out, so that labels keep their share and groups stay whole.

Knows numbers only: group and label indices, no texts.
"""

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]


def indicators(labels: Indices | None, *, classes: int) -> Mask:
    """Which stratum each row belongs to.

    Args:
        labels: Class index `[row]`, or 0/1 `[row, label]`; None puts all rows in one stratum.
        classes: Number of labels of the task.

    Returns:
        `[row, stratum]`: one stratum per label; a multi-label task has a last one for the rows
        where no label holds. Without labels, no stratum.
    """
    if labels is None:
        return np.zeros((0, 0), dtype=np.bool_)
    if labels.ndim == 1:
        return labels[:, None] == np.arange(classes)
    holds = labels.astype(np.bool_)
    return np.column_stack([holds, ~holds.any(axis=1)])


def hold_out(groups: Indices, strata: Mask, *, fraction: float, seed: int) -> Mask:
    """Chooses whole groups, the rarest stratum first, until each has its share held out.

    A greedy form of iterative stratification (Sechidis, Tsoumakas & Vlahavas 2011): with one label
    per row it is plain stratified sampling.

    Args:
        groups: `[row]`; rows of one group are never parted.
        strata: `[row, stratum]`; without any stratum all rows count as one.
        fraction: Share of each stratum's rows to hold out, between 0 and 1.
        seed: Decides the order in which groups are tried.

    Returns:
        `[row]`: whether the row is held out.
    """
    if strata.size == 0:
        strata = np.ones((len(groups), 1), dtype=np.bool_)
    sizes = _rows_by_group(groups, strata)
    order = np.random.default_rng(seed).permutation(len(sizes))
    side = np.zeros(len(sizes), dtype=np.int64)  # 0 undecided, 1 training, 2 held out
    for stratum in np.argsort(sizes.sum(axis=0), kind="stable"):
        _decide(side, sizes[:, stratum], order, fraction)
    return (side == 2)[groups]


def _rows_by_group(groups: Indices, strata: Mask) -> Indices:
    """Rows that each group has in each stratum, `[group, stratum]`."""
    sizes = np.zeros((int(groups.max(initial=-1)) + 1, strata.shape[1]), dtype=np.int64)
    np.add.at(sizes, groups, strata)
    return sizes


def _decide(side: Indices, sizes: Indices, order: Indices, fraction: float) -> None:
    """Decides the side of every undecided group of one stratum, in place."""
    candidates = [group for group in order if sizes[group] and side[group] == 0]
    missing = fraction * sizes.sum() - sizes[side == 2].sum()
    if not (sizes[side == 1].any() or len(candidates) == 0):
        side[candidates.pop(0)] = 1
    if not sizes[side == 2].any():
        # One of the smallest groups, so that the stratum is never absent from the held-out part.
        candidates.sort(key=lambda group: sizes[group])
        missing = max(missing, sizes[candidates[0]] if candidates else 0)
    for group in candidates:
        takes = sizes[group] <= round(missing)
        side[group] = 2 if takes else 1
        missing -= sizes[group] if takes else 0
