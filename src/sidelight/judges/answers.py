"""Many questions to one judge: what they cost, how they are asked, and the file of its answers.

The file has no text: a digest of each question, and its answer. So asking can be resumed. A failure
is never stored, and the question is asked again next time.
"""

import asyncio
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidelight.errors import SidelightError
from sidelight.judges.client import JudgeClient
from sidelight.judges.profiles import PROFILES
from sidelight.judges.question import JudgeAnswer, JudgeError, Question
from sidelight.judges.settings import JudgeSettings
from sidelight.models.smollm2 import cache_root
from sidelight.storage import sync

_CHARACTERS_PER_TOKEN = 4
# After this many failures in a row, the judge may be down.
_FAILURES_IN_A_ROW = 20


def cached_answers(settings: JudgeSettings) -> "AnswerFile":
    """The answers of a judge in the user's cache."""
    return AnswerFile(cache_root() / "judges" / f"{settings.digest}.jsonl")


class AnswerFile:
    """Answers of judges on disk: JSON lines, which only their owner can read.

    Answers of other judges and criteria stay, so none is asked for twice. Processes may share a
    file.

    Args:
        path: The file, made with the first answer. Lines that a kill has cut are ignored.

    Raises:
        SidelightError: It cannot be read or written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._answers: dict[tuple[str, str], float] = {}
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise SidelightError(f"Cannot read {path}: {error.strerror}.") from error
        self._is_torn = bool(content) and not content.endswith(b"\n")
        for line in content.splitlines():
            try:
                self._take(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                continue

    def probability(self, settings: JudgeSettings, question: Question) -> float | None:
        """A judge's answer to a question; None: it has given none."""
        return self._answers.get((settings.digest, question.digest))

    def keep(self, settings: JudgeSettings, question: Question, probability: float) -> None:
        """Adds an answer. It survives the process at once, and a power cut after ``sync``."""
        names = {"judge": settings.digest, "question": question.digest}
        self._append({**names, "probability": probability})

    def unanswered(self, settings: JudgeSettings, questions: Sequence[Question]) -> list[Question]:
        """The questions without an answer, each once."""
        distinct = {question.digest: question for question in questions}.values()
        return [each for each in distinct if self.probability(settings, each) is None]

    def sync(self) -> None:
        if self.path.exists():
            sync(self.path)

    def _append(self, record: Mapping[str, Any]) -> None:
        line = ("\n" if self._is_torn else "") + json.dumps(record) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                written = os.write(descriptor, line.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._not_saved(error.strerror) from error
        self._is_torn = written < len(line)
        if self._is_torn:
            raise self._not_saved("the disk is full")
        self._take(record)

    def _not_saved(self, why: str | None) -> SidelightError:
        return SidelightError(f"The judge's answers were not saved to {self.path} ({why}).")

    def _take(self, record: Mapping[str, Any]) -> None:
        if 0 <= (probability := float(record["probability"])) <= 1:
            self._answers[str(record["judge"]), str(record["question"])] = probability


@dataclass(frozen=True)
class Cost:
    """A rough estimate of what questions cost.

    Attributes:
        questions: How many.
        tokens: That the judge reads, at four characters each.
        seconds: The least time that the judge's budget allows, or what was measured.
        price: In the currency of the given price; None: none was given.
    """

    questions: int
    tokens: int
    seconds: float
    price: float | None

    def __str__(self) -> str:
        """For example ``300 texts, about 41,000 tokens (about 0.01), about 2 min``."""
        money = "" if self.price is None else f" (about {self.price:.2f})"
        is_short = self.seconds < 60
        time = "under 1 min" if is_short else f"about {self.seconds / 60:.0f} min"
        return f"{self.questions:,} texts, about {self.tokens:,} tokens{money}, {time}"


def cost_of(
    settings: JudgeSettings,
    sizes: Sequence[int],
    *,
    pace: float | None = None,
    price: float | None = None,
) -> Cost:
    """What these questions will cost.

    Args:
        settings: The judge.
        sizes: Characters of each question, as ``sent_characters`` counts them.
        pace: Seconds of a question, as measured; None: as the budget allows.
        price: Of a million tokens that the judge reads.
    """
    tokens = sum(sizes) // _CHARACTERS_PER_TOKEN
    seconds = len(sizes) * max(60 / settings.budget_per_minute, pace or 0)
    return Cost(len(sizes), tokens, seconds, None if price is None else tokens * price / 1e6)


def sent_characters(settings: JudgeSettings, question: Question) -> int:
    """Characters that a judge reads for a question, its criterion included."""
    criterion = settings.criterion or ""
    if settings.kind == "chat":
        turns = PROFILES[settings.profile].ask(question, criterion)
        return sum(len(turn["content"]) for turn in turns)
    return question.characters + len(criterion)


def ask_all(
    settings: JudgeSettings,
    questions: Sequence[Question],
    answers: AnswerFile,
    *,
    heard: Callable[[int, float | JudgeError], object] = lambda _number, _answer: None,
    control: Question | None = None,
) -> list[float | JudgeError]:
    """Asks every question that has no answer yet, within the judge's concurrency and budget.

    Args:
        settings: The judge.
        questions: In the order in which they are asked; equal ones are asked once.
        answers: The answers so far; new ones are kept as they come.
        heard: Gets the number of each question and its answer, or why there is none, as they come.
        control: A question that the judge has answered; None: one of ``questions``. It is asked
            again after many failures in a row. If it is answered, their texts are to blame, and
            asking goes on.

    Returns:
        For each question its answer, or why there is none.

    Raises:
        SidelightError: The judge answers no question, or no more of them, or its key or client is
            missing.
    """
    numbers: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        numbers.setdefault(question.digest, []).append(number)
    found: dict[int, float | JudgeError] = {}

    def take(question: Question, answer: float | JudgeError) -> None:
        for number in numbers[question.digest]:
            found[number] = answer
            heard(number, answer)

    for digest in numbers:
        question = questions[numbers[digest][0]]
        if (known := answers.probability(settings, question)) is not None:
            control = control or question
            take(question, known)
    asked = answers.unanswered(settings, questions)
    if asked:
        try:
            asyncio.run(_ask(settings, asked, answers, take, control))
        finally:
            answers.sync()
    failures = [each for each in found.values() if isinstance(each, JudgeError)]
    if control is None and failures and len(failures) == len(found):
        raise _no_answer("any text", failures[-1])
    return [found[number] for number in range(len(questions))]


async def _ask(
    settings: JudgeSettings,
    questions: Sequence[Question],
    answers: AnswerFile,
    take: Callable[[Question, float | JudgeError], None],
    control: Question | None,
) -> None:
    client, left, failures = JudgeClient(settings, name=settings.model), iter(questions), 0
    check = asyncio.Lock()

    async def work() -> None:
        nonlocal control, failures
        for question in left:
            try:
                probability = (await _within_budget(client, question)).probability
            except JudgeError as error:
                take(question, error)
                # A text that is too long says nothing of the judge.
                failures += error.reason != "too_long"
                # Until the check is over, other failing questions wait.
                async with check:
                    if failures >= _FAILURES_IN_A_ROW:
                        # Without an earlier answer, a text far from those that failed.
                        if not await _is_answered(settings, control or questions[-1]):
                            raise _no_answer(f"{failures} texts in a row", error) from error
                        failures = 0
                continue
            control, failures = question, 0
            answers.keep(settings, question, probability)
            take(question, probability)

    try:
        async with asyncio.TaskGroup() as workers:
            for _ in range(settings.concurrency):
                workers.create_task(work())
    except* SidelightError as errors:
        raise errors.exceptions[0] from None
    finally:
        await client.close()


async def _is_answered(settings: JudgeSettings, control: Question) -> bool:
    # Another client, since this one has the answer in memory.
    client = JudgeClient(settings, name=settings.model)
    try:
        await _within_budget(client, control)
    except JudgeError:
        return False
    finally:
        await client.close()
    return True


async def _within_budget(client: JudgeClient, question: Question) -> JudgeAnswer:
    """The answer, once the judge's budget allows the question."""
    while True:
        try:
            return await client.ask(question)
        except JudgeError as error:
            if error.reason != "budget":
                raise
            await asyncio.sleep(60 / client.settings.budget_per_minute)


def _no_answer(texts: str, last: JudgeError) -> SidelightError:
    """The error of a judge that gave no answer to some texts."""
    return SidelightError(
        f"The judge gave no answer to {texts}. The last time: {last} Its answers so far are kept. "
        "Check the judge, and ask again."
    )
