"""A judge's labels, and the texts that a person must review before they count.

The judge labels some random texts first, and a person labels a blind sample of them. If they agree
well enough, the judge labels the rest, most informative first. Texts without an answer, and those
whose label a confident probe contradicts, go to the person.
"""

import hashlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any

import numpy as np
from jaxtyping import Float

from sidelight.data.annotators import JUDGE_SAYS_YES, JudgeLabel
from sidelight.data.examples import Example
from sidelight.errors import SidelightError
from sidelight.judges.answers import Cost, ask_all, cost_of, sent_characters
from sidelight.judges.question import JudgeError, Question
from sidelight.judges.settings import JudgeSettings
from sidelight.progress import progress
from sidelight.statistics.agreement import Agreement, measure_agreement
from sidelight_label.agreement import LEAST_AGREEMENT, BlindSample, Gate, decide_gate, doubtful
from sidelight_label.file import Criterion, ReviewFile
from sidelight_label.pool import Pool

# Number of random texts that the judge labels before the check.
FIRST = 500
# Initial number of texts that it labels before the rest is reordered.
_BATCH = 128
_LISTED = 50

# A person's labels by row; 1 is positive.
People = Mapping[int, int]


@dataclass(frozen=True)
class Progress:
    """Progress of a round: number of texts asked about, and their total."""

    done: int
    total: int


class Review:
    """A judge's labels of the texts of a pool. Calls from several threads are safe.

    Attributes:
        pool: The texts, of a binary task.
        settings: Settings of the judge with the current criterion.
        criterion: Criterion file; None if the judge has its own rule.
        progress: Progress of the running round; None if the judge is not being asked.

    Args:
        shuffled: Rows in random order.
        answers: File of the answers.
        limit: Maximum number of texts that the judge labels; None for all.
        price: Displayed price per million tokens read.
    """

    def __init__(
        self,
        pool: Pool,
        settings: JudgeSettings,
        criterion: Criterion | None,
        answers: ReviewFile,
        *,
        shuffled: Sequence[int],
        limit: int | None = None,
        price: float | None = None,
    ):
        assert pool.task.kind == "binary"
        self.pool = pool
        self.settings = settings
        self.criterion = criterion
        self.progress: Progress | None = None
        self._answers = answers
        self._shuffled = shuffled
        self._limit = limit
        self._price = price
        self._pace: float | None = None
        self._questions = [
            Question.about(item.messages, item.response) for item in pool.examples.items
        ]
        self._digests = [_text_digest(item) for item in pool.examples.items]
        self._rows = {digest: row for row, digest in enumerate(self._digests)}
        self._lock = RLock()
        self._failures: dict[int, JudgeError] = {}
        self._doubts: dict[int, float] = {}
        self._is_doubted = False
        self._load()

    @property
    def name(self) -> str:
        """The judge's name, as stored with its labels."""
        return f"{self.settings.model} {self.settings.digest}"

    def labels(self) -> dict[int, bool]:
        """The judge's labels under its current criterion."""
        with self._lock:
            return {row: p >= JUDGE_SAYS_YES for row, p in self._probabilities.items()}

    def gate(self, people: People) -> Gate | None:
        """The decision whether its labels count; None before a sample is drawn."""
        with self._lock:
            if self._sample is None:
                return None
            return decide_gate(self._sample, _truth(people), self.labels())

    def accepted(self, people: People) -> dict[int, JudgeLabel]:
        """The judge's accepted labels of texts that no person has labelled."""
        gate = self.gate(people)
        if gate is None or gate.state != "passed":
            return {}
        with self._lock:
            return {
                row: JudgeLabel(self.name, probability, gate.agreement)
                for row, probability in self._probabilities.items()
                if row not in people
            }

    def for_people(self, people: People) -> list[int]:
        """The texts that a person must label next, in order."""
        gate = self.gate(people)
        if gate is None:
            return []
        with self._lock:
            if gate.state == "open":
                left = {*gate.left}
                return [row for row in self._shuffled if row in left]
            if gate.state != "passed":
                return []
            return [row for row in (*self._failures, *self._doubts) if row not in people]

    def is_blind(self, row: int, people: People) -> bool:
        """Whether the opinions of judge and probes on a text must be hidden."""
        gate = self.gate(people)
        return gate is not None and gate.state == "open" and row in gate.left

    def first_questions(self, people: People) -> list[int]:
        """The texts that the judge is asked about before the check."""
        # Texts that a person saw under an earlier criterion cannot be in a blind sample.
        count = FIRST + sum(row in people for row in self._shuffled[: FIRST + len(people)])
        rows = self._shuffled[: min(count, self._most())]
        return self._unanswered(rows)

    def ask_first(self, people: People) -> None:
        """Ask about some texts at random, and draw the blind sample from them.

        Raises:
            SidelightError: The judge does not answer.
        """
        rows = self.first_questions(people)
        with self._round(len(rows)) as advance:
            self._ask(rows, advance)
        with self._lock:
            if self._sample is not None:
                return
            labels = self.labels()
        scores = self.pool.score({row: int(each) for row, each in labels.items()})
        with self._lock:
            if self.labels().keys() != labels.keys():
                return
            self._sample = BlindSample.draw([row for row in labels if row not in people], scores)
            strata = [[self._digests[row] for row in each] for each in self._sample.strata]
            self._answers.keep_sample(self.settings.digest, strata)

    def rest(self) -> list[int]:
        """The texts that the judge has not been asked about, up to the limit."""
        answered = len(self._probabilities)
        return self._unanswered(self._shuffled)[: max(0, self._most() - answered)]

    def ask_rest(self, people: Callable[[], People]) -> None:
        """Ask about the rest, the most informative texts first.

        Raises:
            SidelightError: The judge has not passed the gate, or does not answer.
        """
        batch = _BATCH
        with self._round(len(self.rest())) as advance:
            while True:
                gate = self.gate(people())
                if gate is None or gate.state != "passed":
                    raise SidelightError(
                        "The judge has not passed its check, so it cannot label the rest. Review "
                        "more of its labels."
                    )
                numbers = {row: int(each) for row, each in self.labels().items()}
                scores = self.pool.score({**numbers, **people()})
                if scores is not None:
                    self.doubt(scores)
                left = self.rest()
                if not left:
                    return
                if scores is not None:
                    certainty = np.abs(scores - 0.5)
                    left.sort(key=certainty.__getitem__)
                self._ask(left[:batch], advance)
                batch *= 2

    def doubt(self, scores: Float[np.ndarray, " text"]) -> None:
        """Send texts to the person if a confident probe contradicts their label.

        Args:
            scores: Probability of the positive label, from a probe that was not trained on the
                text.
        """
        with self._lock:
            self._doubts, self._is_doubted = doubtful(scores, self.labels()), True

    def change_criterion(self, text: str, *, seen: str) -> None:
        """Edit the criterion, which invalidates the judge's labels under the old one.

        Raises:
            SidelightError: The judge is being asked, or the criterion cannot be changed.
        """
        if self.criterion is None:
            raise SidelightError("There is no criterion file. Name one with --criterion.")
        with self._lock:
            if self.progress is not None:
                raise SidelightError("The judge is being asked. Wait until it has answered.")
            self.criterion.change(text, seen=seen)
            fields = {"criterion": self.criterion.text}
            self.settings = self.settings.model_copy(update=fields)
            self._load()

    def cost(self, rows: Sequence[int]) -> Cost:
        """The cost of asking about these texts."""
        with self._lock:
            for row in rows:
                if row not in self._sizes:
                    self._sizes[row] = sent_characters(self.settings, self._questions[row])
            sizes = [self._sizes[row] for row in rows]
        return cost_of(self.settings, sizes, pace=self._pace, price=self._price)

    def summarise(self, people: People) -> dict[str, Any]:
        """A summary for the page, without the judge's answers on texts that a person has yet to
        label.
        """
        with self._lock:
            gate = self.gate(people)
            labels, rest = self.labels(), self.rest()
            is_open = gate is None or gate.state == "open"
            # Until the sample is complete, its metrics could bias the person.
            hidden = {*gate.sample} if gate is not None and is_open else set[int]()
            known = [row for row in people if row in labels and row not in hidden]
            earlier = [row for row in known if gate is None or row not in gate.sample]
            agreement = None if gate is None or is_open else gate.agreement
            return {
                "name": self.settings.model,
                "least": LEAST_AGREEMENT,
                "state": "unasked" if gate is None else gate.state,
                "answered": len(labels),
                "positives": None if is_open else sum(labels.values()),
                "failed": len(self._failures),
                "left": 0 if gate is None else len(gate.left),
                "agreement": _summary(agreement),
                "earlier": _summary(_agreement_on(earlier, people, labels)),
                "cost": str(self.cost(rest)) if rest and not is_open else None,
                "is_doubted": self._is_doubted,
                "progress": None if self.progress is None else vars(self.progress),
                "disagreements": self._disagreements(known, people, labels),
            }

    def _disagreements(
        self, rows: Sequence[int], people: People, labels: Mapping[int, bool]
    ) -> list[dict[str, Any]]:
        names = self.pool.task.labels
        listed: list[dict[str, Any]] = []
        for row in [row for row in rows if labels[row] != bool(people[row])][:_LISTED]:
            item = self.pool.examples.items[row]
            text = item.text if item.response is None else f"{item.text}\n\n{item.response}"
            each = {"person": names[people[row]], "judge": names[int(labels[row])]}
            listed.append({"text": text, "probability": self._probabilities[row], **each})
        return listed

    def _most(self) -> int:
        return len(self._shuffled) if self._limit is None else self._limit

    def _unanswered(self, rows: Sequence[int]) -> list[int]:
        with self._lock:
            return [
                row for row in rows if row not in self._probabilities and row not in self._failures
            ]

    def _load(self) -> None:
        """Load the state of the judge under its current criterion."""
        revision = self.settings.digest
        retained = {
            row: self._answers.probability(self.settings, question)
            for row, question in enumerate(self._questions)
        }
        self._probabilities = {row: each for row, each in retained.items() if each is not None}
        self._sizes: dict[int, int] = {}
        self._failures, self._doubts, self._is_doubted = {}, {}, False
        strata = self._answers.sample(revision)
        self._sample: BlindSample | None = None
        if strata is not None:
            known = self._probabilities
            rows = [
                [self._rows[each] for each in stratum if each in self._rows] for stratum in strata
            ]
            rows = [[row for row in each if row in known] for each in rows]
            self._sample = BlindSample(tuple(tuple(each) for each in rows if each))

    @contextmanager
    def _round(self, total: int) -> Generator[Callable[[], None]]:
        """Show the progress of a round in the terminal and on the page."""
        with self._lock:
            if self.progress is not None:
                raise SidelightError("The judge is being asked. Wait until it has answered.")
            self.progress = Progress(0, total)
        try:
            with progress("Asking the judge", total, unit="texts") as bar:

                def advance() -> None:
                    with self._lock:
                        assert self.progress is not None
                        self.progress = Progress(self.progress.done + 1, total)
                    bar(1)

                yield advance
        finally:
            with self._lock:
                self.progress = None

    def _ask(self, rows: Sequence[int], advance: Callable[[], None]) -> None:
        failures: dict[int, JudgeError] = {}

        def heard(number: int, answer: float | JudgeError) -> None:
            with self._lock:
                if isinstance(answer, JudgeError):
                    failures[rows[number]] = answer
                else:
                    self._probabilities[rows[number]] = answer
            advance()

        if not rows:
            return
        with self._lock:
            control = next((self._questions[row] for row in self._probabilities), None)
        questions = [self._questions[row] for row in rows]
        started = time.monotonic()
        # A failure here is not caused by the texts, so they are asked about again.
        ask_all(self.settings, questions, self._answers, heard=heard, control=control)
        self._pace = (time.monotonic() - started) / len(rows)
        with self._lock:
            self._failures |= failures


def _text_digest(item: Example) -> str:
    """A digest that identifies a text in files without texts."""
    turns = repr((item.messages, item.response))
    return hashlib.sha256(turns.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _truth(people: People) -> dict[int, bool]:
    return {row: bool(each) for row, each in people.items()}


def _agreement_on(
    rows: Sequence[int], people: People, labels: Mapping[int, bool]
) -> Agreement | None:
    """Agreement with people's labels of these texts, which are not a sample."""
    if not rows:
        return None
    person = [bool(people[row]) for row in rows]
    return measure_agreement(person, [labels[row] for row in rows], [1.0] * len(rows))


def _summary(agreement: Agreement | None) -> str | None:
    if agreement is None or agreement.value is None:
        return None
    return f"{agreement} on {agreement.texts} texts"
