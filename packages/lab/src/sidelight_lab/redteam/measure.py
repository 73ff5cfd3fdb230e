"""Attack labelled texts, and measure how many a probe still flags."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from math import isnan
from random import Random
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import Bool
from tabulate import tabulate

from sidelight.data.evaluation import Estimate
from sidelight.data.examples import Example, LabelledExamples
from sidelight.errors import ContextLengthError, SidelightError
from sidelight.models.conversation import Message
from sidelight.progress import progress
from sidelight.scoring import encode
from sidelight.types import Flags
from sidelight_lab.redteam.attacks import ATTACKS, SEARCH, Attack, Markup, Messages, Surroundings
from sidelight_lab.redteam.targets import Target


@dataclass(frozen=True)
class Rate:
    """Number of flagged texts.

    Attributes:
        flagged: Number of texts that are flagged.
        texts: Number of texts that were classified.
        left_out: Number of texts that could not be classified; not included in ``texts``.
    """

    flagged: int
    texts: int
    left_out: int = 0

    @staticmethod
    def of(margins: Sequence[float]) -> "Rate":
        """Count the margins of ``Target.margins``."""
        unknown = sum(map(isnan, margins))
        return Rate(sum(margin >= 0 for margin in margins), len(margins) - unknown, unknown)

    @property
    def share(self) -> float | None:
        """Flagged share; None without texts."""
        return self.flagged / self.texts if self.texts else None

    @property
    def estimate(self) -> Estimate:
        """Flagged share with its Wilson 95 % interval."""
        if not self.texts:
            return Estimate(None, None, None)
        return Estimate(self.share, 0.0, 1.0).as_share(self.texts)

    def minus(self, alarms: "Rate") -> float | None:
        """Return this recall minus the false-alarm rate; None if either has no texts."""
        if self.share is None or alarms.share is None:
            return None
        return self.share - alarms.share

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**self.estimate.to_dict(), **vars(self)}


@dataclass(frozen=True)
class AttackResult:
    """Flagged texts before and under an attack.

    Attributes:
        attack: Name of the attack.
        recall_before: Recall on the unmodified positive texts.
        recall: Recall on the attacked positive texts.
        false_alarms_before: False alarms on the unmodified benign texts.
        false_alarms: False alarms on the benign texts, attacked in the same way.
        skipped: Number of texts that could not be attacked, by reason; no rate includes them.
        queries: For the search, the number of scored texts for each positive text that passed;
            None for other attacks.
    """

    attack: str
    recall_before: Rate
    recall: Rate
    false_alarms_before: Rate
    false_alarms: Rate
    skipped: Mapping[str, int]
    queries: tuple[int, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        rates = {
            name: rate.to_dict() for name, rate in vars(self).items() if isinstance(rate, Rate)
        }
        difference = self.recall.minus(self.false_alarms)
        return {**vars(self), **rates, "recall_minus_false_alarms": difference}

    def cells(self) -> tuple[str, ...]:
        """Return the row of the table."""
        difference = self.recall.minus(self.false_alarms)
        return (
            self.attack,
            f"{self.recall.texts} + {self.false_alarms.texts}",
            _change(self.recall_before, self.recall),
            _change(self.false_alarms_before, self.false_alarms),
            "-" if difference is None else f"{difference:.3f}",
        )

    def notes(self) -> Iterator[str]:
        """Report the skipped texts and the number of queries of the search."""
        for reason, count in self.skipped.items():
            yield f"{self.attack}: left out {count} texts ({reason})."
        if self.queries:
            yield (
                f"{self.attack}: {len(self.queries)} of {self.recall_before.flagged} flagged texts "
                f"passed after {min(self.queries)} to {max(self.queries)} scored texts each, "
                f"{median(self.queries):g} in the median."
            )
        elif self.queries is not None:
            yield f"{self.attack}: no flagged text passed."


def _change(before: Rate, attacked: Rate) -> str:
    return "-" if before.share is None else f"{before.share:.3f} → {attacked.estimate}"


def evasion_table(title: str, results: Sequence[AttackResult]) -> str:
    """Format the results as a Markdown table with notes below."""
    head = ("attack", "texts", "recall", "false alarms", "difference")
    align = ("left", *["right"] * (len(head) - 1))
    rows = [result.cells() for result in results]
    table = tabulate(rows, head, "pipe", disable_numparse=True, colalign=align)
    notes = "".join(f"- {note}\n" for result in results for note in result.notes())
    return f"{title}\n\n{table}\n" + (f"\n{notes}" if notes else "")


@dataclass(frozen=True)
class Subject:
    """A text to attack.

    Attributes:
        example: Unmodified example; the attack rewrites its last message.
        is_positive: Whether the text should be flagged.
        benign: Benign texts, as in ``Surroundings.benign``.
        seed: Seed of the attacks, combined with each attack's name.
    """

    example: Example
    is_positive: bool
    benign: Sequence[str]
    seed: str

    @property
    def messages(self) -> Messages:
        return tuple(self.example.messages)

    @property
    def text(self) -> str:
        return self.messages[-1].content

    def attacked(self, by: Attack, markup: Markup) -> list[Messages]:
        around = Surroundings(self.benign, markup, Random(f"{self.seed} {by.name}"))
        rewritten = by.rewrite(self.text, around)
        return [(*self.messages[:-1], *conversation) for conversation in rewritten]


def draw_subjects(
    examples: LabelledExamples, thresholds: Mapping[str, float], *, texts: int, seed: int
) -> list[Subject]:
    """Draw positive texts, then benign ones, each with benign texts for its surroundings.

    Raises:
        SidelightError: There is no positive text, or there are fewer than two benign ones.
    """
    positive = positive_texts(examples, thresholds)
    benign = np.flatnonzero(~positive).tolist()
    by_key = {examples.items[row].text_key: examples.items[row].text for row in benign}
    if not positive.any() or len(by_key) < 2:
        raise SidelightError(
            f"Got {positive.sum()} texts with {' or '.join(thresholds)} and {len(by_key)} "
            "distinct texts without; at least 1 and 2 are needed. Add texts of both kinds to "
            "--data."
        )
    random = Random(seed)
    subjects: list[Subject] = []
    for rows in (np.flatnonzero(positive).tolist(), benign):
        for row in random.sample(rows, min(texts, len(rows))):
            example = examples.items[row]
            around = [text for key, text in by_key.items() if key != example.text_key]
            random.shuffle(around)
            subjects.append(Subject(example, bool(positive[row]), around, f"{seed} {row}"))
    return subjects


def positive_texts(
    examples: LabelledExamples, thresholds: Mapping[str, float]
) -> Bool[Flags, " text"]:
    flagged = [examples.task.labels.index(label) for label in thresholds]
    if examples.task.kind == "multilabel":
        return np.any(examples.labels[:, flagged], axis=1)
    return np.isin(examples.labels, flagged)


def measure(
    target: Target,
    examples: LabelledExamples,
    *,
    attacks: Sequence[str],
    texts: int = 50,
    seed: int = 0,
    budget: int = 50,
) -> list[AttackResult]:
    """Attack positive and benign texts alike.

    Args:
        target: A probe that reads prompts, or a route of a live server.
        examples: Texts that were not used in training.
        attacks: Names of attacks, as returned by ``attack_names``.
        texts: Maximum number of texts to attack from each class (positive and benign).
        seed: Seed of the drawn texts and of the attacks.
        budget: Maximum number of texts that the search scores for each positive text.

    Raises:
        ContextLengthError: An unmodified text is too long.
        SidelightError: There is no positive text, or there are fewer than two benign ones.
    """
    subjects = draw_subjects(examples, target.thresholds, texts=texts, seed=seed)
    encode(target.backbone.encoder, [subject.example for subject in subjects])
    markup = Markup.of(target.backbone.encoder.tokenizer, target.backbone.encoder.prompt_format)
    results: list[AttackResult] = []
    with progress("Attacking", len(attacks), unit="attacks") as advance:
        before = target.margins([subject.messages for subject in subjects])
        for name in attacks:
            if name == SEARCH:
                results.append(_search(target, subjects, before, budget))
            else:
                rewrite = partial(Subject.attacked, by=ATTACKS[name], markup=markup)
                attacked, skipped = _score(target, subjects, rewrite)
                results.append(_attack_result(name, subjects, before, attacked, skipped))
            advance(1)
    return results


def _score(
    target: Target, subjects: Sequence[Subject], rewrite: Callable[[Subject], Sequence[Messages]]
) -> tuple[list[list[float]], Counter[str]]:
    """Score the conversations into which an attack rewrites each text.

    Returns the margins of each text without NaN, and the number of texts that cannot be attacked,
    by reason.
    """
    conversations: list[Sequence[Messages]] = []
    skipped = Counter[str]()
    for subject in subjects:
        try:
            rewritten = rewrite(subject)
            for conversation in rewritten:
                target.backbone.encoder.encode(conversation)
        except SidelightError as error:
            rewritten = ()
            skipped[_reason(target, error)] += 1
        conversations.append(rewritten)
    margins = iter(target.margins([each for variants in conversations for each in variants]))
    attacked = [[next(margins) for _ in variants] for variants in conversations]
    attacked = [[margin for margin in variants if not isnan(margin)] for variants in attacked]
    if refused := sum(not variants for variants in attacked) - skipped.total():
        skipped["the route takes no such text"] = refused
    return attacked, skipped


def _reason(target: Target, error: SidelightError) -> str:
    if isinstance(error, ContextLengthError):
        limit = target.backbone.encoder.max_tokens
        return f"longer than the model's context of {limit:,} tokens"
    # The first sentence is the reason; the remedy does not apply to the attacker.
    return str(error).partition(". ")[0]


def _attack_result(
    name: str,
    subjects: Sequence[Subject],
    margins_before: Sequence[float],
    attacked: Sequence[Sequence[float]],
    skipped: Mapping[str, int],
    queries: tuple[int, ...] | None = None,
) -> AttackResult:
    """Compute the rates; if an attack has several variants, the worst for the probe counts."""

    def rates(is_positive: bool) -> tuple[Rate, Rate]:
        worst = min if is_positive else max
        pairs = [
            (before, worst(after))
            for subject, before, after in zip(subjects, margins_before, attacked, strict=True)
            if subject.is_positive == is_positive and after
        ]
        return Rate.of([before for before, _ in pairs]), Rate.of([after for _, after in pairs])

    return AttackResult(name, *rates(True), *rates(False), skipped, queries)


def _search(
    target: Target, subjects: Sequence[Subject], margins_before: Sequence[float], budget: int
) -> AttackResult:
    """Run a hill-climbing search that keeps a benign sentence if it lowers the score.

    The benign texts are surrounded with the sentences that were found for positive texts.
    """
    margins: list[list[float]] = []
    surroundings: list[tuple[Sequence[str], Sequence[str]]] = []
    passed: list[int] = []
    positive = [pair for pair in zip(subjects, margins_before, strict=True) if pair[0].is_positive]
    with progress("Searching", len(positive), unit="texts") as advance:
        for subject, margin in positive:
            random, queries = Random(f"{subject.seed} {SEARCH}"), 0
            benign = (re.split(r"(?<=[.!?])\s+", text) for text in subject.benign)
            sentences = [sentence for text in benign for sentence in text if sentence]
            before, after = (), ()
            for _ in range(budget if margin >= 0 else 0):
                added = (random.choice(sentences),)
                is_first = random.random() < 0.5
                sides = (added + before, after) if is_first else (before, after + added)
                longer = _surrounded(subject, *sides)
                if target.reads(longer):
                    queries += 1
                    (score,) = target.margins([longer])
                    if score < margin:
                        margin, (before, after) = score, sides
                if margin < 0:
                    passed.append(queries)
                    break
            margins.append([margin])
            surroundings.append((before, after))
            advance(1)
    benign = [subject for subject in subjects if not subject.is_positive]
    sides_of = {
        subject.seed: sides for subject, sides in zip(benign, cycle(surroundings), strict=False)
    }
    copied, skipped = _score(
        target, benign, lambda subject: [_surrounded(subject, *sides_of[subject.seed])]
    )
    # Positive subjects come first.
    return _attack_result(
        SEARCH, subjects, margins_before, margins + copied, skipped, tuple(passed)
    )


def _surrounded(subject: Subject, before: Sequence[str], after: Sequence[str]) -> Messages:
    return (*subject.messages[:-1], Message("user", " ".join((*before, subject.text, *after))))
