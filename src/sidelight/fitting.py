"""From a labelled file to trained, calibrated probes: extraction, training, calibration, choice."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sidelight.backbones import TransformersBackbone
from sidelight.backbones.embedded import cache_root
from sidelight.baselines import tfidf_logits
from sidelight.cache import ActivationCache
from sidelight.calibration import CalibrationKind, choose_thresholds, fit_calibration
from sidelight.data import Examples
from sidelight.errors import SidelightError
from sidelight.evaluation import Report, evaluate
from sidelight.extraction import extract
from sidelight.mechanisms import MechanismSpec
from sidelight.probe import Probe
from sidelight.prompts import EncodedPrompt, Reads
from sidelight.training import (
    Job,
    Trained,
    TrainingSet,
    TrainingSettings,
    suggested_settings,
    train_mechanisms,
    validation_score,
)
from sidelight.types import Task

TRAINING_MAX_TOKENS = 1024
# Rows that are enough to choose a threshold and a calibration by.
_ENOUGH_VALIDATION_ROWS = 150


@dataclass(frozen=True)
class FitOptions:
    """What to train, and from what.

    Attributes:
        mechanisms: Each is trained with every seed.
        seeds: Of initial parameters and data order; the split is the same for all.
        settings: By mechanism name; the suggested ones where a name is missing.
        standardise: Whether hidden states are standardised per layer.
        reads: The tokens that the probe looks at.
        calibration: From logits to probabilities.
        max_tokens: Longer training texts are cut at their end, and counted.
        cache_root: Where activations are kept while training; None is the user's cache.
        cache_budget_bytes: The most that activations may take; None allows what the disk has.
        keep_cache: Whether the activations stay after training, for another one.
    """

    mechanisms: tuple[MechanismSpec, ...]
    seeds: tuple[int, ...] = (0,)
    settings: Mapping[str, TrainingSettings] = field(default_factory=dict)
    standardise: bool = True
    reads: Reads = field(default_factory=Reads)
    calibration: CalibrationKind = "platt"
    max_tokens: int = TRAINING_MAX_TOKENS
    cache_root: Path | None = None
    cache_budget_bytes: int | None = None
    keep_cache: bool = False


@dataclass(frozen=True)
class Run:
    """One trained probe.

    Attributes:
        probe: Ready to serve.
        seed: It was trained with.
        score: What early stopping maximised, on validation data.
        report: On validation data, with the threshold chosen there.
    """

    probe: Probe
    seed: int
    score: float
    report: Report


@dataclass(frozen=True)
class Fit:
    """Everything that one call to ``fit`` made.

    Attributes:
        runs: One per mechanism and seed.
        best: Of the mechanism with the best mean validation score, the run with the best one.
        baseline: TF-IDF with logistic regression on the same validation texts.
        warnings: What the user should know, one sentence each.
    """

    runs: tuple[Run, ...]
    best: Run
    baseline: Report
    warnings: tuple[str, ...]


def fit(
    backbone: TransformersBackbone,
    training: Examples,
    validation: Examples | None,
    *,
    name: str,
    options: FitOptions,
) -> Fit:
    """Trains every mechanism with every seed from one pass of the backbone over the texts.

    Args:
        backbone: The frozen LLM.
        training: Labelled texts.
        validation: Labelled texts for early stopping, threshold and calibration; None holds out
            15 % of ``training``, or more when it is small.
        name: How verdicts will name the probe.
        options: What to train.

    Raises:
        SidelightError: No labels, or the activations do not fit the disk.
    """
    warnings = [*training.warnings]
    _labels(training)
    if validation is None:
        training, validation = training.split(_held_out_share(len(training)), seed=0)
        warnings += training.warnings
    _require_same_task(training, validation)
    warnings += _doubts(training, validation)
    sets: list[TrainingSet] = []
    for title, examples in (("Training texts", training), ("Validation texts", validation)):
        prompts = _encode(backbone, examples, options)
        warnings += _cut(prompts, min(options.max_tokens, backbone.encoder.max_tokens))
        sets.append(TrainingSet(_extracted(backbone, prompts, options, title), _labels(examples)))
    trained = train_mechanisms(
        _jobs(options),
        task=_task(training),
        training=sets[0],
        validation=sets[1],
        device=backbone.device,
    )
    maker = _ProbeMaker(backbone, training, validation, name=name, options=options)
    runs = tuple(maker.make(one) for one in trained)
    if not options.keep_cache:
        for one in sets:
            one.cache.remove()
    return Fit(runs, _best(runs), _baseline(training, validation), tuple(warnings))


def _jobs(options: FitOptions) -> list[Job]:
    return [
        Job(
            spec,
            seed,
            options.settings.get(spec.name, suggested_settings(spec.name)),
            standardise=options.standardise,
        )
        for spec in options.mechanisms
        for seed in options.seeds
    ]


def _held_out_share(rows: int) -> float:
    return max(0.15, min(0.3, _ENOUGH_VALIDATION_ROWS / rows))


def _encode(
    backbone: TransformersBackbone, examples: Examples, options: FitOptions
) -> list[EncodedPrompt]:
    encoder = backbone.encoder
    limit = min(options.max_tokens, encoder.max_tokens)
    prompts = [
        encoder.encode_any_length(item.messages, item.response).shortened(limit)
        for item in examples.items
    ]
    unread = sum(not prompt.mask(options.reads).any() for prompt in prompts)
    if unread:
        raise SidelightError(
            f"{unread} of {len(prompts)} texts have no token that the probe would read "
            f"({options.reads.side}). Name the answers' column with --response, or read the prompt."
        )
    return prompts


def _cut(prompts: Sequence[EncodedPrompt], max_tokens: int) -> list[str]:
    cut = sum(prompt.dropped > 0 for prompt in prompts)
    if not cut:
        return []
    return [
        f"{cut} of {len(prompts)} texts were cut to {max_tokens} tokens for training "
        "(--max-tokens); judging never cuts."
    ]


def _doubts(training: Examples, validation: Examples) -> list[str]:
    """What makes the chosen threshold and calibration doubtful."""
    doubts: list[str] = []
    smallest = int(_class_counts(_task(validation), _labels(validation)).min())
    if smallest < 10:
        doubts.append(
            f"The rarest class has {smallest} validation texts: threshold, calibration and the "
            "validation figures are rough. More labelled texts of it would help most."
        )
    seen = {item.text for item in training.items}
    shared = sum(item.text in seen for item in validation.items)
    if shared:
        doubts.append(f"{shared} validation texts are also training texts.")
    return doubts


def _require_same_task(training: Examples, validation: Examples) -> None:
    task = _task(training)
    if validation.task != task:
        raise SidelightError(
            f"The validation data has the labels {validation.task}, the training data {task}. "
            "Load it with task=training.task."
        )
    counts = _class_counts(task, _labels(validation))
    missing = [label for label, count in zip(task.labels, counts, strict=True) if count == 0]
    if missing and task.kind == "binary":
        raise SidelightError(
            f"The validation data has no '{missing[0]}' text, so no threshold can be chosen. "
            "Add some, or leave validation data out: part of the training data is held out then."
        )


def _class_counts(task: Task, labels: np.ndarray) -> np.ndarray:
    if task.kind == "multilabel":
        return labels.sum(0)
    return np.bincount(labels, minlength=len(task.labels))


def _extracted(
    backbone: TransformersBackbone,
    prompts: Sequence[EncodedPrompt],
    options: FitOptions,
    title: str,
) -> ActivationCache:
    root = options.cache_root or cache_root() / "activations"
    cache = ActivationCache(root, prompts, reads=options.reads, fingerprint=backbone.fingerprint)
    return extract(backbone, cache, budget_bytes=options.cache_budget_bytes, title=title)


class _ProbeMaker:
    """Turns a trained mechanism into a calibrated probe and measures it on validation data."""

    def __init__(
        self,
        backbone: TransformersBackbone,
        training: Examples,
        validation: Examples,
        *,
        name: str,
        options: FitOptions,
    ):
        self._backbone = backbone
        self._training = training
        self._validation = validation
        self._name = name
        self._options = options

    def make(self, trained: Trained) -> Run:
        task, labels = _task(self._validation), _labels(self._validation)
        logits = trained.validation_logits
        calibration = fit_calibration(self._options.calibration, logits, labels, task)
        probabilities = calibration.apply(logits)
        thresholds = choose_thresholds(task, probabilities, labels)
        report = evaluate(task, probabilities, labels, thresholds=thresholds)
        probe = Probe(
            name=self._name,
            task=task,
            reads=self._options.reads,
            prompt_format=self._backbone.encoder.prompt_format,
            spec=trained.job.spec,
            mechanism=trained.mechanism,
            standardisation=trained.standardisation,
            calibration=calibration,
            thresholds=thresholds,
            fingerprint=self._backbone.fingerprint,
            record=self._record(trained, report),
        )
        return Run(probe, trained.job.seed, validation_score(task, logits, labels), report)

    def _record(self, trained: Trained, report: Report) -> dict[str, Any]:
        return {
            "training": self._data(self._training),
            "validation": {**self._data(self._validation), "metrics": report.to_dict()},
            "settings": asdict(trained.job.settings),
            "seed": trained.job.seed,
            "standardise": trained.job.standardise,
            "max_tokens": self._options.max_tokens,
            "epochs": {"scores": list(trained.history), "best": trained.best_epoch},
            "parameters": sum(p.numel() for p in trained.mechanism.parameters()),
        }

    def _data(self, examples: Examples) -> dict[str, Any]:
        task = _task(examples)
        counts = _class_counts(task, _labels(examples)).tolist()
        return {
            "rows": len(examples),
            "sha256": examples.content_hash,
            "classes": dict(zip(task.labels, counts, strict=True)),
        }


def _best(runs: Sequence[Run]) -> Run:
    by_mechanism: dict[str, list[float]] = {}
    for run in runs:
        by_mechanism.setdefault(repr(run.probe.spec), []).append(run.score)
    return max(
        runs, key=lambda run: (float(np.mean(by_mechanism[repr(run.probe.spec)])), run.score)
    )


def _baseline(training: Examples, validation: Examples) -> Report:
    """TF-IDF on the same split, treated like a probe: calibrated, its threshold chosen."""
    task, labels = _task(validation), _labels(validation)
    texts, held_out = ([_read_text(item) for item in e.items] for e in (training, validation))
    logits = tfidf_logits(task, texts, _labels(training), held_out)
    probabilities = fit_calibration("platt", logits, labels, task).apply(logits)
    thresholds = choose_thresholds(task, probabilities, labels)
    return evaluate(task, probabilities, labels, thresholds=thresholds)


def _read_text(item: Any) -> str:
    return item.text if item.response is None else f"{item.text}\n{item.response}"


def _labels(examples: Examples) -> np.ndarray:
    if examples.labels is None:
        raise SidelightError("These examples have no labels. Name the column with --label.")
    return examples.labels


def _task(examples: Examples) -> Task:
    assert examples.task is not None
    return examples.task
