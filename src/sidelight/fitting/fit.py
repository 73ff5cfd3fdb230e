"""From labelled examples to trained probes: extraction, training, calibration, choice."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sidelight.backbones import TransformersBackbone
from sidelight.backbones.embedded import cache_root
from sidelight.data import Examples, validation_share
from sidelight.evaluation import Report
from sidelight.fitting.making import ProbeMaker, Run, baseline_report
from sidelight.fitting.options import FitOptions
from sidelight.fitting.screening import (
    cut_warnings,
    doubts,
    labels_of,
    require_same_task,
)
from sidelight.study import Split, Study, make_split
from sidelight.training import train_mechanisms


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
    labels_of(training)
    if validation is None:
        training, validation = training.split(validation_share(len(training)), seed=0)
        warnings += training.warnings
    require_same_task(training, validation)
    warnings += doubts(training, validation)
    study = Study(
        backbone,
        _extracted(backbone, training, options, "Training texts"),
        _extracted(backbone, validation, options, "Validation texts"),
    )
    splits = (study.training, study.validation)
    for split in splits:
        warnings += cut_warnings(split.prompts, options.max_tokens)
    trained = train_mechanisms(
        options.jobs(len(training)),
        task=study.task,
        training=study.training.training_set(),
        validation=study.validation.training_set(),
        device=backbone.device,
    )
    maker = ProbeMaker(study, name=name, options=options)
    runs = tuple(maker.make(one) for one in trained)
    baseline = baseline_report(study)
    if not options.keep_cache:
        for split in splits:
            split.states.remove()
    return Fit(runs, _best(runs), baseline, tuple(warnings))


def _extracted(
    backbone: TransformersBackbone, examples: Examples, options: FitOptions, title: str
) -> Split:
    return make_split(
        backbone,
        examples,
        reads=options.reads,
        max_tokens=options.max_tokens,
        cache_root=options.cache_root or cache_root() / "activations",
        budget_bytes=options.cache_budget_bytes,
        title=title,
    )


def _best(runs: Sequence[Run]) -> Run:
    by_mechanism: dict[str, list[float]] = {}
    for run in runs:
        by_mechanism.setdefault(repr(run.probe.spec), []).append(run.score)
    return max(
        runs, key=lambda run: (float(np.mean(by_mechanism[repr(run.probe.spec)])), run.score)
    )
