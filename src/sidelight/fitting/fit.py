"""From labelled examples to trained probes: extraction, training, calibration, choice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sidelight.backbones import TransformersBackbone
from sidelight.backbones.embedded import cache_root
from sidelight.baselines import TfIdf
from sidelight.calibration import require_calibratable
from sidelight.data import Examples, validation_share
from sidelight.evaluation import Report
from sidelight.extraction import StateSource
from sidelight.fitting.cross_fitting import (
    choose_folds,
    cross_fit,
    cross_fit_baseline,
    why_held_out,
)
from sidelight.fitting.making import Run, make_run, report_on
from sidelight.fitting.options import FitOptions
from sidelight.fitting.screening import (
    cut_warnings,
    labels_of,
    rarity,
    require_same_task,
    shared_texts,
    task_of,
)
from sidelight.study import Split, Study, make_split
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
    labels_of(training)
    folds = choose_folds(training) if validation is None else ()
    warnings = [*training.warnings]
    if validation is None and not folds:
        warnings += why_held_out(training)
        training, validation = training.split(validation_share(len(training)), seed=0)
        warnings += training.warnings
    elif validation is not None:
        warnings += validation.warnings
    study, doubtful = _study(source, backbone, training, validation, options)
    warnings += doubtful
    jobs = options.jobs(len(training))
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
    warnings += _divergence_warnings(jobs, trained)
    made = Fit(runs, _best(runs), report_on(baseline, study.validation), tuple(warnings))
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


def _study(
    source: StateSource | None,
    backbone: TransformersBackbone,
    training: Examples,
    validation: Examples | None,
    options: FitOptions,
) -> tuple[Study, list[str]]:
    """The splits with their hidden states, and what is doubtful about them.

    Without validation texts all texts are on both sides: their folds tell them apart.
    """
    if validation is not None:
        require_same_task(training, validation)
    chosen_on = training if validation is None else validation
    require_calibratable(options.calibration, labels_of(chosen_on), task_of(training))
    whole = _extracted(source, backbone, training, options, "Training texts")
    warnings = cut_warnings(whole.prompts, options.max_tokens)
    if validation is None:
        return Study(backbone, whole, whole), [*rarity(training), *warnings]
    held_out = _extracted(source, backbone, validation, options, "Validation texts")
    warnings += cut_warnings(held_out.prompts, options.max_tokens)
    doubts = [*rarity(validation), *shared_texts(training, validation)]
    return Study(backbone, whole, held_out), [*doubts, *warnings]


def _extracted(
    source: StateSource | None,
    backbone: TransformersBackbone,
    examples: Examples,
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


def _best(runs: Sequence[Run]) -> Run:
    by_mechanism: dict[str, list[float]] = {}
    for run in runs:
        by_mechanism.setdefault(repr(run.probe.spec), []).append(run.score)
    return max(
        runs, key=lambda run: (float(np.mean(by_mechanism[repr(run.probe.spec)])), run.score)
    )
