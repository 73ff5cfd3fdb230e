"""The decision on one verdict."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sidelight.errors import SidelightError
from sidelight.judges.question import FailureReason
from sidelight.policy.rules import Action, BoundRule
from sidelight.types import Span, Verdict, Verdicts

DecisionStatus = Literal["flagged", "passed", "failed", "unfinished"]
Agreement = Literal["same", "different", "failed"]


@dataclass(frozen=True)
class SecondOpinion:
    """The questions to a judge about one text, and its answers.

    Attributes:
        judge: Name of the judge.
        probability: Its last answer; None if it gave none.
        seconds: Total time until its answers arrived, in seconds.
        failures: Reasons for missing answers.
        questions: Number of questions.
        is_changed: Whether its decision differs from that of the probe alone.
    """

    judge: str
    probability: float | None = None
    seconds: float = 0.0
    failures: tuple[FailureReason, ...] = ()
    questions: int = 1
    is_changed: bool = False

    def __add__(self, later: "SecondOpinion") -> "SecondOpinion":
        """Merge both, with the later answer."""
        return SecondOpinion(
            later.judge,
            later.probability,
            self.seconds + later.seconds,
            self.failures + later.failures,
            self.questions + later.questions,
            later.is_changed,
        )

    def to_json(self) -> dict[str, Any]:
        """JSON values for admin keys and the audit log."""
        return {
            "name": self.judge,
            "probability": self.probability,
            "seconds": round(self.seconds, 4),
            "questions": self.questions,
            **({"failures": list(self.failures)} if self.failures else {}),
            "changed": self.is_changed,
        }


@dataclass(frozen=True)
class Decision:
    """The action taken on one probe's verdict on one side of a request.

    Attributes:
        rule: The probe and its rule.
        verdict: Verdict at the rule's thresholds; None if there is none.
        action: Action taken. ``fail_closed`` and ``fail_open`` are the actions of a rule that
            blocks or redacts if the verdict could not be computed; ``shadow`` is a flag that
            clients do not see.
        is_too_long: Whether there is no verdict because the text is longer than the rule allows.
        is_unfinished: Whether the text was cancelled during generation, or while a judge was
            asked, so that the verdict covers only its first tokens, or is missing.
        deferred: The probe's verdict, if a judge has yet to be asked about it.
        is_of_tools: Whether only tool turns are deferred.
        second: The judge's opinion; None if it was not asked.
    """

    rule: BoundRule
    verdict: Verdict | None
    action: Action
    is_too_long: bool = False
    is_unfinished: bool = False
    deferred: Verdict | None = None
    is_of_tools: bool = False
    second: SecondOpinion | None = None

    @property
    def decided_by(self) -> Literal["probe", "judge", "nothing"]:
        """The source of the decision."""
        if self.verdict is None:
            return "nothing"
        has_opinion = self.second is not None and self.second.probability is not None
        return "judge" if has_opinion else "probe"

    @property
    def status(self) -> DecisionStatus:
        if self.is_unfinished:
            return "unfinished"
        if self.verdict is None:
            return "failed"
        return "flagged" if self.verdict.flagged else "passed"

    @property
    def is_blocking(self) -> bool:
        """Whether the response ends here."""
        return self.action in ("block", "fail_closed")

    @property
    def spans(self) -> Sequence[Span]:
        """The spans that the probe has labelled and its rule counts."""
        return self.verdict.known_spans if self.verdict else ()

    @property
    def has_spans(self) -> bool:
        """Whether ``spans`` are known, and not empty because there is no verdict on them."""
        return self.verdict is not None and self.verdict.spans is not None


class PolicyError(SidelightError):
    """A request that the policy refuses.

    Args:
        message: Message for the client: what is wrong, and the remedy.
        code: Machine-readable error code.
        decisions: Decisions on the prompt, if they led to the refusal.
        param: Field that caused the error.
        status: HTTP status: 400, or 500 if a probe failed.
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


def decide(bound: BoundRule, verdicts: Verdicts, *, tokens: int) -> Decision:
    """Decide on the verdicts about a text with this number of tokens.

    A missing verdict is never treated as a negative one.
    """
    is_too_long = bound.is_too_long(tokens)
    verdict = None if is_too_long else verdicts.verdict(bound.name)
    deferred, tools = None, verdicts.tools
    is_of_tools = bound.rule.turns == "tool" and tools is not None
    if verdict is not None and bound.is_redacting and verdict.spans is None:
        verdict = None
    if verdict is not None:
        if bound.rule.defer is not None:
            isolated = tools.verdict(bound.name) if is_of_tools and tools else verdict
            scored = None if isolated is None else bound.decide(isolated)
            deferred = scored if scored and bound.defers(scored) else None
        verdict = _decided(bound, verdict, tools)
    return Decision(
        bound,
        verdict,
        bound.action(verdict),
        is_too_long,
        deferred=deferred,
        is_of_tools=is_of_tools,
    )


def _decided(bound: BoundRule, verdict: Verdict, tools: Verdicts | None) -> Verdict:
    """The verdict at the rule's thresholds, ignoring turns that do not count."""
    if bound.rule.turns == "all" or tools is None:
        return bound.decide(verdict)
    isolated = tools.verdict(bound.name)
    if isolated is not None and (decided := bound.decide(isolated)).flagged:
        return decided
    return bound.probe.task.decide(
        bound.name, verdict.probabilities, {}, turn=verdict.turn, version=verdict.version
    )


def agreements(decisions: Iterable[Decision]) -> list[tuple[BoundRule, Agreement]]:
    """For each shadow probe, whether it agrees with its counterpart on a whole text."""
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
