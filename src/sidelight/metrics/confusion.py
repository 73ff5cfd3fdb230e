"""Counts of right and wrong decisions, and their ratios. Knows decisions, not probabilities."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from sidelight.metrics.arrays import Flags, Numbers, Values
from sidelight.metrics.predictions import Predictions
from sidelight.metrics.undefined import ratio


@dataclass(frozen=True)
class Confusion:
    """Weighted counts of the four outcomes of each label's decision.

    Attributes:
        hits: Holds and was predicted.
        false_alarms: Was predicted and does not hold.
        misses: Holds and was not predicted.
        rejections: Neither.
    """

    hits: Float[Values, "label resample"]
    false_alarms: Float[Values, "label resample"]
    misses: Float[Values, "label resample"]
    rejections: Float[Values, "label resample"]

    def pooled(self) -> "Confusion":
        """The four counts summed over the labels, for micro averages."""
        return Confusion(
            self.hits.sum(axis=0, keepdims=True),
            self.false_alarms.sum(axis=0, keepdims=True),
            self.misses.sum(axis=0, keepdims=True),
            self.rejections.sum(axis=0, keepdims=True),
        )


def count(
    targets: Bool[Flags, "row label"],
    decisions: Bool[Flags, "row label"],
    weights: Float[Values, "row resample"],
) -> Confusion:
    """Counts the outcomes of each label's decisions, each row as often as its weight says."""
    hits = (targets & decisions).T.astype(np.float64) @ weights  # (label, resample)
    false_alarms = (~targets & decisions).T.astype(np.float64) @ weights
    misses = (targets & ~decisions).T.astype(np.float64) @ weights
    return Confusion(hits, false_alarms, misses, weights.sum(axis=0) - hits - false_alarms - misses)


def confusion_matrix(predictions: Predictions) -> Int[Numbers, "..."]:
    """Counts of rows by actual and predicted label, [actual, predicted].

    For a multi-label task one matrix per label, [label, actual, predicted], absent before present.
    """
    actual = predictions.targets.astype(np.int64)
    predicted = predictions.decisions.astype(np.int64)
    if predictions.kind != "multilabel":
        return actual.T @ predicted
    actual, predicted = np.stack([1 - actual, actual]), np.stack([1 - predicted, predicted])
    return np.einsum("arl,prl->lap", actual, predicted)


def precision(confusion: Confusion) -> Float[Values, "label resample"]:
    """Hits / predicted; 0 if the label holds but is never predicted, NaN if neither happens."""
    predicted = confusion.hits + confusion.false_alarms
    occurs = predicted + confusion.misses > 0
    return np.where(occurs, confusion.hits / np.maximum(predicted, 1), np.nan)


def recall(confusion: Confusion) -> Float[Values, "label resample"]:
    """Hits / rows where the label holds; NaN if it holds nowhere."""
    return ratio(confusion.hits, confusion.hits + confusion.misses)


def f1(confusion: Confusion) -> Float[Values, "label resample"]:
    """2 hits / (holds + predicted); NaN if the label neither holds nor is predicted anywhere."""
    errors = confusion.false_alarms + confusion.misses
    return ratio(2 * confusion.hits, 2 * confusion.hits + errors)
