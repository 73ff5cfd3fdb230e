"""The decision on one verdict."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from sidelight.errors import SidelightError
from sidelight.policy.rules import Action, BoundRule
from sidelight.types import Judgement, Span, Verdict

DecisionOutcome = Literal["flagged", "passed", "failed", "unfinished"]
Agreement = Literal["same", "different", "failed"]


@dataclass(frozen=True)
class Decision:
    """The action that followed one probe's verdict on one side of a request.

    Attributes:
        rule: The probe and its rule.
        verdict: At the rule's thresholds; None: there is none.
        action: What was done. ``fail_closed`` and ``fail_open`` are what a rule that blocks or
            redacts does when the verdict could not be computed; ``shadow`` is a flag that clients
            do not see.
        is_too_long: Whether there is no verdict because the text is longer than the rule allows.
        is_unfinished: Whether the text was cancelled while it was written: then the verdict is on
            its first tokens, or missing.
    """

    rule: BoundRule
    verdict: Verdict | None
    action: Action
    is_too_long: bool = False
    is_unfinished: bool = False

    @property
    def outcome(self) -> DecisionOutcome:
        if self.is_unfinished:
            return "unfinished"
        if self.verdict is None:
            return "failed"
        return "flagged" if self.verdict.flagged else "passed"

    @property
    def is_blocking(self) -> bool:
        """Whether the answer ends here."""
        return self.action in ("block", "fail_closed")

    @property
    def spans(self) -> Sequence[Span]:
        """The words that the probe has labelled, and that its rule counts."""
        return (self.verdict and self.verdict.spans) or ()


class PolicyError(SidelightError):
    """A request that the policy refuses.

    Args:
        message: What was got, what was wanted, what to do.
        code: A word for programs.
        decisions: On the prompt, if they led to the refusal.
        param: The field at fault.
        status: As HTTP counts them: 400, or 500 if a probe failed.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        decisions: Sequence[Decision] = (),
        param: str | None = None,
        status: int = 400,
    ):
        super().__init__(message)
        self.code = code
        self.decisions = decisions
        self.param = param
        self.status = status


def decide(bound: BoundRule, judgement: Judgement, *, tokens: int) -> Decision:
    """The decisions on the judgement of a text of so many tokens.

    A missing verdict is never taken for a harmless one.
    """
    is_too_long = bound.is_too_long(tokens)
    verdict = None if is_too_long else judgement.verdict(bound.name)
    if verdict is not None:
        lacks_spans = bound.is_redacting and verdict.spans is None
        verdict = None if lacks_spans else _decided(bound, verdict, judgement.tools)
    return Decision(bound, verdict, bound.action(verdict), is_too_long)


def _decided(bound: BoundRule, verdict: Verdict, tools: Judgement | None) -> Verdict:
    """The verdict at the rule's thresholds, which turns that do not count do not reach."""
    if bound.rule.turns == "all" or tools is None:
        return bound.decide(verdict)
    alone = tools.verdict(bound.name)
    if alone is not None and (decided := bound.decide(alone)).flagged:
        return decided
    return bound.probe.task.decide(
        bound.name, verdict.probabilities, {}, turn=verdict.turn, version=verdict.version
    )


def agreements(decisions: Iterable[Decision]) -> list[tuple[BoundRule, Agreement]]:
    """For each shadow, whether it agrees with the probe that it shadows on a whole text."""
    by_name = {d.rule.name: d for d in decisions if not d.is_unfinished}
    found: list[tuple[BoundRule, Agreement]] = []
    for shadow in by_name.values():
        shadowed = by_name.get(shadow.rule.shadow_of or "")
        if shadowed is None:
            continue
        agreement: Agreement = "failed"
        if shadow.verdict is not None and shadowed.verdict is not None:
            is_same = set(shadow.verdict.labels) == set(shadowed.verdict.labels)
            agreement = "same" if is_same else "different"
        found.append((shadow.rule, agreement))
    return found
