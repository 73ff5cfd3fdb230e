"""Carries attacks out on labelled texts, and counts what is still flagged."""

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
    """How many of some texts are flagged.

    Attributes:
        left_out: Texts that could not be judged; ``texts`` does not count them.
    """

    flagged: int
    texts: int
    left_out: int = 0

    @staticmethod
    def of(margins: Sequence[float]) -> "Rate":
        """From the margins of ``Target.margins``."""
        unknown = sum(map(isnan, margins))
        return Rate(sum(margin >= 0 for margin in margins), len(margins) - unknown, unknown)

    @property
    def share(self) -> float | None:
        """None if there are no texts."""
        return self.flagged / self.texts if self.texts else None

    @property
    def estimate(self) -> Estimate:
        """The share with Wilson's 95 % interval."""
        if not self.texts:
            return Estimate(None, None, None)
        return Estimate(self.share, 0.0, 1.0).as_share(self.texts)

    def minus(self, alarms: "Rate") -> float | None:
        """What is left of a recall without the false alarms; None if either has no texts."""
        if self.share is None or alarms.share is None:
            return None
        return self.share - alarms.share

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**self.estimate.to_dict(), **vars(self)}


@dataclass(frozen=True)
class AttackResult:
    """The texts that a probe flags, alone and under an attack.

    Attributes:
        attack: Its name.
        recall_before: Of the positive texts as they are.
        recall: Of the attacked positive texts.
        false_alarms_before: False alarms on the benign texts as they are.
        false_alarms: False alarms on the benign texts, attacked in the same way.
        skipped: How many texts could not be attacked, by the reason; no rate counts them.
        queries: Of the search: how many scored texts it took for each positive that passed; None
            for other attacks.
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
        """A row of the table."""
        difference = self.recall.minus(self.false_alarms)
        return (
            self.attack,
            f"{self.recall.texts} + {self.false_alarms.texts}",
            _change(self.recall_before, self.recall),
            _change(self.false_alarms_before, self.false_alarms),
            "-" if difference is None else f"{difference:.3f}",
        )

    def notes(self) -> Iterator[str]:
        """What was left out, and what the search took."""
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
    """The outcomes as Markdown, with notes below."""
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
        example: As it was read; its last message is what is attacked.
        is_positive: Whether it should be flagged.
        benign: As ``Surroundings.benign``.
        seed: Decides, with an attack's name, what is drawn.
    """

    example: Example
    is_positive: bool
    benign: Sequence[str]
    seed: str

    @property
    def messages(self) -> Messages:
        return self.example.messages

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
    """Draw positive texts, then benign ones, each with the benign texts that may stand around it.

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
        target: A probe of prompts, or what stands before a model.
        examples: Texts that training has not seen.
        attacks: Names of attacks, as ``attack_names`` gives them.
        texts: The most positive texts, and the most benign ones.
        seed: Draws them, and what the attacks draw.
        budget: How many texts the search may have scored for each positive.

    Raises:
        ContextLengthError: A text is too long as it is.
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
    """The margins of the conversations that an attack makes of each text; none that is NaN.

    Also how many texts cannot be attacked, by the reason.
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
    # The first sentence says why; the remedy is not the attacker's.
    return str(error).partition(". ")[0]


def _attack_result(
    name: str,
    subjects: Sequence[Subject],
    margins_before: Sequence[float],
    attacked: Sequence[Sequence[float]],
    skipped: Mapping[str, int],
    queries: tuple[int, ...] | None = None,
) -> AttackResult:
    """Of several conversations that carry an attack out, the worst for the probe counts."""

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
    """Hill-climbing: a sentence of the benign texts stays if it lowers the score.

    Benign texts get the sentences that were found for positive ones.
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
    # In the order of the subjects: the positive ones come first.
    return _attack_result(
        SEARCH, subjects, margins_before, margins + copied, skipped, tuple(passed)
    )


def _surrounded(subject: Subject, before: Sequence[str], after: Sequence[str]) -> Messages:
    return (*subject.messages[:-1], Message("user", " ".join((*before, subject.text, *after))))
