"""From a trained mechanism to a calibrated probe with its figures, and the baseline beside it."""

from dataclasses import asdict, dataclass
from typing import Any

from sidelight.backbones import TransformersBackbone
from sidelight.baselines import tfidf_logits
from sidelight.calibration import choose_thresholds, fit_calibration
from sidelight.data import Example, Examples
from sidelight.evaluation import Report, evaluate
from sidelight.fitting.options import FitOptions
from sidelight.fitting.screening import class_counts, labels_of, task_of
from sidelight.probe import Probe
from sidelight.training import Trained, validation_score


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
        """Calibrates on validation logits, chooses the threshold there, and measures there."""
        task, labels = task_of(self._validation), labels_of(self._validation)
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
        task = task_of(examples)
        counts = class_counts(task, labels_of(examples)).tolist()
        return {
            "rows": len(examples),
            "sha256": examples.content_hash,
            "classes": dict(zip(task.labels, counts, strict=True)),
        }


def baseline_report(training: Examples, validation: Examples) -> Report:
    """TF-IDF on the same split, treated like a probe: calibrated, its threshold chosen."""
    task, labels = task_of(validation), labels_of(validation)
    texts, held_out = ([_read_text(item) for item in e.items] for e in (training, validation))
    logits = tfidf_logits(task, texts, labels_of(training), held_out)
    probabilities = fit_calibration("platt", logits, labels, task).apply(logits)
    thresholds = choose_thresholds(task, probabilities, labels)
    return evaluate(task, probabilities, labels, thresholds=thresholds)


def _read_text(item: Example) -> str:
    return item.text if item.response is None else f"{item.text}\n{item.response}"
