"""A trained probe: a mechanism and everything that turns its logits into a verdict."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from sidelight.data.spans import SpanRule
from sidelight.errors import SidelightError, VerdictError
from sidelight.models.conversation import PromptFormat, Reads, Unit
from sidelight.models.fingerprint import Fingerprint
from sidelight.probes.manifest import History
from sidelight.probes.mechanisms.base import Mechanism
from sidelight.probes.standardisation import Projection, Standardisation
from sidelight.statistics.calibration import Calibration
from sidelight.types import MechanismSpec, Span, Task, TokenLabel, Verdict


@dataclass(frozen=True)
class ProbeOutput:
    """A probe's logits of a text: of each label those of the unit where they are highest.

    Attributes:
        logits: The highest of each label, over the units that are judged.
        turn: As ``Verdict.turn``.
        tokens: The logits of each token that the probe reads, if it labels spans.
    """

    logits: Float[np.ndarray, " output"]
    turn: int | None = None
    tokens: Float[np.ndarray, "token output"] | None = None


@dataclass(frozen=True)
class Probe:
    """A trained probe: training makes it, an artifact stores it, and a bank serves it.

    Attributes:
        name: Its name in verdicts.
        task: The classes.
        reads: The tokens that it reads.
        prompt_format: How texts are rendered for it. A probe of ``both`` judges chats, and plain
            text as it is; on plain text, a probe of ``chat`` fails.
        spec: Name and options of the mechanism.
        mechanism: The trained mechanism.
        standardisation: Mean and scale that hidden states are standardised by.
        calibration: From logits to probabilities.
        thresholds: The probability from which a label holds: one for a binary task, one per label
            for a multi-label task, none for a multi-class task.
        fingerprint: The backbone that it belongs to.
        record: Settings, data and metrics of its training, as JSON values; ``history`` reads it.
        version: Twelve hexadecimal digits of the artifact that it was loaded from, or "".
        spans: How tokens are labelled; None for a probe of whole texts.
    """

    name: str
    task: Task
    reads: Reads
    prompt_format: PromptFormat
    spec: MechanismSpec
    mechanism: Mechanism
    standardisation: Standardisation
    calibration: Calibration
    thresholds: tuple[float, ...]
    fingerprint: Fingerprint
    record: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""
    spans: SpanRule | None = None

    @cached_property
    def history(self) -> History:
        """The record, as far as it is read."""
        return History.model_validate(self.record)

    def projection(self) -> Projection:
        """The map from hidden states to the few numbers that the probe needs of each of them."""
        columns = self.mechanism.columns()
        return self.standardisation.to(columns.device).fold(columns)

    def verdict(self, logits: np.ndarray, *, turn: int | None = None) -> Verdict:
        """The verdict on one text.

        Args:
            logits: ``[output]``.
            turn: The turn that decided, as ``Verdict.turn``.

        Raises:
            VerdictError: A logit is not finite. There is no verdict then, not even a harmless one.
        """
        self.require_finite(logits)
        probabilities = self.calibration.apply(logits[None])[0].tolist()
        if self.task.kind == "binary":
            (positive,) = probabilities
            probabilities = [1 - positive, positive]
        by_label = dict(zip(self.task.labels, probabilities, strict=True))
        return self.task.decide(
            self.name, by_label, self.label_thresholds, turn=turn, version=self.version
        )

    def labelled_verdict(
        self, verdict: Verdict, spans: Sequence[Span] | None, marked: Iterable[str] = ()
    ) -> Verdict:
        """The verdict with the words that are labelled, whose labels hold too.

        Args:
            verdict: On the text, by its probabilities.
            spans: Of the text; None: nobody knows where its tokens stand.
            marked: The labels of its tokens, which then hold.
        """
        scores, thresholds = verdict.probabilities, self.label_thresholds
        return self.task.decide(
            self.name,
            scores,
            thresholds,
            spans,
            marked,
            turn=verdict.turn,
            version=verdict.version,
        )

    def token_labels(self, text: ProbeOutput) -> list[TokenLabel]:
        """Which tokens have a label; none unless the probe labels spans."""
        if self.spans is None or text.tokens is None:
            return []
        return self.spans.token_labels(text.tokens, self.task.output_labels)

    def can_judge(self, *, is_plain: bool) -> bool:
        """Whether it judges plain text, or chats: a probe of chats alone fails on plain text."""
        return not (is_plain and self.prompt_format == "chat")

    @property
    def judges_turns(self) -> bool:
        """Whether each turn of a prompt is judged; several classes say nothing of a part."""
        return self.reads.scope == "each_turn" and self.task.kind != "multiclass"

    def highest(
        self,
        logits: Float[np.ndarray, "unit output"],
        units: Sequence[Unit],
        whole: ProbeOutput,
    ) -> ProbeOutput:
        """The highest logit of each label, of the units of a prompt and of the whole.

        If the probe does not judge turns, the whole counts. One logit that is not finite makes all
        so: no turn goes unjudged.

        Args:
            logits: Of each unit.
            units: What each of them is.
            whole: Of the whole prompt.
        """
        if not self.judges_turns:
            return whole
        every = np.vstack([logits, whole.logits])
        if not np.isfinite(every).all():
            return replace(whole, logits=np.full_like(whole.logits, np.nan))
        unit = int(every.max(1).argmax())
        turn = units[unit].turn if unit < len(units) else None
        return replace(whole, logits=every.max(0), turn=turn)

    @property
    def label_thresholds(self) -> dict[str, float]:
        """``thresholds`` by label; empty for a multi-class task."""
        counted = self.task.labels[-len(self.thresholds) :] if self.thresholds else ()
        return dict(zip(counted, self.thresholds, strict=True))

    def require_finite(self, logits: np.ndarray) -> None:
        """Checks that a text's logits, ``[output]``, can be judged.

        Raises:
            VerdictError: One is not finite.
        """
        if not np.isfinite(logits).all():
            raise VerdictError(
                f"Probe '{self.name}' gave a logit that is not finite. Either the text has no "
                "token that the probe reads, or the backbone's arithmetic overflowed."
            )


def common_format(probes: Iterable[Probe]) -> PromptFormat | None:
    """How chats are rendered for probes that are served together; None if there are none.

    Raises:
        SidelightError: Some were trained on chats, others on raw texts.
    """
    by_format: dict[PromptFormat, str] = {
        "raw" if probe.prompt_format == "raw" else "chat": probe.name for probe in probes
    }
    if len(by_format) > 1:
        raise SidelightError(
            f"Probes of chats, such as '{by_format['chat']}', and of raw texts, such as "
            f"'{by_format['raw']}', cannot be served together. Start a server for each kind."
        )
    return next(iter(by_format), None)
