"""Reports of the quality of probabilities or spans, with intervals."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float, Int

from sidelight.data.examples import SpanExamples
from sidelight.data.spans import character_f1, labelled_characters
from sidelight.statistics.metrics import (
    METRICS,
    Predictions,
    decision_metrics,
    measure_resamples,
    ranking_metrics,
    wilson,
)
from sidelight.types import Numbers, Span, Task, Values, as_json


@dataclass(frozen=True)
class Estimate:
    """A metric and its 95 % interval: from the bootstrap, or Wilson's for a share.

    Attributes:
        value: The metric on the rows themselves; None if undefined there.
        low: The 2.5th percentile over the resamples in which it is defined; None if there are none.
        high: The 97.5th percentile over the same resamples.
    """

    value: float | None
    low: float | None
    high: float | None

    @staticmethod
    def of(draws: Float[Values, " draw"]) -> "Estimate":
        """Build from the value on the rows, followed by the value on each resample; NaN is
        undefined.
        """
        value, resampled = _number(draws[0]), draws[1:][~np.isnan(draws[1:])]
        if value is None or len(resampled) == 0:
            return Estimate(value, None, None)
        low, high = np.percentile(resampled, [2.5, 97.5])
        return Estimate(value, float(low), float(high))

    def as_share(self, rows: int) -> "Estimate":
        """With Wilson's interval for a share of this many rows; unchanged if it has no interval."""
        if self.value is None or self.low is None or rows == 0:
            return self
        low, high = wilson(np.array([self.value]), np.array([rows]))[:, 0]
        return Estimate(self.value, float(low), float(high))

    def to_dict(self) -> dict[str, Any]:
        """The estimate as JSON-ready values."""
        return {"value": self.value, "ci": [self.low, self.high]}

    def __str__(self) -> str:
        """For example ``0.859 [0.831, 0.884]``; a dash means an undefined number."""
        interval = "" if self.low is None else f" [{_short(self.low)}, {_short(self.high)}]"
        return _short(self.value) + interval


@dataclass(frozen=True, eq=False)
class Report:
    """Metrics of a task's probabilities on some rows.

    Attributes:
        task: The classes.
        rows: Number of rows.
        metrics: The metrics in `METRICS`, averaged over labels as in `metrics.measure`.
        per_class: Each label against the rest, both classes of a binary task: ``precision``,
            ``recall``, ``f1``, ``auprc`` and ``auroc``, None where undefined; and ``support``, the
            number of rows that have the label.
        thresholds: Thresholds of the decisions; empty for a multi-class task.
        confusion_matrix: [actual, predicted] counts; for a multi-label task one 2 x 2 matrix per
            label, [label, actual, predicted].
    """

    task: Task
    rows: int
    metrics: dict[str, Estimate]
    per_class: dict[str, dict[str, float | None]]
    thresholds: tuple[float, ...]
    confusion_matrix: Annotated[Int[Numbers, "..."], *as_json(np.int64)]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values, the metrics at the top level."""
        return {
            "task": self.task.kind,
            "labels": list(self.task.labels),
            "rows": self.rows,
            "thresholds": list(self.thresholds),
            **{name: estimate.to_dict() for name, estimate in self.metrics.items()},
            "per_class": self.per_class,
            "confusion_matrix": self.confusion_matrix.tolist(),
        }


def evaluate(predictions: Predictions, *, bootstrap: int = 1000, seed: int = 0) -> Report:
    """Measure probabilities and decisions against labels.

    Args:
        predictions: Result of ``decide`` on calibrated probabilities.
        bootstrap: Number of resamples of rows for the intervals; with 0 there are no intervals.
        seed: Seed of the resamples.
    """
    task, rows = predictions.task, len(predictions.scores)
    confusion = predictions.confusion_matrix()
    if not predictions.targets[:, -1].any():
        # A class 'none' without rows would count as never correct.
        predictions = replace(
            predictions,
            scores=predictions.scores[:, task.foreground],
            targets=predictions.targets[:, task.foreground],
            decisions=predictions.decisions[:, task.foreground],
        )
    draws = measure_resamples(predictions, resamples=bootstrap, seed=seed)
    metrics = {name: Estimate.of(draws[name]) for name in METRICS}
    metrics["accuracy"] = metrics["accuracy"].as_share(rows)
    # If no row is wrong, neither is any resample, so the number of rows of the rarest label
    # determines the interval.
    sides = [int(min(holds.sum(), (~holds).sum())) for holds in predictions.targets.T]
    rarest = min(filter(None, sides), default=0)
    for name, estimate in metrics.items():
        if estimate.value in (0, 1) and estimate.low == estimate.high:
            metrics[name] = estimate.as_share(rarest)
    return Report(
        task,
        rows=rows,
        metrics=metrics,
        per_class=_per_class(predictions),
        thresholds=predictions.thresholds,
        confusion_matrix=confusion,
    )


def _per_class(predictions: Predictions) -> dict[str, dict[str, float | None]]:
    columns = zip(predictions.scores.T, predictions.targets.T, strict=True)
    ranked = [ranking_metrics(*column, predictions.once) for column in columns]
    metrics = decision_metrics(predictions, predictions.once)
    metrics |= {name: np.array([values[name] for values in ranked]) for name in ("auprc", "auroc")}
    support = predictions.targets.sum(axis=0).tolist()
    return {
        label: {
            **{name: _number(values[index, 0]) for name, values in metrics.items()},
            "support": support[index],
        }
        for index, label in enumerate(predictions.task.labels[: len(support)])
    }


@dataclass(frozen=True)
class SpanReport:
    """Metrics of predicted spans.

    Attributes:
        texts: Number of texts.
        metrics: Over all labels: ``character_f1``, the mean character F1 of the texts; and
            ``precision``, ``recall`` and ``f1`` of spans, which must match exactly.
        per_label: The same metrics for each label.
        spans: Number of true spans of each label.
        complete: Number of these whose characters are all found with the right label.
        partial: Number of these with only some characters found.
    """

    texts: int
    metrics: Mapping[str, Estimate]
    per_label: Mapping[str, Mapping[str, Estimate]]
    spans: Mapping[str, int]
    complete: Mapping[str, int]
    partial: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values, the metrics of all labels at the top level."""
        per_label = {
            label: {
                "spans": self.spans[label],
                "complete": self.complete[label],
                "partial": self.partial[label],
                **{name: estimate.to_dict() for name, estimate in estimates.items()},
            }
            for label, estimates in self.per_label.items()
        }
        metrics = {name: estimate.to_dict() for name, estimate in self.metrics.items()}
        return {"texts": self.texts, **metrics, "per_label": per_label}


def evaluate_spans(
    examples: SpanExamples, predicted: Sequence[Sequence[Span]], *, bootstrap: int = 1000
) -> SpanReport:
    """Compare found spans with labelled ones, text by text.

    Args:
        examples: The texts and their spans.
        predicted: Predicted spans of each text.
        bootstrap: Number of resamples of texts for the intervals; with 0 there are none.
    """
    labels = examples.task.output_labels
    values = measure_span_resamples(examples, predicted, resamples=bootstrap)
    everything, *by_label = (
        {name: Estimate.of(draws[:, group]) for name, draws in values.items()}
        for group in range(1 + len(labels))
    )
    spans, complete, partial = (Counter(dict.fromkeys(labels, 0)) for _ in range(3))
    for (text, true_spans), found in zip(examples.text_spans, predicted, strict=True):
        flags = labelled_characters(text, found, labels)
        for span in {*true_spans}:
            characters = flags[span.start : span.end, labels.index(span.label)]
            spans[span.label] += 1
            complete[span.label] += bool(characters.all())
            partial[span.label] += bool(characters.any() and not characters.all())
    per_label = dict(zip(labels, by_label, strict=True))
    return SpanReport(len(examples), everything, per_label, spans, complete, partial)


def measure_span_resamples(
    examples: SpanExamples, predicted: Sequence[Sequence[Span]], *, resamples: int
) -> dict[str, Float[Values, "draw group"]]:
    """The metrics of a ``SpanReport``, over all labels and for each, on the texts and on resamples.

    Every call with the same number of texts draws the same resamples.
    """
    texts, labels = examples.text_spans, examples.task.output_labels
    # All labels pooled, then each label.
    groups = [[*labels], *([label] for label in labels)]
    f1 = np.empty((len(texts), len(groups)))
    counts = np.empty((3, len(texts), len(groups)))  # hits, predicted, actual
    for i, ((text, actual), found) in enumerate(zip(texts, predicted, strict=True)):
        pair = (actual, found)
        flags = [labelled_characters(text, spans, labels) for spans in pair]
        for j, group in enumerate(groups):
            columns = [labels.index(label) for label in group]
            f1[i, j] = character_f1(*(label_flags[:, columns] for label_flags in flags))
            exact = [{span for span in spans if span.label in group} for spans in pair]
            counts[:, i, j] = len(exact[0] & exact[1]), len(exact[1]), len(exact[0])
    draws = np.random.default_rng(0).multinomial(
        len(texts), [1 / len(texts)] * len(texts), size=resamples
    )
    weights = np.vstack([np.ones(len(texts)), draws])
    hits, claims, truths = (weights @ label_flags for label_flags in counts)
    with np.errstate(invalid="ignore"):
        return {
            "character_f1": weights @ f1 / len(texts),
            "precision": hits / claims,
            "recall": hits / truths,
            "f1": 2 * hits / (claims + truths),
        }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
