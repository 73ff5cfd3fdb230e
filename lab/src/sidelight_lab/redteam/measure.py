"""Carries attacks out on labelled texts, and counts what the probe still flags."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from math import isnan
from random import Random
from typing import Any

import numpy as np

from sidelight.data.examples import LabelledExamples
from sidelight.errors import ContextLengthError, SidelightError
from sidelight.metrics import wilson
from sidelight.progress import Progress, progress
from sidelight.prompts import Message
from sidelight.training.classifier import encode
from sidelight_lab.redteam.attacks import ATTACKS, SEARCH, Markup, Messages
from sidelight_lab.redteam.subjects import Subject, Target, draw_subjects

# The search asks about texts that grow: as a rule, to this many times their length.
_GROWTH = 2


@dataclass(frozen=True)
class Rate:
    """How many of some texts are flagged."""

    flagged: int
    texts: int

    @property
    def share(self) -> float | None:
        """None if there are no texts."""
        return self.flagged / self.texts if self.texts else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval of the share."""
        if self.share is None:
            return None
        low, high = wilson(np.array([self.share]), np.array([self.texts]))[:, 0].tolist()
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "value": self.share,
            "ci": self.interval,
            "flagged": self.flagged,
            "texts": self.texts,
        }


@dataclass(frozen=True)
class Outcome:
    """What a probe flags of the same texts, alone and under an attack.

    Attributes:
        attack: Its name.
        recall_alone: Of the positive texts as they are.
        recall: Of the attacked positive texts.
        alarms_alone: False alarms on the benign texts as they are.
        alarms: False alarms on the benign texts, attacked in the same way.
        skipped: How many texts could not be attacked, by the reason; no rate counts them.
        queries: Of the search: how many scored texts it took for each positive that passed; None
            for other attacks.
    """

    attack: str
    recall_alone: Rate
    recall: Rate
    alarms_alone: Rate
    alarms: Rate
    skipped: Mapping[str, int]
    queries: tuple[int, ...] | None = None

    @property
    def separation(self) -> float | None:
        """Recall minus false alarms under the attack; None if a side has no texts."""
        if self.recall.share is None or self.alarms.share is None:
            return None
        return self.recall.share - self.alarms.share


def measure(
    target: Target,
    examples: LabelledExamples,
    *,
    attacks: Sequence[str],
    texts: int = 50,
    seed: int = 0,
    budget: int = 50,
) -> list[Outcome]:
    """Attacks positive and benign texts alike.

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
    backbone = target.backbone
    markup = Markup.of(backbone.tokenizer, backbone.encoder.prompt_format)
    plans = {
        name: _Plan.of(target, subjects, partial(Subject.attacked, by=ATTACKS[name], markup=markup))
        for name in attacks
        if name != SEARCH
    }
    lengths = [len(own) for own in encode(backbone, [subject.example for subject in subjects])]
    positive = sum(n for n, subject in zip(lengths, subjects, strict=True) if subject.is_positive)
    searched = _GROWTH * (budget + 1) * positive if SEARCH in attacks else 0
    total = sum(lengths) + sum(plan.tokens for plan in plans.values()) + searched
    with progress("Attacking", total, unit="tokens") as shown:
        alone = target.margins([subject.messages for subject in subjects], shown)
        outcomes = [
            _outcome(name, subjects, alone, plan.margins(target, shown), plan.skipped)
            for name, plan in plans.items()
        ]
        if SEARCH in attacks:

            def advance(part: float) -> None:
                shown.advance(part * searched)

            outcomes.append(_search(target, subjects, alone, budget, advance))
    return outcomes


@dataclass(frozen=True)
class _Plan:
    """The conversations that an attack makes of each text.

    Attributes:
        conversations: None for a text that cannot be attacked.
        tokens: Of all conversations.
        skipped: How many texts cannot be attacked, by the reason.
    """

    conversations: Sequence[Sequence[Messages] | None]
    tokens: int
    skipped: Mapping[str, int]

    @staticmethod
    def of(
        target: Target,
        subjects: Sequence[Subject],
        rewrite: Callable[[Subject], Sequence[Messages]],
    ) -> "_Plan":
        made: list[Sequence[Messages] | None] = []
        tokens, skipped = 0, Counter[str]()
        for subject in subjects:
            try:
                conversations = rewrite(subject)
                tokens += sum(map(target.tokens, conversations))
                made.append(conversations)
            except SidelightError as error:
                made.append(None)
                skipped[_reason(target, error)] += 1
        return _Plan(made, tokens, skipped)

    def margins(self, target: Target, shown: Progress) -> list[Sequence[float] | None]:
        """Of each text's conversations."""
        flat = [each for own in self.conversations for each in own or ()]
        margins = iter(target.margins(flat, shown))
        found = [[next(margins) for _ in own or ()] for own in self.conversations]
        return [[m for m in own if not isnan(m)] or None for own in found]


def _reason(target: Target, error: SidelightError) -> str:
    if isinstance(error, ContextLengthError):
        limit = target.backbone.encoder.max_tokens
        return f"longer than the model's context of {limit:,} tokens"
    # The first sentence says why; the remedy is not the attacker's.
    return str(error).partition(". ")[0]


def _outcome(
    name: str,
    subjects: Sequence[Subject],
    alone: Sequence[float],
    attacked: Sequence[Sequence[float] | None],
    skipped: Mapping[str, int],
    queries: tuple[int, ...] | None = None,
) -> Outcome:
    """Of several conversations that carry an attack out, the worst for the probe counts."""
    if untaken := sum(own is None for own in attacked) - sum(skipped.values()):
        skipped = {**skipped, "the route takes no such text": untaken}

    def rates(is_positive: bool) -> tuple[Rate, Rate]:
        worst = min if is_positive else max
        pairs = [
            (before >= 0, worst(after) >= 0)
            for subject, before, after in zip(subjects, alone, attacked, strict=True)
            if subject.is_positive == is_positive and after is not None
        ]
        before, after = (sum(flagged) for flagged in zip(*pairs, strict=True)) if pairs else (0, 0)
        return Rate(before, len(pairs)), Rate(after, len(pairs))

    (recall_alone, recall), (alarms_alone, alarms) = rates(True), rates(False)
    return Outcome(name, recall_alone, recall, alarms_alone, alarms, skipped, queries)


@dataclass
class _Walk:
    """A positive text on its way below its threshold.

    Attributes:
        sentences: What it may add, on either side of the text.
        queries: Texts that were scored for it.
    """

    subject: Subject
    margin: float
    sentences: Sequence[str]
    random: Random
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    queries: int = 0

    def step(self) -> "_Walk":
        """With one sentence more."""
        sentence = self.random.choice(self.sentences)
        if self.random.random() < 0.5:
            return replace(self, before=(sentence, *self.before))
        return replace(self, after=(*self.after, sentence))

    def around(self, subject: Subject) -> Messages:
        """Its sentences around a text."""
        text = " ".join((*self.before, subject.text, *self.after))
        return (*subject.messages[:-1], Message("user", text))


def _search(
    target: Target,
    subjects: Sequence[Subject],
    alone: Sequence[float],
    budget: int,
    advance: Callable[[float], object],
) -> Outcome:
    """Hill-climbing: a sentence of the benign texts stays if it lowers the score.

    Benign texts get the sentences that were found for positive ones.

    Args:
        advance: Receives the share of the work that was done.
    """
    silent = Progress(lambda _: None)
    benign = [subject for subject in subjects if not subject.is_positive]
    walks = [
        _Walk(subject, margin, _sentences(subject.benign), Random(f"{subject.seed} {SEARCH}"))
        for subject, margin in zip(subjects, alone, strict=True)
        if subject.is_positive
    ]
    for _ in range(budget):
        steps = [(walk, walk.step()) for walk in walks if walk.margin >= 0]
        asked = [(walk, step) for walk, step in steps if target.fits(step.around(step.subject))]
        margins = target.margins([step.around(step.subject) for _, step in asked], silent)
        for (walk, step), margin in zip(asked, margins, strict=True):
            walk.queries += 1
            if margin < walk.margin:
                walk.margin, walk.before, walk.after = margin, step.before, step.after
        advance(1 / (budget + 1))
    partners = {subject.seed: walk for walk, subject in zip(cycle(walks), benign)}
    copied = _Plan.of(target, benign, lambda subject: [partners[subject.seed].around(subject)])
    # In the order of the subjects: the positive ones come first.
    attacked = [[walk.margin] for walk in walks] + copied.margins(target, silent)
    advance(1 / (budget + 1))
    passed = tuple(walk.queries for walk in walks if walk.margin < 0 and walk.queries)
    return _outcome(SEARCH, subjects, alone, attacked, copied.skipped, passed)


def _sentences(texts: Sequence[str]) -> list[str]:
    return [piece for text in texts for piece in re.split(r"(?<=[.!?])\s+", text) if piece]
