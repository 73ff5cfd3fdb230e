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


class ProbeMaker:
    """Turns a trained mechanism into a calibrated probe and measures it on validation data.

    Args:
        study: What it was trained on.
        name: Of the probe.
        options: It was trained with.
        folds: That it was cross-fitted on; 0 for a validation part.
    """

    def __init__(
        self,
        study: Study,
        *,
        name: str,
        options: FitOptions,
        folds: int = 0,
    ):
        self._study = study
        self._name = name
        self._options = options
        self._folds = folds

    def make(self, trained: Trained) -> Run:
        """Calibrates on validation logits, chooses the threshold there, and measures there."""
        task, labels = self._study.task, self._study.validation.labels
        logits = trained.logits
        calibration = fit_calibration(self._options.calibration, logits, labels, task)
        probabilities = calibration.apply(logits)
        thresholds = choose_thresholds(task, probabilities, labels)
        report = evaluate(task, probabilities, labels, thresholds=thresholds)
        probe = Probe(
            name=self._name,
            task=task,
            reads=self._options.reads,
            prompt_format=self._study.backbone.encoder.prompt_format,
            spec=trained.job.spec,
            mechanism=trained.mechanism,
            standardisation=trained.standardisation,
            calibration=calibration,
            thresholds=thresholds,
            fingerprint=self._study.backbone.fingerprint,
            record=self._record(trained, report, _score_counts(task, probabilities)),
        )
        return Run(probe, trained.job.seed, validation_score(task, logits, labels), report)

    def _record(
        self, trained: Trained, report: Report, scores: dict[str, list[int]]
    ) -> dict[str, Any]:
        validation = {"metrics": report.to_dict(), "scores": scores}
        return {
            "engine": self._study.training.states.engine,
            "training": _data(self._study.training),
            "validation": {**_data(self._study.validation), **validation},
            "settings": asdict(trained.job.settings),
            "seed": trained.job.seed,
            "standardise": trained.job.standardise,
            "max_tokens": self._options.max_tokens,
            "folds": self._folds,
            "epochs": {"scores": list(trained.history), "best": trained.best_epoch},
            "parameters": sum(p.numel() for p in trained.mechanism.parameters()),
        }


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
