"""Logits made into probabilities, measured on labelled texts and in ordinary traffic.

All logits are out-of-fold. Labelled texts are measured at calibrations and thresholds that the
other folds gave; ordinary conversations at the probe's own threshold, which was raised to let them
pass.
"""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from sidelight.calibration import (
    Calibration,
    CalibrationKind,
    fit_calibration,
    require_calibratable,
    suggested_calibration,
)
from sidelight.data.examples import Examples, LabelledExamples
from sidelight.errors import SidelightError
from sidelight.evaluation import Report, evaluate
from sidelight.metrics import log_losses, score_counts, wilson
from sidelight.probe import Probe
from sidelight.thresholds import (
    F1,
    OperatingCurve,
    ThresholdRule,
    choose_thresholds,
    operating_curves,
)
from sidelight.training.contexts import Context
from sidelight.training.dataset import FOLDS, Folds
from sidelight.types import Task

# Where there are no folds to measure by.
FLATTERING = (
    "A class has too few texts to measure on others than those that calibrate: the figures are "
    "flattering. Add more texts of it."
)

# The share of ordinary conversations that may be flagged, unless a rule says otherwise.
FALSE_ALARMS = 0.04
# Of the recall: where ordinary traffic costs more, training warns.
_COSTLY = 0.05
# No threshold is raised further.
_HIGHEST = 1 - 1e-9
# Words around a text, from one limit to the next.
_LENGTHS = (50, 150, 600)
_SHOWN, _SHOWN_CHARACTERS = 3, 160
# Of a text's hash: among 100,000 training texts, one of 10 million others has an equal one.
_HASH_BYTES = 5


@dataclass(frozen=True)
class Calibrated:
    """Logits of validation texts made into probabilities.

    Attributes:
        calibration: Fitted to all of them.
        probabilities: Out-of-fold, one row per text; without folds, by ``calibration``.
        losses: Their log losses.
        report: Their figures, with decisions by thresholds that the other folds gave; the report's
            thresholds are chosen on all of the texts.
        folds: The folds that were left out; none if the texts are measured by what they calibrate.
    """

    calibration: Calibration
    probabilities: Float[np.ndarray, "text output"]
    losses: Float[np.ndarray, " text"]
    report: Report
    folds: Folds


def calibrate_examples(
    logits: Float[np.ndarray, "text output"],
    examples: LabelledExamples,
    *,
    folds: Folds = (),
    kind: CalibrationKind | None = None,
    rule: ThresholdRule = F1,
    bootstrap: int = 1000,
    around: Sequence[float] = (),
    traffic: Float[np.ndarray, "conversation output"] | None = None,
) -> Calibrated:
    """Calibrates logits of labelled texts, and measures each fold by what calibrates on the others.

    Args:
        logits: Of each text, by a model that did not train on it.
        examples: The texts.
        folds: Indices of the texts of each fold, of which those of contexts are left out; none
            draws some.
        kind: How; None takes ``suggested_calibration``.
        rule: What the thresholds are chosen for.
        bootstrap: As for ``evaluate``.
        around: As for ``fit_calibration``.
        traffic: Logits of ordinary conversations, which thresholds let pass: see
            ``quiet_thresholds``. They calibrate too where they are a class of their own.
    """
    quiet = np.empty((0, logits.shape[1])) if traffic is None else traffic
    task, labels = examples.task, examples.labels
    kind = kind or suggested_calibration(task)

    def fitted(rows: Int[np.ndarray, " _"]) -> Calibration:
        """To these texts, and to ordinary traffic if it is a class."""
        counted, numbers = logits[rows], labels[rows]
        if task.abstains:
            counted = np.concatenate([counted, quiet])
            numbers = np.append(numbers, np.full(len(quiet), task.outputs - 1))
        return fit_calibration(kind, counted, numbers, task, around=around)

    def points(calibration: Calibration, rows: Int[np.ndarray, " _"]) -> tuple[float, ...]:
        chances = calibration.apply(logits[rows])
        thresholds = choose_thresholds(task, chances, labels[rows], rule=rule)
        return quiet_thresholds(thresholds, calibration, quiet, rule)

    every = np.arange(len(labels))
    calibration = fitted(every)
    thresholds = points(calibration, every)
    probabilities = calibration.apply(logits)
    applied = np.tile(thresholds, (len(labels), 1))
    folds = _measuring_folds(examples, folds, kind)
    for fold in folds:
        rest = np.setdiff1d(every, fold)
        of_rest = fitted(rest)
        probabilities[fold] = of_rest.apply(logits[fold])
        applied[fold] = points(of_rest, rest)
    report = evaluate(
        task,
        probabilities,
        labels,
        thresholds=thresholds,
        row_thresholds=applied,
        bootstrap=bootstrap,
    )
    losses = log_losses(task, probabilities, labels)
    return Calibrated(calibration, probabilities, losses, report, folds)


def _measuring_folds(examples: LabelledExamples, folds: Folds, kind: CalibrationKind) -> Folds:
    """These folds or others; none if the rest of some fold lacks what a calibration needs."""
    if folds:
        folds = tuple(fold[fold < len(examples)] for fold in folds)
    else:
        count = min(FOLDS, examples.distinct)
        folds = examples.folds(count, seed=0) if count > 1 else ()
    try:
        for fold in folds:
            rest = np.setdiff1d(np.arange(len(examples)), fold)
            require_calibratable(kind, examples.labels[rest], examples.task)
    except SidelightError:
        return ()
    return folds


def describe_scores(
    task: Task,
    probabilities: Float[np.ndarray, "text output"],
    labels: Int[np.ndarray, "text ..."] | None = None,
) -> dict[str, Any]:
    """What serving and a later recalibration need to know of the scores of some texts.

    ``scores`` are histograms, which drift is measured from; ``curves``, of labelled texts, what
    each threshold flags.
    """
    columns = dict(zip(task.labels[-task.outputs :], probabilities.T, strict=True))
    curves = {} if labels is None else operating_curves(task, probabilities, labels)
    return {
        "scores": {label: score_counts(own.tolist()) for label, own in columns.items()},
        "curves": {label: curve.to_dict() for label, curve in curves.items()},
    }


def describe_examples(examples: LabelledExamples) -> dict[str, Any]:
    """How many texts there are, a hash of them, and how many have each label."""
    counts = examples.label_counts.tolist()
    return {
        "rows": len(examples),
        "sha256": examples.content_hash,
        "classes": dict(zip(examples.task.labels, counts, strict=True)),
    }


def text_hashes(examples: Examples) -> str:
    """Short hashes of texts with their responses, in base64, so that a probe knows its texts again.

    Texts that differ in case and spacing alone have one hash.
    """
    return base64.b64encode(b"".join(sorted(set(_hashes(examples))))).decode()


def trained_texts(record: Mapping[str, Any], examples: Examples) -> int:
    """How many of the texts trained the probe with this record."""
    stored = base64.b64decode(record.get("training", {}).get("texts", ""))
    starts = range(0, len(stored), _HASH_BYTES)
    known = {stored[start : start + _HASH_BYTES] for start in starts}
    return sum(text in known for text in _hashes(examples))


def trained_text_warnings(record: Mapping[str, Any], examples: Examples) -> tuple[str, ...]:
    """A sentence if some of the texts that are measured trained the probe."""
    count = trained_texts(record, examples)
    if not count:
        return ()
    return (f"{count} of {len(examples)} texts were trained on: the figures flatter the probe.",)


def _hashes(examples: Examples) -> list[bytes]:
    keys = ([item.text_key, item.response_key] for item in examples.items)
    return [hashlib.sha256(repr(key).encode()).digest()[:_HASH_BYTES] for key in keys]


@dataclass(frozen=True)
class Surroundings:
    """Texts inside so many words, and as many words without one.

    Attributes:
        words: At most so many stand around the text.
        positives: How many texts of a label, and ``found`` how many of them are flagged.
        ordinary: How many have no such text in them, and ``flagged`` how many are flagged.
    """

    words: int
    positives: int
    found: int
    ordinary: int
    flagged: int


@dataclass(frozen=True)
class Traffic:
    """A probe in front of ordinary traffic.

    Attributes:
        conversations: How many ordinary conversations were judged.
        flagged: How many of them were flagged.
        surroundings: Texts and ordinary text by length.
        worst: The beginnings of the conversations with the highest probabilities.
        abstains: Whether to be flagged is to be given a class other than ``none``.
    """

    conversations: int
    flagged: int
    surroundings: tuple[Surroundings, ...]
    worst: tuple[tuple[float, str], ...]
    abstains: bool = False

    def __str__(self) -> str:
        """A few lines for a terminal."""
        lines = [rate_sentence(self.flagged, self.conversations, abstains=self.abstains)]
        for own in self.surroundings:
            if own.positives and own.ordinary:
                lines.append(
                    f"Your positive texts inside up to {own.words} words of other text: "
                    f"{own.found} of {own.positives} found. Other text of that length: "
                    f"{own.flagged} of {own.ordinary} flagged."
                )
        if self.worst:
            lines.append("Ordinary conversations with the highest probabilities:")
            lines += [f"  {probability:.2f}  {text}" for probability, text in self.worst]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, without texts, which may be an operator's own."""
        values = asdict(self)
        del values["worst"], values["abstains"]
        return values


def rate_sentence(flagged: int, conversations: int, *, abstains: bool) -> str:
    """How many ordinary conversations are flagged, or given a class."""
    does = "it gives another class than 'none' to" if abstains else "it flags"
    return (
        f"Of {conversations} ordinary conversations that it was not trained on, {does} "
        f"{flagged / max(1, conversations):.1%} ({flagged})."
    )


def flags_of(
    task: Task, probabilities: Float[np.ndarray, "text output"], thresholds: Sequence[float]
) -> Bool[np.ndarray, " text"]:
    """Which texts are flagged, or given a class other than ``none``."""
    if task.abstains:
        return probabilities.argmax(1) < task.outputs - 1
    return np.asarray((probabilities >= np.array(thresholds)).any(1))


def measure_traffic(
    task: Task,
    contexts: Sequence[Context],
    probabilities: Float[np.ndarray, "context output"],
    labels: Int[np.ndarray, "context ..."],
    thresholds: Sequence[float],
) -> Traffic:
    """Counts what is flagged.

    Args:
        task: The classes.
        contexts: What was judged.
        probabilities: Out-of-fold, of each.
        labels: Of each, as in ``LabelledExamples.labels``.
        thresholds: Of each label.
    """
    flags = flags_of(task, probabilities, thresholds)
    judged = probabilities[:, :-1] if task.abstains else probabilities
    conversations = conversations_of(contexts)
    highest = [float(judged[rows].max()) for rows in conversations]
    order = sorted(range(len(highest)), key=highest.__getitem__, reverse=True)[:_SHOWN]
    worst = [(highest[i], beginning(contexts[conversations[i][0]].example.text)) for i in order]
    surroundings: list[Surroundings] = []
    for shortest, longest in zip((0, *_LENGTHS), _LENGTHS, strict=False):
        # Every text of several classes is one of them.
        if task.abstains:
            break
        holds = labels.reshape(len(contexts), -1).any(1)
        near = np.array([shortest < context.words <= longest for context in contexts])
        shown = np.array([context.kind not in ("disguised", "plain") for context in contexts])
        positive, ordinary = near & shown & holds, near & ~holds
        # One part of a text is flagged less often than the highest of all.
        ordinary &= np.array([c.text is None and c.is_whole for c in contexts])
        counts = [int(rows.sum()) for rows in (positive, positive & flags)]
        counts += [int(rows.sum()) for rows in (ordinary, ordinary & flags)]
        surroundings.append(Surroundings(longest, *counts))
    flagged = sum(bool(flags[rows].any()) for rows in conversations)
    return Traffic(len(conversations), flagged, tuple(surroundings), tuple(worst), task.abstains)


def traffic_warnings(
    traffic: Traffic,
    curves: Mapping[str, OperatingCurve],
    thresholds: Sequence[float],
    rule: ThresholdRule,
) -> list[str]:
    """Where ordinary traffic and the labelled texts ask for different thresholds, as sentences.

    Args:
        traffic: Figures at these thresholds.
        curves: Of the labelled texts, by label.
        thresholds: Of each label.
        rule: What they were chosen for.
    """
    remedy = (
        "Give ordinary traffic of your own (--background FILE), or name the rate of false alarms "
        "that you accept (--threshold fpr=0.05)."
    )
    doubts: list[str] = []
    of_file: list[tuple[float, int]] = []
    for (label, curve), threshold in zip(curves.items(), thresholds, strict=True):
        found, alarms = curve.at(threshold)
        alone, _ = curve.at(curve.threshold(rule))
        of_file.append((alarms / max(1, curve.negatives), max(1, curve.negatives)))
        if alone - found > _COSTLY * curve.positives:
            doubts.append(
                f"The threshold that lets ordinary traffic pass finds {found} of {curve.positives} "
                f"texts that are '{label}', that of the texts alone {alone}. {remedy}"
            )
    if not of_file:
        return doubts
    count = max(1, traffic.conversations)
    rates, sizes = np.array([*of_file, (traffic.flagged / count, count)]).T
    lowest, highest = wilson(rates, sizes.astype(np.int64))
    # Beyond what chance explains on either side.
    if lowest[-1] > highest[:-1].max():
        doubts.append(
            f"It flags {rates[-1]:.1%} of ordinary conversations, but {rates[:-1].max():.1%} of "
            f"the labelled texts that it should let pass. {remedy}"
        )
    return doubts


def quiet_thresholds(
    thresholds: Sequence[float],
    calibration: Calibration,
    logits: Float[np.ndarray, "conversation output"],
    rule: ThresholdRule,
) -> tuple[float, ...]:
    """Thresholds that flag little ordinary traffic, if the rule does not say what a miss costs.

    Each is raised until at most so many conversations reach it: the rate of ``fpr``, or else
    ``FALSE_ALARMS``. Labelled texts alone, of which half may be positive, ask for less.

    Args:
        thresholds: What the rule gives on texts alone.
        calibration: Makes logits probabilities.
        logits: Out-of-fold, the highest of each conversation.
        rule: What the thresholds are chosen for.
    """
    # A rate that was asked for holds; that of few conversations is rough in any case.
    is_asked = rule.kind == "fpr"
    rate = (rule.value if is_asked else FALSE_ALARMS) * len(logits)
    allowed = int(rate) if is_asked or rate < 1 else math.ceil(rate)
    # Fewer conversations cannot tell such a rate.
    if rule.kind in ("recall", "cost") or not allowed or not thresholds:
        return tuple(thresholds)
    # Just above the probability of the first conversation that may not be flagged.
    bounds = np.sort(calibration.apply(logits), 0)[::-1][allowed].tolist()
    # A threshold that no score reaches would find nothing: what is as sure as that is flagged.
    return tuple(
        max(threshold, min(math.nextafter(bound, 1.0), _HIGHEST))
        for threshold, bound in zip(thresholds, bounds, strict=True)
    )


def kept_logits(probe: Probe) -> Float[np.ndarray, "conversation output"]:
    """The logits of ordinary conversations that training has kept with a probe.

    Raises:
        SidelightError: They are no table of numbers.
    """
    kept, outputs = probe.record.get("traffic", {}).get("logits", []), probe.task.outputs
    try:
        return np.array(kept, dtype=float).reshape(len(kept), outputs)
    except (TypeError, ValueError) as error:
        raise SidelightError(
            "The probe's manifest keeps no numbers in traffic.logits. Train the probe again."
        ) from error


def kept_rate(probe: Probe) -> tuple[int, int]:
    """How many ordinary conversations a probe flags at its thresholds, of those that it keeps.

    Raises:
        SidelightError: As ``kept_logits``.
    """
    logits = kept_logits(probe)
    if not len(logits):
        return 0, 0
    flags = flags_of(probe.task, probe.calibration.apply(logits), probe.thresholds)
    return int(flags.sum()), len(logits)


def highest_logits(
    contexts: Sequence[Context], logits: Float[np.ndarray, "context output"]
) -> Float[np.ndarray, "conversation output"]:
    """The highest logit of each label, by conversation."""
    rows = conversations_of(contexts)
    return np.array([logits[own].max(0) for own in rows]).reshape(len(rows), logits.shape[1])


def conversations_of(contexts: Sequence[Context]) -> list[list[int]]:
    """The rows of each ordinary conversation: the whole, and what is judged beside it."""
    rows: dict[int, list[int]] = {}
    for row, context in enumerate(contexts):
        if context.kind == "background":
            rows.setdefault(id(context.example), []).append(row)
    return [*rows.values()]


def beginning(text: str) -> str:
    """A text on one line, shortened."""
    words = " ".join(text.split())
    return words if len(words) <= _SHOWN_CHARACTERS else f"{words[:_SHOWN_CHARACTERS]}..."
