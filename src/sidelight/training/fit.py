"""From labelled examples to what mechanisms are trained on: which texts judge, and hidden states.

A search begins as a fit does, so that it chooses by the texts that will calibrate.

From a trained mechanism to a calibrated probe with its figures.

From labelled examples to trained probes: extraction, training, calibration, choice.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sidelight.backbone import TransformersBackbone
from sidelight.calibration import choose_thresholds, fit_calibration, require_calibratable
from sidelight.data.examples import LabelledExamples
from sidelight.data.splitting import validation_share
from sidelight.evaluation import Report, evaluate
from sidelight.metrics import score_counts
from sidelight.probe import Probe
from sidelight.smollm2 import cache_root
from sidelight.states.extraction import StateSource
from sidelight.training.cross_fitting import (
    Folds,
    choose_folds,
    class_counts,
    cross_fit,
    cross_fit_baseline,
    cut_warnings,
    rarity,
    require_same_task,
    shared_texts,
    why_held_out,
)
from sidelight.training.dataset import ProbeDataset, Split, make_split
from sidelight.training.loop import Trained, divergence, train_mechanisms
from sidelight.training.objective import validation_score
from sidelight.training.settings import FitOptions, Job, require_labels_of_parts
from sidelight.training.tfidf import fit_tfidf
from sidelight.types import Task


@dataclass(frozen=True)
class Prepared:
    """Texts with their hidden states, ready for training.

    Attributes:
        study: Training and validation texts; all texts on both sides where folds tell them apart.
        folds: Of ``choose_folds``; none where validation texts judge.
        warnings: What is doubtful about the texts, one sentence each.
    """

    dataset: ProbeDataset
    folds: Folds
    warnings: tuple[str, ...]


def prepare(
    backbone: TransformersBackbone,
    training: LabelledExamples,
    validation: LabelledExamples | None,
    *,
    options: FitOptions,
    source: StateSource | None = None,
) -> Prepared:
    """Chooses the texts that judge, and runs the backbone over all of them.

    Args:
        backbone: The frozen LLM.
        training: Labelled texts.
        validation: Labelled texts; None holds out part of ``training``, or cross-fits it if it is
            small.
        options: How texts are read and calibrated, and where their activations go.
        source: The engine that computes the hidden states; None is the backbone itself.

    Raises:
        SidelightError: No labels, validation texts that cannot choose or calibrate, or activations
            that do not fit the disk.
    """
    sides = _choose_sides(training, validation)
    if options.long_inputs:
        require_labels_of_parts(training.task)
    require_same_task(sides.training, sides.validation)
    require_calibratable(options.calibration, sides.validation.labels, sides.training.task)
    parts = {"Training texts": sides.training}
    doubts = rarity(sides.validation)
    if not sides.folds:
        parts["Validation texts"] = sides.validation
        doubts += shared_texts(sides.training, sides.validation)
    splits = [
        _extract(source, backbone, examples, options, title) for title, examples in parts.items()
    ]
    for split in splits:
        doubts += cut_warnings(split.prompts, options.max_tokens)
    dataset = ProbeDataset(backbone, splits[0], splits[-1])
    return Prepared(dataset, sides.folds, (*sides.warnings, *doubts))


@dataclass(frozen=True)
class _Sides:
    training: LabelledExamples
    validation: LabelledExamples
    folds: Folds
    warnings: tuple[str, ...]


def _choose_sides(whole: LabelledExamples, validation: LabelledExamples | None) -> _Sides:
    """What trains and what judges: the same texts where they are cross-fitted."""
    if validation is not None:
        return _Sides(whole, validation, (), (*whole.warnings, *validation.warnings))
    folds = choose_folds(whole)
    if folds:
        return _Sides(whole, whole, folds, whole.warnings)
    training, held_out = whole.split(validation_share(len(whole)), seed=0)
    warnings = (*whole.warnings, *why_held_out(whole), *training.warnings)
    return _Sides(training, held_out, (), warnings)


def _extract(
    source: StateSource | None,
    backbone: TransformersBackbone,
    examples: LabelledExamples,
    options: FitOptions,
    title: str,
) -> Split:
    return make_split(
        backbone,
        examples,
        reads=options.reads,
        max_tokens=options.max_tokens,
        cache_root=options.cache_root or cache_root() / "activations",
        budget_bytes=options.cache_budget_bytes,
        keep_cache=options.keep_cache,
        title=title,
        source=source,
    )


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


def make_run(
    trained: Trained, dataset: ProbeDataset, *, name: str, options: FitOptions, folds: int = 0
) -> Run:
    """Calibrates on validation logits, chooses the threshold there, and measures there.

    Args:
        trained: The mechanism and its validation logits.
        study: What it was trained on.
        name: Of the probe.
        options: It was trained with.
        folds: That it was cross-fitted on; 0 for a validation part.
    """
    task, labels, logits = dataset.task, dataset.validation.labels, trained.logits
    calibration = fit_calibration(options.calibration, logits, labels, task)
    probabilities = calibration.apply(logits)
    thresholds = choose_thresholds(task, probabilities, labels)
    report = evaluate(task, probabilities, labels, thresholds=thresholds)
    shown = {"metrics": report.to_dict(), "scores": _score_counts(task, probabilities)}
    probe = Probe(
        name=name,
        task=task,
        reads=options.reads,
        prompt_format=dataset.backbone.encoder.prompt_format,
        spec=trained.job.spec,
        mechanism=trained.mechanism,
        standardisation=trained.standardisation,
        calibration=calibration,
        thresholds=thresholds,
        fingerprint=dataset.backbone.fingerprint,
        record={
            "engine": dataset.training.states.engine,
            "training": _data(dataset.training),
            "validation": {**_data(dataset.validation), **shown},
            "max_tokens": options.max_tokens,
            "folds": folds,
            **_how(trained),
        },
    )
    return Run(probe, trained.job.seed, validation_score(task, logits, labels), report)


def report_on(logits: np.ndarray, split: Split) -> Report:
    """Any logits of these texts, treated like a probe's: calibrated, their threshold chosen.

    Args:
        logits: ``[text, output]``.
        split: The texts.
    """
    task, labels = split.task, split.labels
    probabilities = fit_calibration("platt", logits, labels, task).apply(logits)
    thresholds = choose_thresholds(task, probabilities, labels)
    return evaluate(task, probabilities, labels, thresholds=thresholds)


def _how(trained: Trained) -> dict[str, Any]:
    return {
        "settings": asdict(trained.job.settings),
        "seed": trained.job.seed,
        "standardise": trained.job.standardise,
        "epochs": {"scores": list(trained.history), "best": trained.best_epoch},
        "parameters": sum(p.numel() for p in trained.mechanism.parameters()),
    }


def _score_counts(task: Task, probabilities: np.ndarray) -> dict[str, list[int]]:
    """A histogram of each label's probabilities, ``[text, output]``; serving looks for drift."""
    labels = task.labels[1:] if task.kind == "binary" else task.labels
    columns = zip(labels, probabilities.T, strict=True)
    return {label: score_counts(column.tolist()) for label, column in columns}


def _data(split: Split) -> dict[str, Any]:
    counts = class_counts(split.task, split.labels).tolist()
    return {
        "rows": len(split),
        "sha256": split.examples.content_hash,
        "classes": dict(zip(split.task.labels, counts, strict=True)),
    }


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
    training: LabelledExamples,
    validation: LabelledExamples | None,
    *,
    name: str,
    options: FitOptions,
    source: StateSource | None = None,
    store: Callable[[Fit], None] | None = None,
) -> Fit:
    """Trains every mechanism with every seed from one pass of the backbone over the texts.

    Args:
        backbone: The frozen LLM.
        training: Labelled texts.
        validation: Labelled texts for early stopping, threshold and calibration; None holds out
            part of ``training``, or cross-fits it if it is small.
        name: How verdicts will name the probe.
        options: What to train.
        source: The engine that computes the hidden states; None is the backbone itself.
        store: Gets what was made while the activations are still there: if it fails, they stay.

    Raises:
        SidelightError: No labels, the activations do not fit the disk, or every training diverged.
    """
    prepared = prepare(backbone, training, validation, options=options, source=source)
    dataset, folds = prepared.dataset, prepared.folds
    jobs = options.jobs(len(dataset.training))
    # The baseline first: what it refuses in seconds must not cost the hours of training.
    if folds:
        baseline = cross_fit_baseline(dataset, folds)
        trained = cross_fit(jobs, dataset, folds)
    else:
        words = fit_tfidf(dataset.training.texts, dataset.training.labels, dataset.task)
        baseline = words.logits(dataset.validation.texts)
        trained = train_mechanisms(
            jobs,
            task=dataset.task,
            training=dataset.training.training_set(),
            validation=dataset.validation.training_set(),
            device=backbone.device,
        )
    runs = tuple(
        make_run(one, dataset, name=name, options=options, folds=len(folds))
        for one in _finite(jobs, trained)
    )
    warnings = (*prepared.warnings, *_divergence_warnings(jobs, trained))
    made = Fit(runs, _best(runs), report_on(baseline, dataset.validation), warnings)
    if store is not None:
        store(made)
    if not options.keep_cache:
        for split in (dataset.training, dataset.validation):
            split.states.remove()
    return made


def _finite(jobs: Sequence[Job], trained: Sequence[Trained | None]) -> list[Trained]:
    """The trainings that did not diverge.

    Raises:
        SidelightError: All of them did.
    """
    finite = [one for one in trained if one is not None]
    if not finite:
        raise divergence(jobs[0])
    return finite


def _divergence_warnings(jobs: Sequence[Job], trained: Sequence[Trained | None]) -> list[str]:
    pairs = zip(jobs, trained, strict=True)
    return [f"{divergence(job)} This run is left out." for job, one in pairs if one is None]


def _best(runs: Sequence[Run]) -> Run:
    by_mechanism: dict[str, list[float]] = {}
    for run in runs:
        by_mechanism.setdefault(repr(run.probe.spec), []).append(run.score)
    return max(
        runs, key=lambda run: (float(np.mean(by_mechanism[repr(run.probe.spec)])), run.score)
    )
