"""What a request may change in the policy: it can only make it stricter."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from sidelight.errors import did_you_mean
from sidelight.policy.decisions import PolicyError
from sidelight.policy.rules import BoundRule, Side

# ``score`` changes nothing; a request that asks for it where the policy blocks is refused.
OverrideMode = Literal["score", "block"]


@dataclass(frozen=True)
class PolicyOverride:
    """For one probe; None: as the policy says.

    Attributes:
        mode: What follows from a flag.
        threshold: Probability from which its labels count.
    """

    mode: OverrideMode | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class PolicyOverrides:
    """What one request asks for.

    Attributes:
        sides: For all chosen probes that judge a side.
        probes: For one probe each, by name.
    """

    sides: Mapping[Side, OverrideMode] = field(default_factory=dict)
    probes: Mapping[str, PolicyOverride] = field(default_factory=dict)


def tightened(
    rules: Sequence[BoundRule], chosen: Collection[str], overrides: PolicyOverrides
) -> tuple[BoundRule, ...]:
    """The rules of one request, which has chosen these probes.

    Raises:
        PolicyError: An override is looser than the policy, or would have no effect.
    """
    visible = [bound.name for bound in rules if not bound.is_shadow]
    for name in overrides.probes:
        if name not in visible:
            raise PolicyError(
                f"Unknown probe '{name}' in 'policies'.{did_you_mean(name, visible)}",
                code="probe_not_found",
                param="policies",
            )
    for bound in rules:
        if bound.is_blocking and overrides.sides.get(bound.side) == "score":
            raise _too_loose(
                f"moderation.policy.{bound.side}", f"The policy blocks by {bound.name}."
            )
    tight = tuple(bound if bound.is_shadow else _tight(bound, chosen, overrides) for bound in rules)
    for side, mode in overrides.sides.items():
        blocking = (b for b in tight if b.side == side and b.is_blocking)
        if mode == "block" and not any(bound.name in chosen for bound in blocking):
            # Nobody may believe in a block that no probe can cause.
            reads = "prompt" if side == "input" else "response"
            raise PolicyError(
                f"No chosen probe both reads the {reads} and flags, so moderation.policy.{side} "
                "cannot block. Choose such a probe, or leave out the policy.",
                code=f"no_{reads}_probe",
                param=f"moderation.policy.{side}",
            )
    return tight


def _tight(bound: BoundRule, chosen: Collection[str], overrides: PolicyOverrides) -> BoundRule:
    own, param = overrides.probes.get(bound.name, PolicyOverride()), f"policies.{bound.name}"
    if own.mode == "score" and bound.is_blocking:
        raise _too_loose(param, "The policy blocks where this probe flags.")
    if (own.mode == "block" or own.threshold is not None) and not bound.thresholds:
        raise PolicyError(
            f"Probe '{bound.name}' names a class and flags nothing, so it cannot block and has no "
            "threshold. Leave it out of 'policies'.",
            code="cannot_block",
            param="policies",
        )
    if own.threshold is not None:
        if bound.mode == "route":
            raise _too_loose(param, "It routes by its threshold, and another changes the route.")
        lowest = min(bound.thresholds.values())
        if own.threshold > lowest:
            raise _too_loose(param, f"Got threshold {own.threshold}, wanted {lowest} or less.")
        bound = replace(bound, rule=replace(bound.rule, threshold=own.threshold))
    blocks_side = overrides.sides.get(bound.side) == "block" and bound.name in chosen
    if own.mode == "block" or (blocks_side and bound.thresholds):
        return replace(bound, is_tightened=True)
    return bound


def _too_loose(param: str, why: str) -> PolicyError:
    return PolicyError(
        f"{param} asks for less than the server's policy. {why} A request can only be stricter.",
        code="policy_too_loose",
        param=param,
    )
