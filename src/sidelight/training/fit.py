"""From labelled examples to calibrated probes with their figures, and the choice of the best."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sidelight.backbone import TransformersBackbone
from sidelight.calibration import choose_thresholds, fit_calibration
from sidelight.data.examples import LabelledExamples
from sidelight.evaluation import Report, evaluate
from sidelight.metrics import score_counts
from sidelight.probe import Probe
from sidelight.states.extraction import StateSource
from sidelight.training.cross_fitting import cross_fit, cross_fit_baseline
from sidelight.training.dataset import ProbeDataset, Split, class_counts, prepare
from sidelight.training.loop import Trained, divergence, train_mechanisms
from sidelight.training.objective import validation_score
from sidelight.training.settings import FitOptions
from sidelight.training.tfidf import fit_tfidf
from sidelight.types import Task


@dataclass(frozen=True)
class FittedProbe:
    """One trained probe.

    Attributes:
        probe: Ready to serve.
        seed: The seed that it was trained with.
        score: ``validation_score`` of its final logits; the best run is chosen by it.
        report: Its figures on validation data, with the threshold chosen there.
    """

    probe: Probe
    seed: int
    score: float
    report: Report


def calibrate_probe(
    trained: Trained, dataset: ProbeDataset, *, name: str, options: FitOptions
) -> FittedProbe:
    """Calibrates on validation logits, chooses the threshold there, and measures there."""
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
            "folds": len(dataset.folds),
            "settings": asdict(trained.job.settings),
            "seed": trained.job.seed,
            "standardise": trained.job.standardise,
            "epochs": {"scores": list(trained.history), "best": trained.best_epoch},
            "parameters": sum(p.numel() for p in trained.mechanism.parameters()),
        },
    )
    return FittedProbe(probe, trained.job.seed, validation_score(task, logits, labels), report)


def _report_on(logits: np.ndarray, split: Split) -> Report:
    """The figures of any logits, ``[text, output]``, when they are treated like a probe's."""
    task, labels = split.task, split.labels
    probabilities = fit_calibration("platt", logits, labels, task).apply(logits)
    thresholds = choose_thresholds(task, probabilities, labels)
    return evaluate(task, probabilities, labels, thresholds=thresholds)


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
        best: The best run of the mechanism whose mean validation score is the best.
        baseline: The figures of TF-IDF with logistic regression on the same validation texts.
        warnings: What the user should know, one sentence each.
    """

    runs: tuple[FittedProbe, ...]
    best: FittedProbe
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
    """Trains every mechanism with every seed, from one pass of the backbone over the texts.

    Args:
        backbone: The frozen LLM.
        training: Labelled texts.
        validation: Labelled texts for early stopping, threshold and calibration; None holds out
            part of ``training``, or cross-fits it if it is small.
        name: How verdicts will name the probe.
        options: What to train.
        source: The engine that computes the hidden states; None is the backbone itself.
        store: Called with the fit before the hidden states are deleted: if it fails, they stay.

    Raises:
        SidelightError: There are no labels, the hidden states do not fit the disk, or every
            training diverged.
    """
    dataset = prepare(backbone, training, validation, options=options, source=source)
    jobs = options.jobs(len(dataset.training))
    # The baseline first: what it refuses in seconds must not cost the hours of training.
    if dataset.folds:
        baseline = cross_fit_baseline(dataset, dataset.folds)
        trained = cross_fit(jobs, dataset, dataset.folds)
    else:
        words = fit_tfidf(dataset.training.texts, dataset.training.labels, dataset.task)
        baseline = words.logits(dataset.validation.texts)
        trained = train_mechanisms(
            jobs,
            training=dataset.training,
            validation=dataset.validation,
            device=backbone.device,
        )
    runs = tuple(
        calibrate_probe(one, dataset, name=name, options=options)
        for one in trained
        if one is not None
    )
    if not runs:
        raise divergence(jobs[0])
    pairs = zip(jobs, trained, strict=True)
    diverged = [f"{divergence(job)} This run is left out." for job, one in pairs if one is None]
    made = Fit(
        runs, _best(runs), _report_on(baseline, dataset.validation), (*dataset.warnings, *diverged)
    )
    if store is not None:
        store(made)
    if not options.keep_cache:
        for split in (dataset.training, dataset.validation):
            split.states.remove()
    return made


def _best(runs: Sequence[FittedProbe]) -> FittedProbe:
    by_mechanism: dict[str, list[float]] = {}
    for run in runs:
        by_mechanism.setdefault(repr(run.probe.spec), []).append(run.score)
    return max(
        runs, key=lambda run: (float(np.mean(by_mechanism[repr(run.probe.spec)])), run.score)
    )
