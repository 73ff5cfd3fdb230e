"""What follows from one verdict, and how it is told outside."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote

from sidelight.policy.rules import FAILED_LABEL, BoundRule
from sidelight.types import Verdict

Outcome = Literal["flagged", "passed", "failed", "unfinished"]
Action = Literal["none", "flag", "route", "block", "fail_closed", "fail_open", "shadow"]

FLAGGED_HEADER = "x-sidelight-flagged"
ROUTE_HEADER = "x-sidelight-route"


@dataclass(frozen=True)
class Decision:
    """What one probe's verdict on one side of a request led to.

    Attributes:
        rule: The probe and its rule.
        verdict: At the rule's thresholds; None where there is none.
        action: What was done. ``fail_closed`` and ``fail_open`` are a blocking rule's answers to a
            verdict that could not be computed; ``shadow`` is a flag that nobody saw.
        is_unfinished: Whether the text was given up while it was written: the verdict is on its
            first tokens then, or was still to come.
    """

    rule: BoundRule
    verdict: Verdict | None
    action: Action
    is_unfinished: bool = False

    @property
    def outcome(self) -> Outcome:
        """What the probe said."""
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
    def route(self) -> str | None:
        """Where a gateway should send the request; None: nowhere, or the rule says nothing."""
        if self.is_blocking or self.rule.mode != "route":
            return None
        return _route(self.rule, self.verdict)


def too_long(decisions: Iterable[Decision], tokens: int) -> tuple[str, ...]:
    """The probes that gave no verdict since the text has more tokens than their rules allow."""
    failed = [d.rule for d in decisions if d.verdict is None]
    return tuple(bound.name for bound in failed if bound.is_too_long(tokens))


def decide(bound: BoundRule, verdict: Verdict | None) -> Decision:
    """What follows; no verdict is never taken for a harmless one."""
    if verdict is None:
        return Decision(bound, None, _on_failure(bound))
    decided = bound.decide(verdict)
    return Decision(bound, decided, _on_verdict(bound, decided))


def unfinished(bound: BoundRule, verdict: Verdict | None) -> Decision:
    """Of a text that was given up while it was written: nothing follows.

    Args:
        bound: The probe and its rule.
        verdict: On the text so far; None: there was none yet.
    """
    decided = None if verdict is None else bound.decide(verdict)
    return Decision(bound, decided, "none", is_unfinished=True)


def marks(decisions: Iterable[Decision]) -> dict[str, str]:
    """Headers for a gateway: which probes flagged, and the routes. Shadows are not among them."""
    shown = [decision for decision in decisions if not decision.rule.is_shadow]
    flagged = dict.fromkeys(d.rule.name for d in shown if d.action in ("flag", "block"))
    routes = dict.fromkeys(route for d in shown if (route := d.route) is not None)
    headers = {FLAGGED_HEADER: _listed(flagged), ROUTE_HEADER: _listed(routes)}
    return {name: value for name, value in headers.items() if value}


def agreements(
    decisions: Iterable[Decision],
) -> list[tuple[BoundRule, Literal["same", "different", "failed"]]]:
    """For each shadow, whether it said what the probe that it shadows said of a whole text."""
    by_name = {d.rule.name: d for d in decisions if not d.is_unfinished}
    shadows = [d for d in by_name.values() if d.rule.shadow_of in by_name]
    return [(d.rule, _agreement(d, by_name[d.rule.shadow_of or ""])) for d in shadows]


def _agreement(one: Decision, other: Decision) -> Literal["same", "different", "failed"]:
    if one.verdict is None or other.verdict is None:
        return "failed"
    return "same" if set(one.verdict.labels) == set(other.verdict.labels) else "different"


def _listed(names: Iterable[str]) -> str:
    # Labels are a user's own words: a comma or a line break must not reach a header.
    return ", ".join(quote(name, safe=" /-_.:@") for name in names)


def _on_failure(bound: BoundRule) -> Action:
    if not bound.is_blocking:
        return "none"
    return "fail_closed" if bound.fails_closed else "fail_open"


def _on_verdict(bound: BoundRule, verdict: Verdict) -> Action:
    if bound.is_blocking and verdict.flagged:
        return "block"
    match bound.mode:
        case "score" | "block":
            return "none"
        case "route":
            return "none" if _route(bound, verdict) is None else "route"
        case "flag" | "shadow" as mode:
            return mode if verdict.flagged else "none"


def _route(bound: BoundRule, verdict: Verdict | None) -> str | None:
    routes = bound.rule.routes
    if verdict is None:
        return routes.get(FAILED_LABEL, FAILED_LABEL)
    if routes:
        return next((routes[label] for label in verdict.labels if label in routes), None)
    names_class = verdict.flagged or bound.probe.task.kind == "multiclass"
    return verdict.labels[0] if names_class else None
