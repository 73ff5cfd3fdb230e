"""The labelling queue: the next text, the labels so far, and the probe trained on them.

Texts about which probes are least certain come first, and one in four is random, because only
random texts are representative for measuring a probe.
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
    """The task of these labels; with two, the second is positive.

    Raises:
        SidelightError: There are fewer than two labels, duplicates, or invalid labels.
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
    """The texts of a session in order, and their labels so far.

    Each label is in the file before the call returns. Calls from several threads are safe, and
    training runs concurrently.

    Attributes:
        comparisons: Comparisons of the latest training, each with the texts (``title``), a
            ``note``, and ``Report.to_dict`` by name of a probe (``rows``).

    Args:
        pool: The texts, including already labelled ones.
        file: Label file.
        column: Column of the label in the file.
        labelled: Existing labels of texts of the pool, in the order of the file.
        folder: Folder of the latest probe.
        criterion: Rule in English for people and judges; None shows none.
        review: Review of a judge that also labels texts; None without a judge.
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
        # Labelled or skipped in this session, oldest first.
        self._decided_rows: list[int] = []
        # Undone texts, which are shown first, last one first.
        self._again: list[int] = []
        self._shuffled = shuffled(pool.examples)
        self._probes = [*pool.initial]
        # With too few labels, there is no probe yet.
        with suppress(SidelightError):
            self._probes.append(self._fit(self._decided, self._judge_rows())[0])
        self._order = self._ordered()

    @property
    def order(self) -> str:
        """A description of the order."""
        if self.review is not None:
            people = self.people
            if left := self.review.for_people(people):
                gate = self.review.gate(people)
                if gate is not None and gate.state == "open":
                    return f"the blind sample that checks the judge, {len(left)} left"
                return f"{len(left)} texts on which judge and probe differ, or without an answer"
        titles = [probe.title for probe in self._probes]
        if not titles:
            return "random until a probe is trained"
        return f"least certain first, by {' and '.join(titles)}; one in {_RANDOM_EVERY} at random"

    @property
    def decided(self) -> dict[int, Labels]:
        """The labels of each text that has been labelled, in the order of the file."""
        with self._lock:
            return dict(self._decided)

    @property
    def people(self) -> dict[int, int]:
        """The labels of a binary task, for a judge's review."""
        return {row: each for row, each in self.decided.items() if isinstance(each, int)}

    @property
    def skipped(self) -> list[int]:
        """The skipped texts without a label, in the order of skipping."""
        undecided = (row for row in reversed(self._decided_rows) if row not in self._decided)
        return [*dict.fromkeys(undecided)][::-1]

    @property
    def last(self) -> int | None:
        """The row that ``undo`` reverts."""
        return self._decided_rows[-1] if self._decided_rows else None

    def next(self) -> int | None:
        """The next text; None if all are labelled. Skipped texts come last."""
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
        """Each probe's probabilities of the labels of a text; empty for a blind text."""
        if self.review is not None and self.review.is_blind(row, self.people):
            return {}
        labels, opinions = self.pool.task.labels, dict[str, dict[str, float]]()
        for probe in self._probes:
            chances = probe.probabilities[row].tolist()
            chances = [1 - chances[0], *chances] if self.pool.task.kind == "binary" else chances
            opinions[probe.title] = dict(zip(labels, chances, strict=True))
        return opinions

    def label(self, row: int, labels: Sequence[str]) -> None:
        """Label a text.

        Raises:
            SidelightError: The text is already labelled, the labels are invalid, or the row was not
                saved.
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
        """Move a text to the end of the queue.

        Raises:
            SidelightError: The text is already labelled.
        """
        with self._lock:
            self._require_open(row)
            self._again = [waiting for waiting in self._again if waiting != row]
            self._decided_rows.append(row)

    def undo(self, row: int) -> None:
        """Revert the last label or skip of this session; its text comes next.

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
        """Number of texts with each label."""
        counts = self.pool.labelled(self.decided).label_counts.tolist()
        return dict(zip(self.pool.task.labels, counts, strict=True))

    @property
    def obstacle(self) -> str:
        """A sentence on what is missing before a probe can be trained; "" if nothing is."""
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
        """Let the judge label texts: some at random first, and the rest once it has passed.

        Raises:
            SidelightError: There is no judge, it does not answer, or it has not passed.
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
        """Edit the criterion. The judge's labels under the old criterion are removed from the file.

        Args:
            text: The new text.
            seen: The text that was edited.

        Raises:
            SidelightError: There is no criterion, it has changed in the meantime, or it cannot be
                written.
        """
        if self.review is not None:
            self.review.change_criterion(text, seen=seen)
            self.publish()
        elif self.criterion is not None:
            self.criterion.change(text, seen=seen)
        else:
            raise SidelightError("There is no criterion. Name its file with --criterion.")

    def publish(self) -> None:
        """Write the judge's accepted labels to the file, replacing its earlier ones.

        Raises:
            SidelightError: The labels were not saved.
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
        """The rows of the judge's accepted labels."""
        return {} if self.review is None else self.review.accepted(self.people)

    def _at_random(self) -> list[int]:
        """The labelled texts that are representative of all texts: those first in the random order.

        A text that was chosen early counts once its turn has come, so that no kind of text is
        missing.
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
        """Compare the new probe with earlier ones on the same texts, which none was trained on."""
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
            # A judge's labels are not ground truth.
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
    """Check that training would only replace a probe that was trained on this file.

    Raises:
        SidelightError: The folder contains another probe.
    """
    if holds_probe(folder) and read_card(folder).training.labelling != file.path.name:
        raise SidelightError(
            f"{folder} contains a probe that was not trained on {file.path.name}. Name another "
            "folder with --probe-out."
        )


def shuffled(examples: Examples) -> list[int]:
    """A random order by a hash of each text, which does not depend on other texts."""
    texts = (repr((item.messages, item.response)) for item in examples.items)
    keys = [hashlib.sha256(text.encode()).digest() for text in texts]
    return sorted(range(len(keys)), key=keys.__getitem__)


def certainty(
    task: Task, probabilities: Float[np.ndarray, "probe text output"]
) -> Float[np.ndarray, " text"]:
    """Confidence of the probes in their least certain label of each text, from 0 to 1.

    It is the probability of the decision of their mean, so it is low if each probe is uncertain, or
    if they disagree.
    """
    mean = probabilities.mean(0)
    if task.kind == "multiclass":
        return mean.max(1)
    return np.maximum(mean, 1 - mean).min(1)
