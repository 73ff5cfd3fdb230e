"""From labelled examples to what mechanisms are trained on: which texts judge, and hidden states.

A search begins as a fit does, so that it chooses by the texts that will calibrate.
"""

from dataclasses import dataclass

from sidelight.backbones import TransformersBackbone
from sidelight.backbones.embedded import cache_root
from sidelight.calibration import require_calibratable
from sidelight.data import Examples, validation_share
from sidelight.extraction import StateSource
from sidelight.fitting.cross_fitting import Folds, choose_folds, why_held_out
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
from sidelight.training import require_labels_of_parts


@dataclass(frozen=True)
class Prepared:
    """Texts with their hidden states, ready for training.

    Attributes:
        study: Training and validation texts; all texts on both sides where folds tell them apart.
        folds: Of ``choose_folds``; none where validation texts judge.
        warnings: What is doubtful about the texts, one sentence each.
    """

    study: Study
    folds: Folds
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
    if options.long_inputs:
        require_labels_of_parts(task_of(training))
    require_same_task(sides.training, sides.validation)
    require_calibratable(options.calibration, labels_of(sides.validation), task_of(sides.training))
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
    study = Study(backbone, splits[0], splits[-1])
    return Prepared(study, sides.folds, (*sides.warnings, *doubts))


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
