"""Metrics of probabilities against labels, over many weightings of the rows at once.

Knows arrays, not probes or reports. Every metric reads row weights, so a bootstrap resample is one
column of counts, and a block of resamples is a few matrix products over rows that are sorted once.
Inside this package a metric that is undefined is NaN; `evaluation` turns it into None.
"""

from sidelight.metrics.arrays import AnyArray, Flags, Numbers, Values
from sidelight.metrics.confidence import Confidences, ece, state_confidences
from sidelight.metrics.confusion import Confusion, confusion_matrix, count, f1, precision, recall
from sidelight.metrics.measurement import METRICS, measure
from sidelight.metrics.predictions import Predictions, checked_labels, decide
from sidelight.metrics.ranking import Curve, Ranking, auprc, auroc, rank, recall_at_fpr, walk
from sidelight.metrics.resampling import measure_resamples

__all__ = [
    "METRICS",
    "AnyArray",
    "Confidences",
    "Confusion",
    "Curve",
    "Flags",
    "Numbers",
    "Predictions",
    "Ranking",
    "Values",
    "auprc",
    "auroc",
    "checked_labels",
    "confusion_matrix",
    "count",
    "decide",
    "ece",
    "f1",
    "measure",
    "measure_resamples",
    "precision",
    "rank",
    "recall",
    "recall_at_fpr",
    "state_confidences",
    "walk",
]
