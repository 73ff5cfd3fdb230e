"""Which text is labelled next, what was decided, and the probe that learns from it.

Texts of which probes are least certain come first, and one in four comes at random: only those are
like all texts, so only they can measure a probe.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain, takewhile
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
from jaxtyping import Float

from sidelight.data.annotators import JudgeLabel
from sidelight.data.evaluation import Report, evaluate
from sidelight.data.examples import Examples
from sidelight.data.labels import is_missing, label_name
from sidelight.errors import SidelightError
from sidelight.probes.artifact import save_probe
from sidelight.probes.card import holds_probe, read_card
from sidelight.statistics.metrics import decide
from sidelight.training.validation import FOLDS
from sidelight.types import Task
from sidelight_label.file import Criterion, LabelFile
from sidelight_label.pool import Labels, Pool, ScoredProbe
from sidelight_label.review import Review

_RANDOM_EVERY = 4


def task_of(names: Sequence[str], *, is_multilabel: bool = False) -> Task:
    """The task of these labels; of two, the last is positive.

    Raises:
        SidelightError: They are fewer than two, equal, or no labels.
    """
    for name in names:
        if is_missing(name):
            raise SidelightError(f"'{name}' means a missing label in a file. Choose another name.")
    labels = tuple(label_name(name, "--labels") for name in names)
    if len(set(labels)) < max(2, len(labels)):
        raise SidelightError(
            f"Got the labels {', '.join(labels) or 'none'}, but two or more different ones are "
            "needed. Name them with --labels, such as --labels fine,toxic."
        )
    if is_multilabel:
        return Task("multilabel", labels)
    return Task("binary" if len(labels) == 2 else "multiclass", labels)


class LabelQueue:
    """The texts of a sitting in their order, and what has been decided of them.

    Each decision is in the file before the call returns. Calls from several threads are safe.
    Training runs beside other calls.

    Attributes:
        comparisons: Of the newest training, none before: which texts (``title``), what to make of
            them (``note``), and by the name of a probe what ``Report.to_dict`` gives (``rows``).

    Args:
        pool: The texts, those that are labelled already included.
        file: Gets a row for each decision.
        column: Of the label in the file.
        labelled: What the file says of texts of the pool, in its order.
        folder: Where the newest probe is kept.
        criterion: The rule in English that people and judges decide by; None: none is shown.
        review: A judge that labels texts too; None: people alone do.
    """

    def __init__(
        self,
        pool: Pool,
        file: LabelFile,
        *,
        column: str,
        labelled: Mapping[int, Labels],
        folder: Path,
        criterion: Criterion | None = None,
        review: Review | None = None,
    ):
        self.pool = pool
        self.folder = folder
        self.criterion = criterion
        self.review = review
        self.comparisons: list[dict[str, Any]] = []
        self._file = file
        self._column = column
        self._lock = RLock()
        self._decided = dict(labelled)
        # Decided or skipped in this sitting, oldest first.
        self._decided_rows: list[int] = []
        # Undone, to be shown first; the last one is the first.
        self._again: list[int] = []
        self._shuffled = shuffled(pool.examples)
        self._probes = [*pool.initial]
        # With too few labels there is no more yet.
        with suppress(SidelightError):
            self._probes.append(self._fit(self._decided, self._judge_rows())[0])
        self._order = self._ordered()

    @property
    def order(self) -> str:
        """What the order is by, in words."""
        if self.review is not None:
            people = self.people
            if left := self.review.for_people(people):
                gate = self.review.gate(people)
                if gate is not None and gate.state == "open":
                    return f"the blind sample that checks the judge, {len(left)} left"
                return f"{len(left)} texts on which judge and probe differ, or without an answer"
        titles = [probe.title for probe in self._probes]
        if not titles:
            return "at random, until there is a probe"
        return f"least certain first, by {' and '.join(titles)}; one in {_RANDOM_EVERY} at random"

    @property
    def decided(self) -> dict[int, Labels]:
        """The labels of each text that has been labelled, in the order of the file."""
        with self._lock:
            return dict(self._decided)

    @property
    def people(self) -> dict[int, int]:
        """The same of a binary task, as a judge's review takes it."""
        return {row: each for row, each in self.decided.items() if isinstance(each, int)}

    @property
    def skipped(self) -> list[int]:
        """The texts that were skipped and have no label; the one that was skipped last ends it."""
        undecided = (row for row in reversed(self._decided_rows) if row not in self._decided)
        return [*dict.fromkeys(undecided)][::-1]

    @property
    def last(self) -> int | None:
        """What ``undo`` takes back."""
        return self._decided_rows[-1] if self._decided_rows else None

    def next(self) -> int | None:
        """The text to decide now; None if all are labelled. Skipped ones come last."""
        with self._lock:
            is_random = len(self._decided) % _RANDOM_EVERY == _RANDOM_EVERY - 1
            order = self._shuffled if is_random else self._order
            skipped = {*self.skipped}
            wanted, covered = list[int](), dict[int, JudgeLabel]()
            if self.review is not None:
                people = self.people
                wanted, covered = self.review.for_people(people), self.review.accepted(people)
            fresh = [row for row in (*wanted, *order) if row not in skipped]
            hidden = covered.keys() - {*wanted}
            uncovered = (row for row in fresh if row not in hidden)
            rows = chain(reversed(self._again), uncovered, self.skipped, fresh)
            return next((row for row in rows if row not in self._decided), None)

    def opinions(self, row: int) -> dict[str, dict[str, float]]:
        """What each probe says of a text: the probability of each label; nothing of a blind one."""
        if self.review is not None and self.review.is_blind(row, self.people):
            return {}
        labels, opinions = self.pool.task.labels, dict[str, dict[str, float]]()
        for probe in self._probes:
            chances = probe.probabilities[row].tolist()
            chances = [1 - chances[0], *chances] if self.pool.task.kind == "binary" else chances
            opinions[probe.title] = dict(zip(labels, chances, strict=True))
        return opinions

    def label(self, row: int, labels: Sequence[str]) -> None:
        """Decide a text.

        Raises:
            SidelightError: It has been decided, the labels are not the task's, or the row is not on
                disk.
        """
        task = self.pool.task
        is_set = task.kind == "multilabel"
        if set(labels) - {*task.labels} or (len(labels) != 1 and not is_set):
            raise SidelightError(
                f"Got the labels {', '.join(labels) or 'none'}, expected "
                f"{'any' if is_set else 'one'} of {', '.join(task.labels)}."
            )
        with self._lock:
            self._require_open(row)
            chosen = [label for label in task.labels if label in labels]
            cell = chosen if is_set else chosen[0]
            self._file.append({**self.pool.cells(row), self._column: cell})
            flags = [int(label in chosen) for label in task.labels]
            self._decided[row] = flags if is_set else flags.index(1)
            self._decided_rows.append(row)
            self.publish()

    def skip(self, row: int) -> None:
        """Put a text behind all others.

        Raises:
            SidelightError: It has been decided.
        """
        with self._lock:
            self._require_open(row)
            self._again = [waiting for waiting in self._again if waiting != row]
            self._decided_rows.append(row)

    def undo(self, row: int) -> None:
        """Take the last decision or skip of this sitting back; its text comes next.

        Raises:
            SidelightError: ``row`` is not the last one, or the file could not be changed.
        """
        with self._lock:
            if self.last != row:
                raise SidelightError(
                    "Another tab has labelled a text since then. Undo that label first, or "
                    "continue labelling."
                )
            if row in self._decided:
                self._file.take_back()
                del self._decided[row]
            self._decided_rows.pop()
            self._again.append(row)
            self.publish()

    @property
    def counts(self) -> dict[str, int]:
        """How many texts have each label."""
        counts = self.pool.labelled(self.decided).label_counts.tolist()
        return dict(zip(self.pool.task.labels, counts, strict=True))

    @property
    def obstacle(self) -> str:
        """What is missing before a probe can be trained, in a sentence; "" if nothing is."""
        classified = [each.is_positive for each in self._judge_rows().values()]
        counts, total = self.counts, len(self._decided) + len(classified)
        for is_positive in classified:
            counts[self.pool.task.labels[int(is_positive)]] += 1
        few = {label: FOLDS - count for label, count in counts.items() if count < FOLDS}
        if few:
            wanted = ", ".join(f"{count} more '{label}'" for label, count in few.items())
            return f"A probe needs {FOLDS} texts of each label: {wanted}."
        most = max(counts, key=counts.__getitem__)
        if self.pool.task.kind == "multilabel" and counts[most] > total - FOLDS:
            return f"A probe needs {FOLDS} texts without '{most}': {total - counts[most]} so far."
        return ""

    def train(self) -> None:
        """Fit a probe to all labels, keep it, and reorder the texts.

        Raises:
            SidelightError: There are too few labels, or the probe could not be written.
        """
        decided, classified = self.decided, self._judge_rows()
        trained, report = self._fit(decided, classified)
        if self.review is not None and classified:
            self.review.doubt(trained.probabilities[:, 0])
        save_probe(trained.probe, self.folder)
        self.publish()
        comparisons = self._compared(trained, report, decided)
        with self._lock:
            self._probes = [*self.pool.initial, trained]
            self.comparisons = comparisons
            self._order = self._ordered()

    def ask(self) -> None:
        """Have the judge label texts: some at random first, and the rest once it has passed.

        Raises:
            SidelightError: There is no judge, it gives no answers, or it has not passed.
        """
        if self.review is None:
            raise SidelightError("There is no judge. Name one with --judge.")
        gate = self.review.gate(self.people)
        if gate is None:
            self.review.ask_first(self.people)
        else:
            self.review.ask_rest(lambda: self.people)
        self.publish()

    def change_criterion(self, text: str, *, seen: str) -> None:
        """Edit the criterion. The judge's labels under the old one leave the file.

        Args:
            text: The new one.
            seen: The one that was edited.

        Raises:
            SidelightError: There is none, it has been changed meanwhile, or it cannot be written.
        """
        if self.review is not None:
            self.review.change_criterion(text, seen=seen)
            self.publish()
        elif self.criterion is not None:
            self.criterion.change(text, seen=seen)
        else:
            raise SidelightError("There is no criterion. Name its file with --criterion.")

    def publish(self) -> None:
        """Put the judge's labels that count into the file, and no others of the judge.

        Raises:
            SidelightError: They are not on disk.
        """
        if self.review is None:
            return
        labels = self.pool.task.labels
        with self._lock:
            self._file.replace_judge_rows(
                [
                    {**self.pool.cells(row, each), self._column: labels[int(each.is_positive)]}
                    for row, each in self._judge_rows().items()
                ]
            )

    def _judge_rows(self) -> dict[int, JudgeLabel]:
        """The judge's labels that count."""
        return {} if self.review is None else self.review.accepted(self.people)

    def _at_random(self) -> list[int]:
        """The decided texts that are like all texts: those first in the random order.

        A text that was chosen early counts once its turn has come, so no kind of text is missing.
        """
        seen = {*self._decided, *self._decided_rows}
        passed = takewhile(seen.__contains__, self._shuffled)
        return [row for row in passed if row in self._decided]

    def _require_open(self, row: int) -> None:
        if not 0 <= row < len(self.pool.examples):
            raise SidelightError(f"There is no text {row}. Reload the page.")
        if row in self._decided:
            raise SidelightError("This text has already been labelled. Continue with the next one.")

    def _ordered(self) -> list[int]:
        if not self._probes:
            return self._shuffled
        probabilities = np.stack([probe.probabilities for probe in self._probes])
        return np.argsort(certainty(self.pool.task, probabilities), kind="stable").tolist()

    def _fit(
        self, decided: Mapping[int, Labels], classified: Mapping[int, JudgeLabel]
    ) -> tuple[ScoredProbe, Report]:
        """A probe of these labels, and its figures as ``sidelight train`` prints them."""
        if obstacle := self.obstacle:
            raise SidelightError(obstacle)
        every = {**decided, **{row: int(each.is_positive) for row, each in classified.items()}}
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", self.folder.resolve().name)[:64]
        return self.pool.fit(every, classified, name=name, labelling=self._file.path.name)

    def _compared(
        self, trained: ScoredProbe, report: Report, decided: Mapping[int, Labels]
    ) -> list[dict[str, Any]]:
        """The new probe beside the earlier ones, on the same texts; none learned from them."""
        earlier = self._probes

        def measured(probe: ScoredProbe, rows: Sequence[int]) -> dict[str, Any]:
            labels = self.pool.labelled({row: decided[row] for row in rows}).labels
            probabilities, thresholds = probe.probabilities[rows], probe.probe.thresholds
            predictions = decide(self.pool.task, probabilities, labels, thresholds=thresholds)
            return evaluate(predictions).to_dict()

        rows = [*decided]
        chosen = "Most of these were chosen because they are hard, so metrics are pessimistic."
        every = {probe.title: measured(probe, rows) for probe in earlier}
        overall = {
            "title": f"All {len(rows)} labelled texts",
            "note": chosen if earlier else "",
            # Labels of a judge are no truth to measure by.
            "rows": {
                **every,
                trained.title: measured(trained, rows)
                if report.rows > len(rows)
                else report.to_dict(),
            },
        }
        with self._lock:
            typical = [row for row in self._at_random() if row in decided]
        if not 0 < len(typical) < len(rows):
            return [overall]
        at_random = {
            "title": f"The {len(typical)} texts drawn at random",
            "note": "These represent all texts, so these are the metrics to rely on.",
            "rows": {probe.title: measured(probe, typical) for probe in (*earlier, trained)},
        }
        return [at_random, overall]


def require_replaceable(folder: Path, file: LabelFile) -> None:
    """Check that training would replace no probe but one that was made from this file.

    Raises:
        SidelightError: It would.
    """
    if holds_probe(folder) and read_card(folder).training.labelling != file.path.name:
        raise SidelightError(
            f"{folder} contains a probe that was not trained on {file.path.name}. Name another "
            "folder with --probe-out."
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
