"""From a run's logits to decided probabilities: calibration and threshold are validation's."""

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from sidelight.calibration import choose_thresholds, fit_calibration
from sidelight.training import validation_score
from sidelight.types import Task


@dataclass(frozen=True)
class Judged:
    """One run on the test texts.

    Attributes:
        seed: Of the run.
        score: What early stopping maximised, on its validation texts.
        probabilities: Calibrated, of all test texts.
        thresholds: As ``choose_thresholds`` gives them.
        seconds: That fitting took.
        parameters: Numbers that were fitted and are kept.
    """

    seed: int
    score: float
    probabilities: Float[np.ndarray, "text output"]
    thresholds: tuple[float, ...]
    seconds: float
    parameters: int


@dataclass(frozen=True)
class JudgedRow:
    """A row of the table with all its runs.

    Attributes:
        name: Of the row.
        title: As the table shows it.
        is_single_pass: Whether the served LLM's own forward pass gives all that it reads.
        runs: One per seed.
    """

    name: str
    title: str
    is_single_pass: bool
    runs: tuple[Judged, ...]

    @property
    def chosen(self) -> int:
        """The run with the best validation score; the first of equals."""
        return int(np.argmax([run.score for run in self.runs]))


@dataclass(frozen=True)
class Scored:
    """All rows of a table on the same texts.

    Attributes:
        task: The classes.
        labels: Of the texts.
        rows: In the recipe's order.
    """

    task: Task
    labels: np.ndarray
    rows: tuple[JudgedRow, ...]

    def preferred(self, names: Collection[str]) -> str:
        """Of these rows the one with the best mean validation score; "" where none is there."""
        rows = [row for row in self.rows if row.name in names]
        means = [float(np.mean([run.score for run in row.runs])) for row in rows]
        return rows[int(np.argmax(means))].name if rows else ""

    def part(self, texts: Int[np.ndarray, " part"]) -> "Scored":
        """The same rows on some of the texts."""

        def cut(run: Judged) -> Judged:
            return replace(run, probabilities=run.probabilities[texts])

        rows = tuple(replace(row, runs=tuple(map(cut, row.runs))) for row in self.rows)
        return Scored(self.task, self.labels[texts], rows)


@dataclass(frozen=True)
class RunLogits:
    """What one run said of its validation texts and of the test texts."""

    validation: Float[np.ndarray, "held_out output"]
    validation_labels: np.ndarray
    test: Float[np.ndarray, "text output"]


def judge(task: Task, logits: RunLogits, *, seed: int, seconds: float, parameters: int) -> Judged:
    """Calibrates (Platt) and chooses the threshold on validation, applies both to the test.

    Probes and baselines are treated alike; a probe's artifact holds the same numbers.

    Args:
        task: The classes.
        logits: Of the run.
        seed: Of the run.
        seconds: That fitting took.
        parameters: Numbers that were fitted and are kept.
    """
    labels = logits.validation_labels
    calibration = fit_calibration("platt", logits.validation, labels, task)
    thresholds = choose_thresholds(task, calibration.apply(logits.validation), labels)
    score = validation_score(task, logits.validation, labels)
    probabilities = calibration.apply(logits.test)
    return Judged(seed, score, probabilities, thresholds, seconds, parameters)
