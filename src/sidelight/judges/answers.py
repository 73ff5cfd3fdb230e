"""Many questions to one judge, whose answers are kept in a file, so that asking can be resumed.

The file has no text: a digest of each question, and its answer.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sidelight.errors import SidelightError
from sidelight.judges.client import JudgeClient
from sidelight.judges.question import FailureReason, JudgeAnswer, JudgeError, Question
from sidelight.judges.settings import JudgeSettings
from sidelight.models.smollm2 import cache_root
from sidelight.progress import Progress, progress

# So many failures in a row, and the judge is taken to be gone.
_MOST_IN_A_ROW = 20


def answers_file(settings: JudgeSettings) -> Path:
    """Where the answers of a judge are kept: in the user's cache, by all that decides them."""
    return cache_root() / "judges" / f"{settings.digest}.jsonl"


@dataclass
class StoredAnswers:
    """The answers of one judge. Processes may share a file: each answer is one short line.

    Attributes:
        path: The file; made with the first answer.
        probabilities: By ``Question.digest``.
    """

    path: Path
    probabilities: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> "StoredAnswers":
        """The answers in a file, which may not be there yet."""
        stored = StoredAnswers(path)
        lines = path.read_bytes().splitlines() if path.exists() else ()
        for line in lines:
            # A process that is killed leaves half a line.
            try:
                digest, probability = json.loads(line)
                probability = float(probability)
            except (ValueError, TypeError):
                continue
            if 0 <= probability <= 1:
                stored.probabilities[str(digest)] = probability
        return stored

    def keep(self, question: Question, probability: float) -> None:
        """Adds an answer, which survives the process from then on."""
        self.probabilities[question.digest] = probability
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # The newline comes first, for it also ends half a line of before.
        line = "\n" + json.dumps([question.digest, probability]) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())

    def unanswered(self, questions: Sequence[Question]) -> list[Question]:
        """The questions without an answer, each once."""
        by_digest = {question.digest: question for question in questions}
        return [q for digest, q in by_digest.items() if digest not in self.probabilities]


@dataclass(frozen=True)
class Answers:
    """What a judge said about some texts.

    Attributes:
        probabilities: One for each question; None: it gave no verdict.
        failures: Why it gave none, and how often.
    """

    probabilities: list[float | None]
    failures: Counter[FailureReason]

    def describe_failures(self) -> str:
        """For example ``timeout 3, too_long 1``."""
        return ", ".join(f"{reason} {count}" for reason, count in self.failures.most_common())


def cost_sentence(
    settings: JudgeSettings, questions: Sequence[Question], stored: StoredAnswers
) -> str:
    """What asking will cost, for the user to read before it begins."""
    asked = stored.unanswered(questions)
    sizes = sum(question.characters for question in asked)
    minutes = len(asked) / settings.budget_per_minute
    least = f", {minutes:.0f} minutes or more" if minutes >= 1 else ""
    known = len(questions) - len(asked)
    return (
        f"{len(asked):,} questions to {settings.model} at {settings.url} ({sizes:,} characters of "
        f"text; at most {settings.concurrency} at once and {settings.budget_per_minute:,} a minute"
        f"{least}). {known:,} answers are known. All are kept in {stored.path}"
    )


def ask_all(
    settings: JudgeSettings, questions: Sequence[Question], stored: StoredAnswers, *, name: str
) -> Answers:
    """Asks every question that has no answer yet, within the judge's concurrency and budget.

    Args:
        settings: The judge.
        questions: In any order; equal ones are asked once.
        stored: The answers so far; new ones are kept as they come.
        name: Of the judge in messages.

    Raises:
        SidelightError: The first question has no answer, the judge stops answering midway, or its
            key or client is missing.
    """
    failures: Counter[FailureReason] = Counter()
    asked = stored.unanswered(questions)
    if asked:
        failures = asyncio.run(_ask(settings, asked, stored, name))
    return Answers([stored.probabilities.get(question.digest) for question in questions], failures)


async def _ask(
    settings: JudgeSettings, questions: Sequence[Question], stored: StoredAnswers, name: str
) -> Counter[FailureReason]:
    client, failures = JudgeClient(settings, name=name), Counter[FailureReason]()
    left, in_a_row = iter(questions), 0

    async def ask(question: Question, *, most_in_a_row: int = _MOST_IN_A_ROW) -> None:
        nonlocal in_a_row
        try:
            answer = await within_budget(client, question)
        except JudgeError as error:
            failures[error.reason] += 1
            # A text that is too long says nothing of the judge.
            in_a_row += error.reason != "too_long"
            if in_a_row >= most_in_a_row:
                raise SidelightError(
                    f"{error} The answers so far are kept: run the command again once it answers."
                ) from error
            return
        in_a_row = 0
        stored.keep(question, answer.probability)

    async def work(advance: Progress) -> None:
        for question in left:
            await ask(question)
            advance(1)

    try:
        with progress(f"Asking {name}", len(questions), unit="questions") as advance:
            # If the first question fails, thousands would fail alike.
            await ask(next(left), most_in_a_row=1)
            advance(1)
            async with asyncio.TaskGroup() as workers:
                for _ in range(settings.concurrency):
                    workers.create_task(work(advance))
    except* SidelightError as errors:
        raise errors.exceptions[0] from None
    finally:
        await client.close()
    return failures


async def within_budget(client: JudgeClient, question: Question) -> JudgeAnswer:
    """The answer, once the judge's budget allows the question."""
    while True:
        try:
            return await client.ask(question)
        except JudgeError as error:
            if error.reason != "budget":
                raise
            await asyncio.sleep(60 / client.settings.budget_per_minute)
