"""What a search tried, and what it found. Knows figures, not how they were searched."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sidelight.errors import SidelightError
from sidelight.mechanisms import MechanismSpec
from sidelight.training import TrainingSettings


@dataclass(frozen=True)
class Trial:
    """One configuration that was trained.

    Attributes:
        number: Place in the search, from 0.
        spec: The mechanism and its options.
        settings: Of the optimisation.
        score: On validation data, what early stopping maximises; None where training diverged.
    """

    number: int
    spec: MechanismSpec
    settings: TrainingSettings
    score: float | None


@dataclass(frozen=True)
class Best:
    """The configuration with the highest score on validation data.

    The highest of many scores is too high an estimate of what another data set would give.

    Attributes:
        spec: The mechanism and its options.
        settings: Of the optimisation.
        score: Average precision, or accuracy for a multi-class task.
        trials: All that was tried, in order.
        importance: Share of the scores' differences that each parameter explains; empty while
            there are too few trials to say.
    """

    spec: MechanismSpec
    settings: TrainingSettings
    score: float
    trials: tuple[Trial, ...]
    importance: Mapping[str, float] = field(default_factory=dict)


def best_of(trials: Sequence[Trial], importance: Mapping[str, float] | None = None) -> Best:
    """The first of the trials with the highest score.

    Raises:
        SidelightError: Every training diverged.
    """
    scores = [-1.0 if trial.score is None else trial.score for trial in trials]
    score = max(scores)
    if score < 0:
        raise SidelightError(
            f"All {len(trials)} trainings diverged: no score can be compared. Look for hidden "
            "states that are not finite, or load the backbone with --dtype float32."
        )
    found = trials[scores.index(score)]
    return Best(found.spec, found.settings, score, tuple(trials), importance or {})
