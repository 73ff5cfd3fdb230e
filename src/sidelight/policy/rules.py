"""When a score that runs along with a response counts: the rule against flicker.

A running score is the probe's probability after each token of the response. A single token over
the threshold is often noise, so the rule wants several in a row. The server cuts text by it, and
`sidelight bench streaming` measures it. Knows scores, not probes or text.

What an operator lets follow from verdicts: one rule per probe and side. Knows no requests.

A loaded probe with the rule that holds for it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float

from sidelight.errors import SidelightError, VerdictError, did_you_mean
from sidelight.probe import Probe
from sidelight.types import Verdict


@dataclass(frozen=True)
class Watched:
    """What a rule remembers of one response.

    Attributes:
        tokens: Scores seen.
        streak: Scores at or over the threshold since the last one below it, after the warm-up.
        fired_at: Tokens seen when the rule first held; None while it has not. It stays.
    """

    tokens: int = 0
    streak: int = 0
    fired_at: int | None = None

    @property
    def has_fired(self) -> bool:
        """Whether the rule held at some token."""
        return self.fired_at is not None


@dataclass(frozen=True)
class StreamingRule:
    """Fires at the first token that ends a streak over the threshold.

    Holding back `consecutive` tokens of text keeps the whole streak from the reader.

    Attributes:
        threshold: Probability from which a token counts, in [0, 1].
        consecutive: Tokens in a row that have to count, 1 or more.
        warm_up: First tokens of the response that never count.

    Raises:
        SidelightError: A value is out of its range.
    """

    threshold: float
    consecutive: int = 2
    warm_up: int = 0

    def __post_init__(self):
        if not 0 <= self.threshold <= 1 or self.consecutive < 1 or self.warm_up < 0:
            raise SidelightError(
                "A streaming rule needs a threshold from 0 to 1, one or more consecutive tokens "
                f"and a warm-up of 0 or more, got: {self}."
            )

    def advance(self, watched: Watched, score: float) -> Watched:
        """What is remembered after one more token.

        Args:
            watched: `Watched()` before the first token.
            score: The running probability with this token.

        Raises:
            VerdictError: The score is not finite. There is no verdict then, not even a harmless
                one: a blocking policy blocks.
        """
        if not math.isfinite(score):
            raise VerdictError(
                f"The running score of token {watched.tokens + 1} is not finite. Treat the text "
                "as not judged."
            )
        tokens = watched.tokens + 1
        counts = tokens > self.warm_up and score >= self.threshold
        streak = watched.streak + 1 if counts else 0
        fires = not watched.has_fired and streak >= self.consecutive
        return Watched(tokens, streak, tokens if fires else watched.fired_at)

    def first_firing(self, scores: Float[np.ndarray, " token"]) -> int | None:
        """Tokens seen when the rule first holds on a complete response; None: it never does.

        The same as `advance` over all scores, for measuring many rules on many responses.

        Raises:
            VerdictError: A score is not finite.
        """
        if not np.isfinite(scores).all():
            raise VerdictError("A running score is not finite. Treat the text as not judged.")
        if len(scores) < self.consecutive:
            return None
        counts = scores >= self.threshold
        counts[: self.warm_up] = False
        windows = np.lib.stride_tricks.sliding_window_view(counts, self.consecutive)
        starts = np.flatnonzero(windows.all(1))
        return int(starts[0]) + self.consecutive if len(starts) else None


Side = Literal["input", "output"]
Mode = Literal["score", "flag", "route", "block", "shadow"]
OnFailure = Literal["block", "pass"]
SystemTurns = Literal["trust", "refuse"]

# What a rule's routes call a verdict that could not be computed.
FAILED_LABEL = "verdict_failed"


@dataclass(frozen=True)
class Rule:
    """What follows from one probe's verdict.

    Attributes:
        mode: ``score``: nothing. ``flag``: a mark for the gateway. ``route``: a name for the
            gateway. ``block``: no answer, or no more of it. ``shadow``: counted, never shown.
        threshold: Probability from which a label counts; None: the artifact's own.
        labels: The labels that count; empty: the positive one, or all of a multi-label probe.
        on_failure: Whether a blocking rule blocks what could not be judged.
        max_tokens: Longest text that the probe may judge; a longer one is not judged. None: any.
        routes: Route by label; empty: a flagged label is its own route.
        shadow_of: The probe that a shadow is compared with.
        consecutive: Output: tokens in a row that have to count before the text is cut.
        warm_up: Output: first tokens that never count.
        hold_back: Output: tokens that a text is sent behind what has been judged; None:
            ``consecutive``, so that nothing of the streak that cuts the text was sent.
    """

    mode: Mode = "score"
    threshold: float | None = None
    labels: tuple[str, ...] = ()
    on_failure: OnFailure = "block"
    max_tokens: int | None = None
    routes: Mapping[str, str] = field(default_factory=dict)
    shadow_of: str | None = None
    consecutive: int = 2
    warm_up: int = 0
    hold_back: int | None = None

    @property
    def held_tokens(self) -> int:
        """Tokens that a text is sent behind what has been judged."""
        return self.consecutive if self.hold_back is None else self.hold_back


@dataclass(frozen=True)
class Policy:
    """The rules of one server. Probes without a rule are scored.

    Attributes:
        input: By name of a probe that reads the prompt.
        output: By name of a probe that reads the response.
        timeout_s: Seconds that a prompt's verdicts may take where a rule blocks; None: any.
        system_turns: Whether a conversation may begin with turns that no probe reads, the system's
            or a developer's; None: only where no rule blocks prompts.
    """

    input: Mapping[str, Rule] = field(default_factory=dict)
    output: Mapping[str, Rule] = field(default_factory=dict)
    timeout_s: float | None = None
    system_turns: SystemTurns | None = None

    @property
    def refuses_system_turns(self) -> bool:
        """Whether a conversation that begins with such a turn is refused."""
        if self.system_turns is None:
            return any(rule.mode == "block" for rule in self.input.values())
        return self.system_turns == "refuse"

    def require_side(self, name: str, side: Side) -> None:
        """Checks that no rule waits for a probe of this name on the other side.

        Raises:
            SidelightError: One does; it would no longer hold.
        """
        other: Side = "output" if side == "input" else "input"
        if name in self.side(other):
            raise SidelightError(
                f"The policy has a rule for probe '{name}' on the {other}, but this one judges the "
                f"{side}: the rule would no longer hold. Give it another name."
            )

    def side(self, side: Side) -> Mapping[str, Rule]:
        """The rules of one side."""
        return self.input if side == "input" else self.output


@dataclass(frozen=True)
class BoundRule:
    """One probe and its rule.

    Attributes:
        probe: The loaded probe.
        rule: What follows from its verdict.
        is_tightened: Whether a request wants a flag to block, whatever the rule's mode.
    """

    probe: Probe
    rule: Rule
    is_tightened: bool = False

    @property
    def name(self) -> str:
        """The probe's."""
        return self.probe.name

    @property
    def side(self) -> Side:
        """What is judged."""
        return side_of(self.probe)

    @property
    def mode(self) -> Mode:
        """The rule's."""
        return self.rule.mode

    @property
    def shadow_of(self) -> str | None:
        """The probe that a shadow is compared with."""
        return self.rule.shadow_of

    @property
    def is_blocking(self) -> bool:
        """Whether a flag ends the answer."""
        return self.is_tightened or self.mode == "block"

    @property
    def fails_closed(self) -> bool:
        """Whether a missing verdict ends the answer."""
        return self.is_blocking and self.rule.on_failure == "block"

    @property
    def is_shadow(self) -> bool:
        """Whether clients never hear of it."""
        return self.mode == "shadow"

    @property
    def thresholds(self) -> Mapping[str, float]:
        """Probability from which each label counts; labels that never count are absent.

        A multi-class probe names a class. Its labels count only where the rule names them, with a
        threshold.
        """
        threshold = self.rule.threshold
        if self.probe.task.kind == "multiclass":
            return {} if threshold is None else dict.fromkeys(self.rule.labels, threshold)
        return {
            label: own if threshold is None else threshold
            for label, own in self.probe.label_thresholds.items()
            if not self.rule.labels or label in self.rule.labels
        }

    def is_too_long(self, tokens: int) -> bool:
        """Whether a text is longer than the probe may judge."""
        return self.rule.max_tokens is not None and tokens > self.rule.max_tokens

    def decide(self, verdict: Verdict) -> Verdict:
        """The verdict at the rule's thresholds."""
        return self.probe.task.decide(self.name, verdict.probabilities, self.thresholds)

    def streaming_rules(self) -> dict[str, StreamingRule]:
        """When a running score of each label cuts the text."""
        rule = self.rule
        return {
            label: StreamingRule(threshold, rule.consecutive, rule.warm_up)
            for label, threshold in self.thresholds.items()
        }


def side_of(probe: Probe) -> Side:
    """What a probe judges: it is the response as soon as it reads some of it."""
    return "output" if probe.reads.includes_response else "input"


def bound_rules(policy: Policy, probes: Iterable[Probe]) -> tuple[BoundRule, ...]:
    """Each probe with its rule; rules whose probe is not among them wait for it."""
    return tuple(BoundRule(p, policy.side(side_of(p)).get(p.name, Rule())) for p in probes)


def require_fitting(policy: Policy, probes: Sequence[Probe]) -> None:
    """Checks that every rule has its probe, and can hold for it.

    Raises:
        SidelightError: A rule names no such probe, or something that the probe does not have.
    """
    sides: tuple[Side, ...] = ("input", "output")
    for side in sides:
        for name in policy.side(side):
            known = [probe.name for probe in probes if side_of(probe) == side]
            if name not in known:
                raise SidelightError(
                    f"The policy has a rule for the {side}, but no probe '{name}' judges it."
                    f"{did_you_mean(name, known)}"
                )
    for bound in bound_rules(policy, probes):
        require_fitting_probe(bound, probes)


def require_fitting_probe(bound: BoundRule, probes: Iterable[Probe]) -> None:
    """Checks that a rule can hold for its probe.

    Raises:
        SidelightError: It cannot, so it would never do what it says.
    """
    _require_known(bound, bound.rule.labels, bound.probe.task.labels)
    _require_known(bound, bound.rule.routes, (*bound.probe.task.labels, FAILED_LABEL))
    if bound.mode in ("flag", "block") and not bound.thresholds:
        raise SidelightError(
            f"Probe '{bound.name}' flags nothing as it is, so its rule '{bound.mode}' would "
            "never hold. Name the 'labels' that count and their 'threshold'."
        )
    if bound.mode == "route" and bound.side == "output":
        raise SidelightError(
            f"Probe '{bound.name}' judges the output: too late for a route. Use another mode."
        )
    if bound.shadow_of is not None:
        _require_rival(bound, bound.shadow_of, probes)


def _require_known(bound: BoundRule, labels: Iterable[str], known: Sequence[str]) -> None:
    for label in labels:
        if label not in known:
            raise SidelightError(
                f"The rule of probe '{bound.name}' names label '{label}', which it does not have."
                f"{did_you_mean(label, known)}"
            )


def _require_rival(bound: BoundRule, rival: str, probes: Iterable[Probe]) -> None:
    known = [p.name for p in probes if side_of(p) == bound.side and p.name != bound.name]
    if bound.mode != "shadow" or rival not in known:
        raise SidelightError(
            f"Probe '{bound.name}' cannot be the shadow of '{rival}': that takes the mode "
            f"'shadow' and a probe that judges the {bound.side}.{did_you_mean(rival, known)}"
        )
