"""All metrics of a task at once, by name. Knows which labels each one averages, not its formula."""

import numpy as np
from jaxtyping import Float

from sidelight.metrics.arrays import Values
from sidelight.metrics.confidence import ece, state_confidences
from sidelight.metrics.confusion import Confusion, count, f1, precision, recall
from sidelight.metrics.predictions import Predictions
from sidelight.metrics.ranking import auprc, auroc, recall_at_fpr, walk
from sidelight.metrics.undefined import mean_of_defined

METRICS = (
    "f1",
    "precision",
    "recall",
    "auprc",
    "auroc",
    "accuracy",
    "macro_f1",
    "recall_at_1pct_fpr",
    "ece",
)


def measure(
    predictions: Predictions, weights: Float[Values, "row resample"]
) -> dict[str, Float[Values, " resample"]]:
    """Every metric of `METRICS` in every resample; NaN where it is undefined.

    `f1`, `precision`, `recall`: of the positive class (binary), macro average (multi-class) or
    micro average (multi-label). `macro_f1`: the mean over all labels, both classes if binary.
    `auprc`, `auroc`, `recall_at_1pct_fpr`: of the positive class, else the mean over labels, each
    against the rest. `accuracy`: share of rows that are right, in all labels if multi-label.
    `ece`: see `ece` and `Confidences`, 15 bins. A mean over labels leaves out those whose metric is
    undefined: a label that holds nowhere, or, for F1 and precision, is not predicted either.

    Args:
        predictions: What was predicted and what holds.
        weights: How often each resample counts each row.
    """
    confusion = count(predictions.targets, predictions.decisions, weights)
    return (
        _headline_decisions(predictions, confusion)
        | _headline_rankings(predictions, weights)
        | {
            "accuracy": _accuracy(predictions, weights),
            "macro_f1": mean_of_defined(f1(confusion)),
            "ece": ece(state_confidences(predictions), weights),
        }
    )


def _headline_decisions(predictions: Predictions, confusion: Confusion) -> dict[str, Values]:
    pooled = predictions.kind == "multilabel"
    counts = confusion.pooled() if pooled else confusion
    shown = slice(None) if pooled else predictions.headline
    return {
        "f1": mean_of_defined(f1(counts)[shown]),
        "precision": mean_of_defined(precision(counts)[shown]),
        "recall": mean_of_defined(recall(counts)[shown]),
    }


def _headline_rankings(predictions: Predictions, weights: Values) -> dict[str, Values]:
    rows: list[tuple[Values, ...]] = []
    for ranking in predictions.rankings[predictions.headline]:
        walked = walk(ranking, weights)
        rows.append((auprc(walked), auroc(walked), recall_at_fpr(walked, 0.01)))
    means = [mean_of_defined(np.array(values)) for values in zip(*rows, strict=True)]
    return dict(zip(("auprc", "auroc", "recall_at_1pct_fpr"), means, strict=True))


def _accuracy(predictions: Predictions, weights: Values) -> Values:
    right = (predictions.decisions == predictions.targets).all(axis=1)
    return right.astype(np.float64) @ weights / weights.sum(axis=0)
