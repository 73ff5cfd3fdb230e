"""Choice of the texts that training leaves out: a separate set, a held-out part, or each fold.

Also checks which texts a probe can classify. Nothing here needs torch.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from sidelight.data.examples import Example, LabelledExamples, SpanExamples, validation_share
from sidelight.errors import SidelightError, warn
from sidelight.probes.card import ProbeCard
from sidelight.statistics.calibration import require_calibratable, suggested_calibration
from sidelight.statistics.thresholds import require_thresholds, warn_of_few_texts
from sidelight.training.settings import FitOptions

Rows = Int[np.ndarray, " _"]
# The rows of each part that training leaves out. One part is held out: the probe is trained on the
# rest. Several are folds: the probe is trained on all texts, and each fold is scored by a probe
# that was not trained on it.
Folds = tuple[Rows, ...]
FOLDS = 5
# Training warns about fewer validation texts of a class.
_ROUGH_BELOW = 10


def choose_validation(
    training: LabelledExamples, validation: LabelledExamples | None, options: FitOptions
) -> tuple[LabelledExamples, Folds]:
    """Choose which texts to leave out. Needs no model.

    Returns:
        All texts, those of the validation set or the held-out part last, and the rows of each part
        to leave out.

    Raises:
        SidelightError: The texts do not allow a choice or a calibration, or the labels do not fit
            the options for thresholds or ``none``.
    """
    require_thresholds(training.task, options.threshold)
    options.with_none(training.task)
    options.resolved_for(training)
    if validation is not None:
        require_same_task(training, validation)
        texts, left_out = training.joined(validation), (len(training) + np.arange(len(validation)),)
    elif left_out := choose_folds(training):
        texts = training
        training.warn_of_near_duplicates()
    else:
        texts, left_out = _hold_out(training)
    scored = texts.select(np.sort(np.concatenate(left_out)))
    require_same_task(texts, scored)
    task = texts.task
    kind = options.calibration or suggested_calibration(task)
    require_calibratable(kind, scored.labels, task)
    counts = scored.count_by_label
    # For spans, the rule counts words.
    counts_texts = not isinstance(training, SpanExamples)
    is_few = counts_texts and warn_of_few_texts(task, counts, len(scored), options.threshold)
    rarest, count = min(counts.items(), key=lambda count: count[1])
    if count < _ROUGH_BELOW and not is_few:
        warn(
            f"Validation has only {count} texts of the rarest class, '{rarest}', so the "
            "calibration and the validation metrics are imprecise. Label more texts of this "
            "class first."
        )
    return texts, left_out


def _hold_out(examples: LabelledExamples) -> tuple[LabelledExamples, Folds]:
    """Hold out a part for validation, which comes last; warn if too few texts prevent
    cross-fitting.
    """
    counts = examples.count_by_label
    if len(examples) < 2 * FOLDS or not _has_both(examples, FOLDS):
        shares = ", ".join(f"{count} of '{label}'" for label, count in counts.items())
        raise SidelightError(
            f"Too few texts to train on: got {len(examples)} ({shares}). Give at least {FOLDS} "
            f"of each label and {2 * FOLDS} in all (a hundred is better), or name a validation "
            "set (--validation, validation=)."
        )
    if len(examples) < examples.cross_fitted_below:
        label, fewest = min(counts.items(), key=lambda count: count[1])
        warn(
            f"Cross-fitting needs {FOLDS} distinct texts per label, but '{label}' has {fewest} "
            f"texts or duplicates among them. Instead, {validation_share(len(examples)):.0%} of "
            f"the texts were held out for validation. Add more texts of '{label}'."
        )
    held_out = examples.hold_out(validation_share(len(examples)), seed=0)
    if not len(held_out) or not _has_both(examples.select(held_out), 1):
        raise SidelightError(
            "Too few distinct texts to hold some of each label out for validation: got "
            f"{examples.distinct} in all, and duplicates stay together. Give at least {FOLDS} of "
            "each label, or name a validation set (--validation, validation=)."
        )
    texts = np.arange(len(examples))
    order = np.concatenate([np.setdiff1d(texts, held_out), held_out])
    return examples.select(order), (texts[-len(held_out) :],)


def _has_both(examples: LabelledExamples, least: int) -> bool:
    """Whether a binary task has this many texts of both classes; other tasks may lack labels."""
    return examples.task.kind != "binary" or int(examples.label_counts.min()) >= least


def choose_folds(examples: LabelledExamples) -> Folds:
    """Choose the folds for cross-fitting.

    There are none if there are many texts, if their spans are labelled, or if a fold would lack a
    class.
    """
    is_few = len(examples) < examples.cross_fitted_below
    return complete_folds(examples) if is_few else ()


def complete_folds(examples: LabelledExamples) -> Folds:
    """Folds that contain every class; empty if there are too few distinct texts."""
    if min(int(examples.label_counts.min()), examples.distinct) < FOLDS:
        return ()
    folds = examples.folds(FOLDS, seed=0)
    return folds if all(examples.select(fold).label_counts.all() for fold in folds) else ()


def require_same_task(training: LabelledExamples, validation: LabelledExamples) -> None:
    """Check that the validation texts suffice for calibration and thresholds.

    Raises:
        SidelightError: The labels differ, a class of a binary task has no text, or every label of
            a multi-label task is on all texts or on none.
    """
    task = training.task
    if validation.task != task:
        raise SidelightError(
            f"The validation data has the labels {validation.task}, but the training data has "
            f"{task}. Load the validation data with task=training.task."
        )
    if type(training) is not type(validation):
        raise SidelightError(
            "Only one of the training and the validation data has labelled spans. Load both with "
            "spans, or both without."
        )
    counts = validation.label_counts
    if not _has_both(validation, 1):
        raise SidelightError(
            f"The validation data has no '{task.labels[counts.argmin()]}' text, so no threshold "
            "can be chosen. Add some, or leave the validation data out to hold out part of the "
            "training data."
        )
    if task.kind == "multilabel" and not ((counts > 0) & (counts < len(validation))).any():
        raise SidelightError(
            "Every label in the validation data is on all texts or on none, so no threshold can "
            "be chosen. Add texts with and without a label."
        )


def require_side(card: ProbeCard, examples: Sequence[Example]) -> None:
    """Refuse texts without the side that a probe reads.

    Raises:
        SidelightError: The probe reads responses but a text has none, or it finds spans in prompts
            but a text has a response.
    """
    missing = sum(example.response is None for example in examples)
    if card.reads.includes_response and missing:
        raise SidelightError(
            f"Probe '{card.name}' reads responses, but {missing} of {len(examples)} texts have "
            "none. Name the column of responses with --response (response= in Python)."
        )
    if card.spans and not card.reads.includes_response and missing < len(examples):
        raise SidelightError(
            f"Probe '{card.name}' finds spans in prompts, but these texts have responses. Leave "
            "--response out (response= in Python)."
        )


def warn_of_shared_texts(training: LabelledExamples, validation: LabelledExamples) -> None:
    """Warn if texts (with the same response, if any) are in both sets."""
    seen = {(item.text, item.response) for item in training.items}
    shared = sum((item.text, item.response) in seen for item in validation.items)
    if shared:
        warn(
            f"{shared} validation texts also occur in the training data, so validation is too "
            "optimistic. Remove them from one of the two."
        )
