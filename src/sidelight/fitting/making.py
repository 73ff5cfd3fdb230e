"""From a trained mechanism to a calibrated probe with its figures."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sidelight.calibration import choose_thresholds, fit_calibration
from sidelight.evaluation import Report, evaluate
from sidelight.fitting.options import FitOptions
from sidelight.fitting.screening import class_counts
from sidelight.metrics.drift import score_counts
from sidelight.probe import Probe
from sidelight.study import Split, Study
from sidelight.training import Trained, validation_score
from sidelight.types import Task


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
    trained: Trained, study: Study, *, name: str, options: FitOptions, folds: int = 0
) -> Run:
    """Calibrates on validation logits, chooses the threshold there, and measures there.

    Args:
        trained: The mechanism and its validation logits.
        study: What it was trained on.
        name: Of the probe.
        options: It was trained with.
        folds: That it was cross-fitted on; 0 for a validation part.
    """
    task, labels, logits = study.task, study.validation.labels, trained.logits
    calibration = fit_calibration(options.calibration, logits, labels, task)
    probabilities = calibration.apply(logits)
    thresholds = choose_thresholds(task, probabilities, labels)
    report = evaluate(task, probabilities, labels, thresholds=thresholds)
    shown = {"metrics": report.to_dict(), "scores": _score_counts(task, probabilities)}
    probe = Probe(
        name=name,
        task=task,
        reads=options.reads,
        prompt_format=study.backbone.encoder.prompt_format,
        spec=trained.job.spec,
        mechanism=trained.mechanism,
        standardisation=trained.standardisation,
        calibration=calibration,
        thresholds=thresholds,
        fingerprint=study.backbone.fingerprint,
        record={
            "engine": study.training.states.engine,
            "training": _data(study.training),
            "validation": {**_data(study.validation), **shown},
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
