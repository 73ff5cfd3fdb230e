"""Which text is labelled next, what was decided, and the probe that learns from it.

Texts of which probes are least certain come first, and one in four comes at random: only those are
like all texts, so only they can measure a probe.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from jaxtyping import Float

from sidelight.artifact import save_probe
from sidelight.data.examples import Examples, LabelledExamples
from sidelight.data.labels import is_missing, label_name
from sidelight.errors import SidelightError
from sidelight.evaluation import evaluate
from sidelight.manifest import holds_probe, read_manifest
from sidelight.probe import Probe
from sidelight.training.validation import FOLDS
from sidelight.types import Task
from sidelight_label.file import LabelFile
from sidelight_label.pool import Pool, folds_of

# What the record of a probe calls the labels that it was fitted to here.
_RECORD = "labelling"
_RANDOM_EVERY = 4


class ConflictError(SidelightError):
    """Another tab was faster."""


@dataclass(frozen=True)
class Figures:
    """How probes did on some labelled texts.

    Attributes:
        title: Which texts.
        note: What to make of them.
        rows: By the name of a probe what ``Report.to_dict`` gives.
    """

    title: str
    note: str
    rows: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class _Judge:
    """A probe, and its probabilities of each text: out-of-fold for those that it learned from."""

    title: str
    probe: Probe
    probabilities: Float[np.ndarray, "text output"]


def task_of(names: Sequence[str], *, is_multilabel: bool = False) -> Task:
    """The task of these labels; of two, the last is positive.

    Raises:
        SidelightError: They are fewer than two, equal, or no labels.
    """
    for name in names:
        if is_missing(name):
            raise SidelightError(f"'{name}' stands for no label in a file. Choose another name.")
    labels = tuple(label_name(name, "--labels") for name in names)
    if len(set(labels)) < max(2, len(labels)):
        raise SidelightError(
            f"Got the labels {', '.join(labels) or 'none'}, wanted two or more that differ. Name "
            "them with --labels, such as --labels fine,toxic."
        )
    if is_multilabel:
        return Task("multilabel", labels)
    return Task("binary" if len(labels) == 2 else "multiclass", labels)


class LabelQueue:
    """The texts of a sitting in their order, and what has been decided of them.

    Each decision is in the file before the call returns. Calls from several threads are safe.
    Training runs beside other calls.

    Attributes:
        figures: Of the newest training; none before.

    Args:
        pool: The texts, those that are labelled already included.
        file: Gets a row for each decision.
        column: Of the label in the file.
        labelled: The rows of the pool that are labelled already, in the order of the file, with the
            labels of each.
        folder: Where the newest probe is kept.

    Raises:
        SidelightError: The folder holds a probe that was not made from this file of labels.
    """

    def __init__(
        self,
        pool: Pool,
        file: LabelFile,
        *,
        column: str,
        labelled: Mapping[int, tuple[str, ...]],
        folder: Path,
    ):
        self.pool = pool
        self.folder = folder
        self.figures: tuple[Figures, ...] = ()
        self._file = file
        self._column = column
        self._lock = Lock()
        self._training = Lock()
        self._decided = dict(labelled)
        self._skipped: dict[int, None] = {}
        # Decided or skipped in this sitting, oldest first.
        self._history: list[int] = []
        # Undone, to be shown first; the last one is the first.
        self._again: list[int] = []
        self._shuffled = shuffled(pool.examples)
        self._given = [_Judge(probe.name, probe, chances) for probe, chances in pool.given]
        self._trained: _Judge | None = None
        require_replaceable(folder, file)
        if not self.obstacle and folds_of(self._labelled(self._decided)):
            self._trained, _ = self._fitted(self._decided)
        self._order = self._ordered()

    @property
    def is_training(self) -> bool:
        return self._training.locked()

    @property
    def order(self) -> str:
        """What the order is by, in words."""
        titles = [judge.title for judge in self._judges]
        if not titles:
            return "at random, until there is a probe"
        return f"least certain first, by {' and '.join(titles)}; one in {_RANDOM_EVERY} at random"

    @property
    def decided(self) -> Mapping[int, tuple[str, ...]]:
        """The labels of each text that has been labelled, in the order of the file."""
        with self._lock:
            return dict(self._decided)

    @property
    def skipped(self) -> int:
        return len(self._skipped)

    @property
    def last(self) -> int | None:
        """What ``undo`` takes back."""
        return self._history[-1] if self._history else None

    def next(self) -> int | None:
        """The text to decide now; None if all are labelled. Skipped ones come last."""
        with self._lock:
            is_random = len(self._decided) % _RANDOM_EVERY == _RANDOM_EVERY - 1
            order = self._shuffled if is_random else self._order
            fresh = (row for row in order if row not in self._skipped)
            rows = chain(reversed(self._again), fresh, self._skipped)
            return next((row for row in rows if row not in self._decided), None)

    def opinions(self, row: int) -> dict[str, dict[str, float]]:
        """What each probe says of a text: the probability of each label."""
        labels, opinions = self.pool.task.labels, dict[str, dict[str, float]]()
        for judge in self._judges:
            chances = judge.probabilities[row].tolist()
            chances = [1 - chances[0], *chances] if self.pool.task.kind == "binary" else chances
            opinions[judge.title] = dict(zip(labels, chances, strict=True))
        return opinions

    def label(self, row: int, labels: Sequence[str]) -> None:
        """Decides a text.

        Raises:
            ConflictError: It has been decided.
            SidelightError: The labels are not the task's, or the row is not on disk.
        """
        names = self._checked(labels)
        with self._lock:
            self._require_open(row)
            value = list(names) if self.pool.task.kind == "multilabel" else names[0]
            self._file.append({**self.pool.examples.rows[row], self._column: value})
            self._decided[row] = names
            self._skipped.pop(row, None)
            self._history.append(row)

    def skip(self, row: int) -> None:
        """Puts a text behind all others.

        Raises:
            ConflictError: It has been decided.
        """
        with self._lock:
            self._require_open(row)
            self._skipped.pop(row, None)
            self._skipped[row] = None
            self._again = [other for other in self._again if other != row]
            self._history.append(row)

    def undo(self, row: int) -> None:
        """Takes the last decision or skip of this sitting back; its text comes next.

        Raises:
            ConflictError: ``row`` is not the last one.
            SidelightError: The file could not be changed.
        """
        with self._lock:
            if self.last != row:
                raise ConflictError(
                    "Another tab has decided a text since. Undo that one first, or label on."
                )
            if row in self._decided:
                self._file.take_back()
                del self._decided[row]
            self._skipped.pop(row, None)
            self._history.pop()
            self._again.append(row)

    @property
    def counts(self) -> dict[str, int]:
        """How many texts have each label."""
        counts = Counter(chain.from_iterable(self.decided.values()))
        return {label: counts[label] for label in self.pool.task.labels}

    @property
    def obstacle(self) -> str:
        """What is missing before a probe can be trained, in a sentence; "" if nothing is."""
        counts, total = self.counts, len(self._decided)
        few = {label: FOLDS - count for label, count in counts.items() if count < FOLDS}
        if few:
            wanted = ", ".join(f"{count} more '{label}'" for label, count in few.items())
            return f"A probe needs {FOLDS} texts of each label: {wanted}."
        most = max(counts, key=counts.__getitem__)
        if self.pool.task.kind == "multilabel" and counts[most] > total - FOLDS:
            return f"A probe needs {FOLDS} texts without '{most}': {total - counts[most]} so far."
        return ""

    def train(self) -> None:
        """Fits a probe to all labels, keeps it, and reorders the texts.

        Raises:
            SidelightError: There are too few labels, a training runs already, or the probe could
                not be written.
        """
        if not self._training.acquire(blocking=False):
            raise SidelightError("A training is running already. Wait for it.")
        try:
            if obstacle := self.obstacle:
                raise SidelightError(obstacle)
            decided = self.decided
            labelled = self._labelled(decided)
            if not folds_of(labelled):
                raise SidelightError(
                    "Some texts are too alike to be measured on others. Label more of each label."
                )
            trained, report = self._fitted(decided)
            save_probe(trained.probe, self.folder)
            figures = self._compared(trained, report, [*decided], labelled)
            with self._lock:
                self._trained = trained
                self.figures = figures
                self._order = self._ordered()
        finally:
            self._training.release()

    @property
    def _judges(self) -> list[_Judge]:
        trained = self._trained
        return self._given if trained is None else [*self._given, trained]

    def _at_random(self) -> list[int]:
        """The decided texts that are like all texts: those first in the random order.

        A text that was chosen early counts once its turn has come, so no kind of text is missing.
        """
        passed = takewhile(lambda row: row in self._decided or row in self._skipped, self._shuffled)
        return [row for row in passed if row in self._decided]

    def _require_open(self, row: int) -> None:
        if not 0 <= row < len(self.pool.examples):
            raise SidelightError(f"There is no text {row}. Load the page again.")
        if row in self._decided:
            labels = ", ".join(self._decided[row]) or "none of the labels"
            raise ConflictError(f"This text has been labelled already: {labels}. See the next one.")

    def _checked(self, labels: Sequence[str]) -> tuple[str, ...]:
        task = self.pool.task
        unknown = set(labels) - {*task.labels}
        if unknown or (task.kind != "multilabel" and len(labels) != 1):
            raise SidelightError(
                f"Got the labels {', '.join(labels) or 'none'}, wanted "
                f"{'any' if task.kind == 'multilabel' else 'one'} of {', '.join(task.labels)}."
            )
        return tuple(label for label in task.labels if label in labels)

    def _labelled(self, decided: Mapping[int, tuple[str, ...]]) -> LabelledExamples:
        task, chosen = self.pool.task, self.pool.examples.select(decided)
        if task.kind == "multilabel":
            numbers = [[label in names for label in task.labels] for names in decided.values()]
        else:
            numbers = [task.labels.index(name) for (name,) in decided.values()]
        labels = np.array(numbers, dtype=np.int64)
        return LabelledExamples(chosen.items, chosen.rows, task=task, labels=labels)

    def _ordered(self) -> list[int]:
        judges = self._judges
        if not judges:
            return self._shuffled
        probabilities = np.stack([judge.probabilities for judge in judges])
        return np.argsort(certainty(self.pool.task, probabilities), kind="stable").tolist()

    def _fitted(self, decided: Mapping[int, tuple[str, ...]]) -> tuple[_Judge, Mapping[str, Any]]:
        """A probe of these labels, and its figures as ``sidelight train`` prints them."""
        rows = [*decided]
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", self.folder.resolve().name)[:64]
        probe, calibrated = self.pool.fit(rows, self._labelled(decided), name=name)
        probe = replace(probe, record={**probe.record, _RECORD: self._file.path.name})
        probabilities = self.pool.probabilities(probe)
        probabilities[rows] = calibrated.probabilities
        judge = _Judge(f"the probe of {len(rows)} labels", probe, probabilities)
        return judge, calibrated.report.to_dict()

    def _compared(
        self,
        trained: _Judge,
        report: Mapping[str, Any],
        rows: Sequence[int],
        labelled: LabelledExamples,
    ) -> tuple[Figures, ...]:
        """The new probe beside the earlier ones, on the same texts; none learned from them."""
        earlier, task = self._judges, labelled.task

        def measured(judge: _Judge, places: Sequence[int]) -> Mapping[str, Any]:
            probabilities = judge.probabilities[[rows[place] for place in places]]
            labels, thresholds = labelled.labels[[*places]], judge.probe.thresholds
            return evaluate(task, probabilities, labels, thresholds=thresholds).to_dict()

        everything = range(len(rows))
        chosen = "Most were chosen because they are hard, so these look worse than all texts."
        whole = Figures(
            f"All {len(rows)} labelled texts",
            chosen if earlier else "",
            {judge.title: measured(judge, everything) for judge in earlier}
            | {trained.title: report},
        )
        with self._lock:
            random = set(self._at_random())
        places = [place for place in everything if rows[place] in random]
        if not 0 < len(places) < len(rows):
            return (whole,)
        at_random = Figures(
            f"The {len(places)} texts that came at random",
            "They are like all of the texts, so these are the figures to go by.",
            {judge.title: measured(judge, places) for judge in (*earlier, trained)},
        )
        return (at_random, whole)


def require_replaceable(folder: Path, file: LabelFile) -> None:
    """Checks that training would replace no probe but one that was made from this file.

    Raises:
        SidelightError: It would.
    """
    if holds_probe(folder) and read_manifest(folder).record.get(_RECORD) != file.path.name:
        raise SidelightError(
            f"{folder} holds a probe that was not made from {file.path.name}. Name another folder "
            "with --probe-out."
        )


def shuffled(examples: Examples) -> list[int]:
    """A random order that stays when other texts come or go: by a hash of each text."""
    texts = (repr((item.messages, item.response)) for item in examples.items)
    keys = [hashlib.sha256(text.encode()).digest() for text in texts]
    return sorted(range(len(keys)), key=keys.__getitem__)


def certainty(
    task: Task, probabilities: Float[np.ndarray, "probe text output"]
) -> Float[np.ndarray, " text"]:
    """How sure the probes are of their least certain label of each text, from 0 to 1.

    It is the probability of what their mean decides, so it is low where each probe is uncertain,
    and where they disagree.
    """
    mean = probabilities.mean(0)
    if task.kind == "multiclass":
        return mean.max(1)
    return np.maximum(mean, 1 - mean).min(1)
