"""What a request asks of the policy: only what makes it stricter."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from sidelight.errors import did_you_mean
from sidelight.server.errors import RequestError
from sidelight.server.policy.clauses import Clause
from sidelight.server.policy.rules import Side

WishedMode = Literal["score", "block"]


@dataclass(frozen=True)
class Wish:
    """For one probe; None: as the policy says.

    Attributes:
        mode: ``block``, or ``score``, which changes nothing.
        threshold: Probability from which its labels count.
    """

    mode: WishedMode | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Wishes:
    """Of one request.

    Attributes:
        input: For all chosen probes that judge the input.
        output: For all chosen probes that judge the output.
        probes: For one probe each.
    """

    input: WishedMode | None = None
    output: WishedMode | None = None
    probes: Mapping[str, Wish] = field(default_factory=dict)

    def sides(self, mode: WishedMode) -> list[Side]:
        """The sides for which this is asked."""
        asked: dict[Side, WishedMode | None] = {"input": self.input, "output": self.output}
        return [side for side, own in asked.items() if own == mode]


def tightened(
    clauses: Sequence[Clause], chosen: Collection[str], wishes: Wishes
) -> tuple[Clause, ...]:
    """The clauses of a request.

    Args:
        clauses: As the policy has them.
        chosen: Names of the probes that the request asks about.
        wishes: What it wants.

    Raises:
        RequestError: A wish is looser than the policy, or could not be fulfilled.
    """
    visible = [clause.name for clause in clauses if not clause.is_shadow]
    for name in wishes.probes:
        if name not in visible:
            raise RequestError(
                f"Unknown probe '{name}' in 'policies'.{did_you_mean(name, visible)}",
                code="probe_not_found",
                param="policies",
            )
    for side in wishes.sides("score"):
        _require_loose(clauses, side)
    tight = tuple(_tightened(clause, chosen, wishes) for clause in clauses)
    for side in wishes.sides("block"):
        _require_effect(tight, chosen, side)
    return tight


def _tightened(clause: Clause, chosen: Collection[str], wishes: Wishes) -> Clause:
    wish = wishes.probes.get(clause.name, Wish())
    if clause.is_shadow:
        return clause
    if wish.mode == "score" and clause.is_blocking:
        raise _too_loose(f"policies.{clause.name}", "The policy blocks where this probe flags.")
    if (wish.mode == "block" or wish.threshold is not None) and not clause.thresholds:
        raise RequestError(
            f"Probe '{clause.name}' names a class and flags nothing, so it cannot block and has no "
            "threshold.",
            code="cannot_block",
            param="policies",
        )
    if wish.threshold is not None:
        clause = _at(clause, wish.threshold)
    is_of_side = clause.side in wishes.sides("block") and clause.name in chosen
    if wish.mode == "block" or (is_of_side and clause.thresholds):
        return replace(clause, is_tightened=True)
    return clause


def _at(clause: Clause, threshold: float) -> Clause:
    if clause.rule.mode == "route":
        raise _too_loose(
            f"policies.{clause.name}", "It routes by this threshold, and another changes the route."
        )
    lowest = min(clause.thresholds.values())
    if threshold > lowest:
        raise _too_loose(
            f"policies.{clause.name}", f"Got threshold {threshold}, wanted {lowest} or less."
        )
    return replace(clause, rule=replace(clause.rule, threshold=threshold))


def _require_loose(clauses: Sequence[Clause], side: Side) -> None:
    blocking = [c.name for c in clauses if c.side == side and c.is_blocking]
    if blocking:
        raise _too_loose(f"moderation.policy.{side}", f"The policy blocks by {blocking[0]}.")


def _require_effect(clauses: Sequence[Clause], chosen: Collection[str], side: Side) -> None:
    """A block that no probe can bring about must not look like one."""
    if any(c.side == side and c.is_blocking and c.name in chosen for c in clauses):
        return
    reads = "prompt" if side == "input" else "response"
    raise RequestError(
        f"No chosen probe reads the {reads} and flags, so moderation.policy.{side} cannot block. "
        "Choose such a probe, or leave the policy out.",
        code=f"no_{reads}_probe",
        param=f"moderation.policy.{side}",
    )


def _too_loose(param: str, why: str) -> RequestError:
    return RequestError(
        f"{param} asks for less than the server's policy. {why} A request can only be stricter.",
        code="policy_too_loose",
        param=param,
    )
