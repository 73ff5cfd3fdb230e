"""From labelled examples to trained probes: extraction, training, calibration, choice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sidelight.backbones import TransformersBackbone
from sidelight.baselines import TfIdf
from sidelight.data import Examples
from sidelight.evaluation import Report
from sidelight.extraction import StateSource
from sidelight.fitting.cross_fitting import cross_fit, cross_fit_baseline
from sidelight.fitting.making import Run, make_run, report_on
from sidelight.fitting.options import FitOptions
from sidelight.fitting.preparing import prepare
from sidelight.training import Job, Trained, divergence, train_mechanisms


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
    study, folds = prepared.study, prepared.folds
    jobs = options.jobs(len(study.training))
    # The baseline first: what it refuses in seconds must not cost the hours of training.
    if folds:
        baseline = cross_fit_baseline(study, folds)
        trained = cross_fit(jobs, study, folds)
    else:
        baseline = TfIdf().fit(study, seed=0).logits(study.validation)
        trained = train_mechanisms(
            jobs,
            task=study.task,
            training=study.training.training_set(),
            validation=study.validation.training_set(),
            device=backbone.device,
        )
    runs = tuple(
        make_run(one, study, name=name, options=options, folds=len(folds))
        for one in _finite(jobs, trained)
    )
    warnings = (*prepared.warnings, *_divergence_warnings(jobs, trained))
    made = Fit(runs, _best(runs), report_on(baseline, study.validation), warnings)
    if store is not None:
        store(made)
    if not options.keep_cache:
        for split in (study.training, study.validation):
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
