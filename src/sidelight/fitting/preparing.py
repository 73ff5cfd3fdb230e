"""From labelled examples to what mechanisms are trained on: which texts judge, and hidden states.

A search begins as a fit does, so that it chooses by the texts that will calibrate.
"""

from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

from sidelight.backbones import TransformersBackbone
from sidelight.backbones.embedded import cache_root
from sidelight.calibration import require_calibratable
from sidelight.data import Examples, validation_share
from sidelight.extraction import StateSource
from sidelight.fitting.cross_fitting import Folds, choose_folds, why_held_out
from sidelight.fitting.long_inputs import long_inputs
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


@dataclass(frozen=True)
class Prepared:
    """Texts with their hidden states, ready for training.

    Attributes:
        study: Training and validation texts; all texts on both sides where folds tell them apart.
        folds: As ``cross_fit`` takes them; none where validation texts judge.
        texts: For training, long inputs aside.
        warnings: What is doubtful about the texts, one sentence each.
    """

    study: Study
    folds: Folds
    texts: int
    warnings: tuple[str, ...]


def prepare(
    backbone: TransformersBackbone,
    training: Examples,
    validation: Examples | None,
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
    require_same_task(sides.training, sides.validation)
    require_calibratable(options.calibration, labels_of(sides.validation), task_of(sides.training))
    texts = len(sides.training)
    sides = _with_long_inputs(sides, backbone, options)
    training_split = _extract(source, backbone, sides.training, options, "Training texts")
    doubts = rarity(sides.validation) + cut_warnings(training_split.prompts, options.max_tokens)
    if sides.folds:
        # Long inputs stand behind the texts, and judge nothing.
        judging = training_split.select(range(texts))
    else:
        judging = _extract(source, backbone, sides.validation, options, "Validation texts")
        doubts += shared_texts(sides.training, sides.validation)
        doubts += cut_warnings(judging.prompts, options.max_tokens)
    study = Study(backbone, training_split, judging)
    return Prepared(study, sides.folds, texts, (*sides.warnings, *doubts))


@dataclass(frozen=True)
class _Sides:
    training: Examples
    validation: Examples
    folds: Folds
    warnings: tuple[str, ...]


def _choose_sides(whole: Examples, validation: Examples | None) -> _Sides:
    """What trains and what judges: the same texts where they are cross-fitted."""
    labels_of(whole)
    if validation is not None:
        return _Sides(whole, validation, (), (*whole.warnings, *validation.warnings))
    folds = choose_folds(whole)
    if folds:
        return _Sides(whole, whole, folds, whole.warnings)
    training, held_out = whole.split(validation_share(len(whole)), seed=0)
    warnings = (*whole.warnings, *why_held_out(whole), *training.warnings)
    return _Sides(training, held_out, (), warnings)


def _with_long_inputs(sides: _Sides, backbone: TransformersBackbone, options: FitOptions) -> _Sides:
    """Long inputs behind the training texts; those of a fold's texts belong to the fold."""
    if not options.long_inputs:
        return sides
    limit = min(options.max_tokens, backbone.encoder.max_tokens)
    parts = sides.folds or (np.arange(len(sides.training)),)
    counts = np.diff(np.linspace(0, options.long_inputs, len(parts) + 1).astype(int))
    made = [
        long_inputs(
            sides.training.select(part), backbone, count=int(count), max_tokens=limit, seed=number
        )
        for number, (part, count) in enumerate(zip(parts, counts, strict=True))
    ]
    ends = len(sides.training) + counts.cumsum()
    folds = [
        np.append(fold, np.arange(end - count, end))
        for fold, count, end in zip(sides.folds, counts, ends, strict=False)
    ]
    training = reduce(Examples.followed_by, made, sides.training)
    return replace(sides, training=training, folds=tuple(folds))


def _extract(
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
