"""The criterion, what a judge answered about texts, and the asking of many questions."""

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidelight.data.examples import Example
from sidelight.errors import SidelightError
from sidelight.judges.answers import within_budget
from sidelight.judges.client import JudgeClient
from sidelight.judges.profiles import PROFILES
from sidelight.judges.question import JudgeError, Question
from sidelight.judges.settings import JudgeSettings, read_criterion
from sidelight.storage import sync, write_text

# So many failures in a row, from texts of all kinds, are the judge's.
_FAILURES = 12
_CHARACTERS_PER_TOKEN = 4


class Criterion:
    """The rule in English, in its file.

    Attributes:
        path: The file.
        text: What it says.

    Raises:
        SidelightError: It cannot be read, or is empty.
    """

    def __init__(self, path: Path):
        self.path = path
        self.text = read_criterion(path)

    def change(self, text: str, *, seen: str) -> None:
        """Writes another text to the file.

        Args:
            text: The new one.
            seen: The one that was edited.

        Raises:
            SidelightError: It is empty, or has been changed meanwhile, or cannot be written.
        """
        if not text.strip():
            raise SidelightError("The criterion is empty. Write what a text must do to meet it.")
        if seen.strip() != self.text:
            raise SidelightError(
                "Another tab has changed the criterion. Copy your text, load the page again, and "
                "edit the new one."
            )
        if read_criterion(self.path) != self.text:
            raise SidelightError(
                f"Another program has changed {self.path}, so nothing is written to it. Stop "
                "'sidelight label' and start it again: it reads the file as it is now."
            )
        try:
            write_text(self.path, text.strip() + "\n")
        except OSError as error:
            raise SidelightError(
                f"The criterion was not saved to {self.path} ({error.strerror})."
            ) from error
        self.text = text.strip()


class AnswerFile:
    """A judge's answers, on disk: for each text its hash and the probability, and no text.

    Answers of other criteria stay, so that one that comes back is not asked again.

    Args:
        path: JSON lines. Lines that a kill has cut are ignored.

    Raises:
        SidelightError: It cannot be read or written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._answers: dict[tuple[str, str], float] = {}
        self._samples: dict[str, list[list[str]]] = {}
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

    def probability(self, judge: str, text: str) -> float | None:
        """What a judge of this identity answered about a text of this digest; None: nothing."""
        return self._answers.get((judge, text))

    def sample(self, judge: str) -> list[list[str]] | None:
        """The strata of the blind sample of a judge, as digests."""
        return self._samples.get(judge)

    def keep(self, judge: str, text: str, probability: float) -> None:
        """Adds an answer; it survives a power cut once ``sync`` returns."""
        self._append({"judge": judge, "text": text, "probability": probability})

    def keep_sample(self, judge: str, strata: list[list[str]]) -> None:
        self._append({"judge": judge, "sample": strata})
        self.sync()

    def sync(self) -> None:
        if self.path.exists():
            sync(self.path)

    def _append(self, record: Mapping[str, Any]) -> None:
        line = ("\n" if self._is_torn else "") + json.dumps(record) + "\n"
        try:
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
        if "sample" in record:
            strata = [[str(text) for text in each] for each in record["sample"]]
            self._samples[str(record["judge"])] = strata
        elif 0 <= (probability := float(record["probability"])) <= 1:
            self._answers[str(record["judge"]), str(record["text"])] = probability


def question_about(item: Example) -> Question:
    """What a judge is sent about a text: the same as while serving."""
    return Question.about(item.conversation, item.response)


def text_digest(item: Example) -> str:
    """Tells texts apart in files without them."""
    turns = repr((item.messages, item.response))
    return hashlib.sha256(turns.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True)
class Cost:
    """What questions cost, roughly.

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
        return (
            f"{self.questions:,} texts, about {self.tokens:,} tokens{money}, "
            f"{_minutes(self.seconds)}"
        )


def _minutes(seconds: float) -> str:
    return "under 1 min" if seconds < 60 else f"about {seconds / 60:.0f} min"


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
    least = 60 / settings.budget_per_minute
    return Cost(
        len(sizes),
        tokens,
        len(sizes) * max(least, pace or 0),
        None if price is None else tokens * price / 1e6,
    )


def sent_characters(settings: JudgeSettings, question: Question) -> int:
    """Characters that a judge reads for a question, its criterion included."""
    criterion = settings.criterion or ""
    if settings.kind == "chat":
        turns = PROFILES[settings.profile].ask(question, criterion)
        return sum(len(turn["content"]) for turn in turns)
    return question.characters + len(criterion)


Heard = Callable[[int, float | JudgeError], None]


def ask_all(settings: JudgeSettings, questions: Mapping[int, Question], heard: Heard) -> float:
    """Asks a judge all these questions, in this order, as many at once as it may get.

    Questions beyond its budget wait. Returns the seconds of a question.

    Args:
        settings: The judge.
        questions: By number.
        heard: Gets each number with its answer, or why there is none.

    Raises:
        SidelightError: The judge gives no answers, or has no key.
    """
    started = time.monotonic()
    asyncio.run(_ask_all(settings, questions, heard))
    return (time.monotonic() - started) / max(1, len(questions))


async def _ask_all(
    settings: JudgeSettings, questions: Mapping[int, Question], heard: Heard
) -> None:
    client = JudgeClient(settings)
    waiting = iter(questions.items())
    failures = 0

    async def work() -> None:
        nonlocal failures
        for row, question in waiting:
            try:
                answer: float | JudgeError = (await within_budget(client, question)).probability
            except JudgeError as error:
                answer = error
            heard(row, answer)
            if not isinstance(answer, JudgeError):
                failures = 0
            # A long text says nothing of the judge.
            elif answer.reason != "too_long":
                failures += 1
                if failures >= _FAILURES:
                    raise no_answer(f"{failures} texts in a row", answer)

    workers = [asyncio.ensure_future(work()) for _ in range(settings.concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await client.close()


def no_answer(texts: str, last: JudgeError) -> SidelightError:
    """The error of a judge that gave no answer to some texts."""
    return SidelightError(
        f"The judge gave no answer to {texts}. The last time: {last} Check it and ask again: what "
        "it answered is kept."
    )
