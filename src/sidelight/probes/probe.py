"""A trained probe: a mechanism, and everything that turns its logits into a verdict."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from sidelight.data.spans import SpanRule
from sidelight.errors import SidelightError, VerdictError
from sidelight.models.conversation import PromptFormat, PromptTokens, Reads, Segment
from sidelight.probes.card import ProbeCard
from sidelight.probes.mechanisms.base import Mechanism
from sidelight.probes.standardisation import Projection, Standardisation
from sidelight.statistics.calibration import Calibration
from sidelight.types import Span, Task, TokenLabel, Verdict


@dataclass(frozen=True)
class ProbeOutput:
    """A probe's logits of a text: for each label, the highest over the classified segments.

    Attributes:
        logits: The highest logit of each label over the classified segments.
        turn: As ``Verdict.turn``.
        tokens: The logits of each token that the probe reads, if it labels spans.
    """

    logits: Float[np.ndarray, " output"]
    turn: int | None = None
    tokens: Float[np.ndarray, "token output"] | None = None


@dataclass(frozen=True, eq=False)
class Probe:
    """A trained probe: created by training, stored as an artifact, and served in a bank.

    Attributes:
        card: Everything but the tensors.
        mechanism: The trained mechanism.
        standardisation: Mean and scale for standardising hidden states.
    """

    card: ProbeCard
    mechanism: Mechanism
    standardisation: Standardisation

    @property
    def name(self) -> str:
        """Its name in verdicts."""
        return self.card.name

    @property
    def version(self) -> str:
        """Twelve hexadecimal digits of the artifact that it was loaded from, or ""."""
        return self.card.version

    @property
    def task(self) -> Task:
        """The classes."""
        return self.card.task

    @property
    def reads(self) -> Reads:
        """The tokens that it reads."""
        return self.card.reads

    @property
    def calibration(self) -> Calibration:
        """The map from logits to probabilities."""
        return self.card.calibration

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The lowest probability at which each label holds, as in the card."""
        return self.card.thresholds

    @property
    def spans(self) -> SpanRule | None:
        """How tokens are labelled; None for a probe of whole texts."""
        return self.card.spans

    @property
    def span_rule(self) -> SpanRule:
        """``spans`` of a probe that labels spans."""
        assert self.spans is not None, "only probes of spans are asked for them"
        return self.spans

    def changed(self, **fields: Any) -> "Probe":
        """A copy of the probe with these card fields replaced, not yet saved."""
        return replace(self, card=self.card.changed(**fields))

    @cached_property
    def background_scores(self) -> Float[np.ndarray, "conversation output"]:
        """Probabilities of the background conversations of training; each column falls."""
        logits = self.card.background.logits
        return -np.sort(-self.calibration.apply(logits), axis=0)

    def share_threshold(self, label: str, share: float) -> float:
        """The probability that this share of the background conversations reaches.

        Args:
            label: The label.
            share: From 0 to 1; the probe has background conversations.
        """
        scores = self.background_scores
        exceeding = min(int(share * len(scores)), len(scores) - 1)
        output = self.task.output_labels.index(label)
        return math.nextafter(float(scores[exceeding, output]), 1.0)

    def projection(self) -> Projection:
        """The map from hidden states to the few features that the probe needs of each."""
        projections = self.mechanism.projections()
        return self.standardisation.to(projections.device).fold(projections)

    def verdict(self, logits: np.ndarray, *, turn: int | None = None) -> Verdict:
        """The verdict on one text, at the probe's own thresholds; a rule may have others.

        Args:
            logits: ``[output]``.
            turn: The turn that decided, as ``Verdict.turn``.

        Raises:
            VerdictError: A logit is not finite, so there is no verdict, not even a negative one.
        """
        self.require_finite(logits)
        probabilities = self.task.label_probabilities(self.calibration.apply(logits[None]))
        by_label = dict(zip(self.task.labels, probabilities[0].tolist(), strict=True))
        return self.task.decide(
            self.name, by_label, self.card.label_thresholds, turn=turn, version=self.version
        )

    def labelled_verdict(
        self, verdict: Verdict, spans: Sequence[Span] | None, annotated: Iterable[str] = ()
    ) -> Verdict:
        """The verdict with its labelled spans; the labels of these spans also hold.

        Args:
            verdict: The verdict on the text from its probabilities.
            spans: Spans of the text; None if the positions of its tokens are unknown.
            annotated: The labels of its tokens, which hold in that case.
        """
        scores, thresholds = verdict.probabilities, self.card.label_thresholds
        return self.task.decide(
            self.name,
            scores,
            thresholds,
            spans,
            annotated,
            turn=verdict.turn,
            version=verdict.version,
        )

    def token_labels(self, text: ProbeOutput) -> list[TokenLabel]:
        """Which tokens have a label; none unless the probe labels spans."""
        if self.spans is None or text.tokens is None:
            return []
        return self.spans.token_labels(text.tokens, self.task.output_labels)

    def can_classify(self, prompt: PromptTokens) -> bool:
        """Whether the probe was trained on such prompts; a probe of chats fails on plain text."""
        return not (prompt.is_plain and self.card.prompt_format == "chat")

    @property
    def uses_template(self) -> bool:
        """Whether chats are rendered with the model's chat template, as in training."""
        return self.card.prompt_format != "raw"

    @property
    def classifies_turns(self) -> bool:
        """Whether each turn of a prompt is classified; multi-class probes read only the whole."""
        return self.reads.scope == "each_turn" and bool(self.task.flaggable)

    def highest(
        self,
        logits: Float[np.ndarray, "segment output"],
        segments: Sequence[Segment],
        text_output: ProbeOutput,
    ) -> ProbeOutput:
        """The highest logit of each label over the segments of a prompt and the whole prompt.

        If the probe does not classify turns, only the whole prompt counts. A single logit that is
        not finite makes all of them so, and no turn goes unclassified.

        Args:
            logits: Logits of each segment.
            segments: Description of each segment.
            text_output: Output of the whole prompt.
        """
        if not self.classifies_turns:
            return text_output
        every = np.vstack([logits, text_output.logits])
        if not np.isfinite(every).all():
            return replace(text_output, logits=np.full_like(text_output.logits, np.nan))
        segment = int(every.max(1).argmax())
        turn = segments[segment].turn if segment < len(segments) else None
        return replace(text_output, logits=every.max(0), turn=turn)

    def require_finite(self, logits: np.ndarray) -> None:
        """Check that a text's logits, ``[output]``, are finite.

        Raises:
            VerdictError: One is not finite.
        """
        if not np.isfinite(logits).all():
            raise VerdictError(
                f"Probe '{self.name}' gave a logit that is not finite. Either the text has no "
                "token that the probe reads, or the backbone overflowed in its dtype."
            )


def common_format(probes: Iterable[Probe]) -> PromptFormat | None:
    """How chats are rendered for probes that are served together; None if there are none.

    Raises:
        SidelightError: Some were trained on chats, others on raw texts.
    """
    names: dict[PromptFormat, str] = {
        "chat" if probe.uses_template else "raw": probe.name for probe in probes
    }
    if len(names) > 1:
        raise SidelightError(
            f"Probes of chats, such as '{names['chat']}', and of raw texts, such as "
            f"'{names['raw']}', cannot be served together. Start a server for each kind."
        )
    return next(iter(names), None)
