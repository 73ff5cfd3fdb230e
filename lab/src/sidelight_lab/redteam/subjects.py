"""What is attacked, as its attacker sees it, and labelled texts of both kinds."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from jaxtyping import Bool

from sidelight.backbone import TransformersBackbone, UnloadedBackbone
from sidelight.data.examples import Example, LabelledExamples
from sidelight.errors import SidelightError
from sidelight.policy.rules import BoundRule, Rule, require_rule_applies
from sidelight.probe import Probe
from sidelight.progress import Progress
from sidelight.prompts import Message
from sidelight.training.classifier import judge
from sidelight.types import Flags
from sidelight_lab.redteam.attacks import Attack, Markup, Messages, Surroundings


def flagging_thresholds(
    probe: Probe, *, labels: Sequence[str] = (), threshold: float | None = None
) -> Mapping[str, float]:
    """The probability from which each label flags a text, as in a rule of a policy.

    Raises:
        SidelightError: The probe reads responses, or nothing would be flagged.
    """
    if probe.reads.includes_response:
        raise SidelightError(
            f"Probe '{probe.name}' reads responses, which the model writes, but the attacks "
            "rewrite what a client sends. Name a probe of prompts."
        )
    if probe.task.kind == "multiclass" and not (labels and threshold is not None):
        raise SidelightError(
            f"Probe '{probe.name}' is multi-class, so it flags no label by default. Say what "
            "counts with --flag LABEL --threshold PROBABILITY, as a policy would."
        )
    bound = BoundRule(probe, Rule("flag", threshold=threshold, labels=tuple(labels)))
    require_rule_applies(bound, [probe])
    return bound.thresholds


@dataclass(frozen=True)
class Target(ABC):
    """What is attacked, as its attacker sees it.

    Attributes:
        backbone: Its tokenizer and template.
        thresholds: As ``flagging_thresholds`` gives them.
    """

    backbone: TransformersBackbone | UnloadedBackbone
    thresholds: Mapping[str, float]

    def tokens(self, conversation: Sequence[Message]) -> int:
        """The length of a conversation.

        Raises:
            ContextLengthError: It is longer than the backbone reads.
            SidelightError: It cannot be rendered.
        """
        return len(self.backbone.encoder.encode(conversation))

    def fits(self, conversation: Sequence[Message]) -> bool:
        """Whether the backbone can read it."""
        try:
            return self.tokens(conversation) > 0
        except SidelightError:
            return False

    @abstractmethod
    def margins(self, conversations: Sequence[Messages], shown: Progress) -> list[float]:
        """How far each is above its threshold: flagged from 0 on. NaN: it cannot be sent."""


@dataclass(frozen=True)
class ProbeTarget(Target):
    """A probe, which judges whole conversations."""

    probe: Probe
    backbone: TransformersBackbone

    def margins(self, conversations: Sequence[Messages], shown: Progress) -> list[float]:
        examples = [Example(conversation) for conversation in conversations]
        (logits,) = judge(self.backbone, [self.probe], examples, shown)
        said = [self.probe.verdict(own).probabilities for own in logits]
        return [max(p[label] - least for label, least in self.thresholds.items()) for p in said]


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
    """Draws positive texts, then benign ones, each with the benign texts that may stand around it.

    Raises:
        SidelightError: There is no positive text, or there are fewer than two benign ones.
    """
    positive = positive_texts(examples, thresholds)
    benign = np.flatnonzero(~positive).tolist()
    by_key = {examples.items[row].text_key: examples.items[row].text for row in benign}
    if not positive.any() or len(by_key) < 2:
        raise SidelightError(
            f"Got {positive.sum()} texts with {' or '.join(thresholds)} and {len(by_key)} distinct "
            "ones without; wanted at least 1 and 2. Add texts of both kinds to --data."
        )
    random = Random(seed)
    subjects: list[Subject] = []
    for rows in (np.flatnonzero(positive).tolist(), benign):
        for row in random.sample(rows, min(texts, len(rows))):
            own = examples.items[row]
            around = [text for key, text in by_key.items() if key != own.text_key]
            random.shuffle(around)
            subjects.append(Subject(own, bool(positive[row]), around, f"{seed} {row}"))
    return subjects


def positive_texts(
    examples: LabelledExamples, thresholds: Mapping[str, float]
) -> Bool[Flags, " text"]:
    flagged = [examples.task.labels.index(label) for label in thresholds]
    if examples.task.kind == "multilabel":
        return np.any(examples.labels[:, flagged], axis=1)
    return np.isin(examples.labels, flagged)
