"""Whether a request may begin with a turn that no probe reads.

One request under the policy: what is judged, what is let through, what is told.

Taken when the request begins and kept to its end, as its probes are.

What a request asks of the policy: only what makes it stricter.
"""

import asyncio
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Literal

from sidelight.engines.base import Event, Finished, PromptJudged, TextDelta, verdict_failure
from sidelight.errors import did_you_mean
from sidelight.policy.decisions import Decision, decide, marks, too_long
from sidelight.policy.hold_back import End, HoldBack, by_probe, judged
from sidelight.policy.rules import BoundRule, Policy, Side
from sidelight.prompts import Conversation, PlainText
from sidelight.server.errors import RequestError
from sidelight.server.observe import Observer, TextObserver
from sidelight.server.report import SideReport, header

_ROLES = frozenset({"system", "developer"})


def require_read(texts: Sequence[Conversation], policy: Policy) -> None:
    """Checks that probes read each conversation from its first turn on, where the policy wants it.

    Args:
        texts: Of one request.
        policy: Of the server.

    Raises:
        RequestError: One begins with a system or developer turn, and the policy refuses these.
    """
    if not policy.refuses_system_turns:
        return
    for text in texts:
        if not isinstance(text, PlainText) and text and text[0].role in _ROLES:
            raise RequestError(
                f"The conversation begins with a {text[0].role} turn. Probes of chats do not read "
                "it, so the server's policy refuses it. Begin with a user's turn. If nobody but "
                'the operator writes such turns, the policy may say system_turns = "trust".',
                code="system_turn_refused",
            )


@dataclass(frozen=True)
class Enforcement:
    """The rules of one request.

    Attributes:
        rules: Of every loaded probe, whether or not the client asked for its verdict.
        timeout_s: Seconds that the prompt's verdicts may take where a rule blocks; None: any.
        observer: Takes note of what is judged, written and decided.
    """

    rules: Sequence[BoundRule]
    timeout_s: float | None
    observer: Observer

    @property
    def watch(self) -> list[str]:
        """The probes that are read after each token: those of the output, if one may cut it."""
        output = self._side("output")
        is_blocking = any(bound.is_blocking for bound in output)
        return [bound.name for bound in output] if is_blocking else []

    def admits(self, event: PromptJudged) -> bool:
        """Whether a prompt is answered; the engine asks before it draws the first token."""
        return not any(decision.is_blocking for decision in self.on_prompt(event))

    async def guard(
        self,
        events: AsyncGenerator[Event, None],
        text: Conversation,
        *,
        is_prompt_known: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """The events that may go out, with verdicts at the rules' thresholds.

        Args:
            events: As the engine gives them.
            text: The prompt.
            is_prompt_known: Whether this is one more text of a prompt.

        Raises:
            RequestError: The prompt is blocked, by a flag or since it could not be judged.
        """
        observed = self.observer.text(text, is_prompt_known=is_prompt_known)
        async with aclosing(events):
            prompt = await self._prompt(events, observed)
            decisions = self.on_prompt(prompt)
            observed.prompt(prompt, decisions)
            self._require_passed(prompt, decisions)
            yield _decided(prompt, decisions)
            holding = HoldBack(self._side("output"), prompt_tokens=prompt.tokens)
            has_sent = False
            try:
                async for event in events:
                    observed.read(event)
                    passed = holding.push(event)
                    for end in passed:
                        if isinstance(end, End):
                            # Before the last of the text goes out, and with the slot free by then.
                            await events.aclose()
                            observed.end(end.decisions)
                    for each in passed:
                        has_sent = True
                        if isinstance(each, TextDelta):
                            observed.delta()
                        yield each.finished if isinstance(each, End) else each
            finally:
                # Of a text that never went out, nothing was decided.
                observed.end(holding.unfinished() if has_sent else (), is_given_up=True)

    def on_prompt(self, event: PromptJudged) -> list[Decision]:
        """What follows from the verdicts on the prompt."""
        return self._decide(self._side("input"), event)

    def on_check(
        self, event: PromptJudged, text: Conversation, sides: Collection[Side]
    ) -> PromptJudged:
        """A check's verdicts on these sides at the rules' thresholds; recorded, never blocked."""
        rules = [bound for bound in self.rules if bound.side in sides]
        decisions = self._decide(rules, event)
        # Nothing is written, so there is nothing to block.
        told = [_only_told(decision) for decision in decisions]
        self.observer.text(text).check(event, told)
        return _decided(event, decisions)

    def marks(
        self, prompts: Sequence[PromptJudged], finished: Sequence[Finished] = ()
    ) -> Mapping[str, str]:
        """Headers for a gateway, from events that ``guard`` has let through."""
        decisions = [decision for prompt in prompts for decision in self.on_prompt(prompt)]
        for event in finished:
            verdicts = by_probe(event.verdicts)
            decisions += [decide(c, verdicts.get(c.name)) for c in self._side("output")]
        return marks(decisions)

    def _side(self, side: Side) -> list[BoundRule]:
        return [bound for bound in self.rules if bound.side == side]

    def _decide(self, rules: Sequence[BoundRule], event: PromptJudged) -> list[Decision]:
        verdicts = by_probe(event.verdicts)
        return [decide(bound, judged(bound, verdicts, event.tokens)) for bound in rules]

    async def _prompt(
        self, events: AsyncGenerator[Event, None], observed: TextObserver
    ) -> PromptJudged:
        closed = [bound for bound in self._side("input") if bound.fails_closed]
        try:
            async with asyncio.timeout(self.timeout_s if closed else None):
                event = await anext(events)
        except TimeoutError as error:
            observed.prompt(None, [decide(bound, None) for bound in closed])
            raise _late([bound.name for bound in closed], self.timeout_s) from error
        assert isinstance(event, PromptJudged)
        return event

    def _require_passed(self, event: PromptJudged, decisions: Sequence[Decision]) -> None:
        headers = {**_verdict_header(decisions), **marks(decisions)}
        blocking = [d.rule.name for d in decisions if d.action == "block"]
        if blocking:
            raise RequestError(
                f"The prompt was blocked by {', '.join(blocking)}.",
                code="content_filter",
                headers=headers,
            )
        failed = [d.rule for d in decisions if d.action == "fail_closed"]
        unread = [bound for bound in failed if bound.is_too_long(event.tokens)]
        if unread:
            raise _too_long(unread[0], event.tokens, headers)
        if failed and event.is_unfamiliar:
            raise _unfamiliar([bound.name for bound in failed], headers)
        if failed:
            raise _failed([bound.name for bound in failed], headers)


def _too_long(bound: BoundRule, tokens: int, headers: Mapping[str, str]) -> RequestError:
    return RequestError(
        f"The prompt has {tokens} tokens, but probe '{bound.name}' may judge at most "
        f"{bound.rule.max_tokens}, and the policy blocks what is not judged. Shorten it.",
        code="verdict_failed",
        headers=headers,
    )


def _unfamiliar(names: Sequence[str], headers: Mapping[str, str]) -> RequestError:
    return RequestError(
        f"No verdict from {', '.join(names)}: trained on chats, probes cannot judge a plain text, "
        "and the policy blocks what is not judged. Use /v1/chat/completions.",
        code="verdict_failed",
        headers=headers,
    )


def _failed(names: Sequence[str], headers: Mapping[str, str]) -> RequestError:
    return RequestError(
        f"{verdict_failure(names)} The policy blocks what is not judged.",
        status=500,
        type="server_error",
        code="verdict_failed",
        headers=headers,
    )


def _late(names: Sequence[str], timeout_s: float | None) -> RequestError:
    return RequestError(
        f"No verdict from {', '.join(names)} within {timeout_s} s. The policy blocks what is not "
        "judged. Try again later.",
        status=504,
        type="server_error",
        code="verdict_failed",
    )


def _only_told(decision: Decision) -> Decision:
    told = {"block": "flag", "fail_closed": "none", "fail_open": "none"}
    return replace(decision, action=told.get(decision.action, decision.action))


def _verdict_header(decisions: Sequence[Decision]) -> Mapping[str, str]:
    shown = [decision for decision in decisions if not decision.rule.is_shadow]
    verdicts = tuple(d.verdict for d in shown if d.verdict is not None)
    return header(SideReport(verdicts, tuple(d.rule.name for d in shown if d.verdict is None)))


def _decided(event: PromptJudged, decisions: Sequence[Decision]) -> PromptJudged:
    return replace(
        event,
        verdicts=tuple(d.verdict for d in decisions if d.verdict is not None),
        failed=tuple(d.rule.name for d in decisions if d.verdict is None),
        too_long=too_long(decisions, event.tokens),
    )


OverrideMode = Literal["score", "block"]


@dataclass(frozen=True)
class PolicyOverride:
    """For one probe; None: as the policy says.

    Attributes:
        mode: ``block``, or ``score``, which changes nothing.
        threshold: Probability from which its labels count.
    """

    mode: OverrideMode | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class PolicyOverrides:
    """Of one request.

    Attributes:
        input: For all chosen probes that judge the input.
        output: For all chosen probes that judge the output.
        probes: For one probe each.
    """

    input: OverrideMode | None = None
    output: OverrideMode | None = None
    probes: Mapping[str, PolicyOverride] = field(default_factory=dict)

    def sides(self, mode: OverrideMode) -> list[Side]:
        """The sides for which this is asked."""
        asked: dict[Side, OverrideMode | None] = {"input": self.input, "output": self.output}
        return [side for side, own in asked.items() if own == mode]


def tightened(
    rules: Sequence[BoundRule], chosen: Collection[str], overrides: PolicyOverrides
) -> tuple[BoundRule, ...]:
    """The rules of a request.

    Args:
        rules: As the policy has them.
        chosen: Names of the probes that the request asks about.
        overrides: What it wants.

    Raises:
        RequestError: A wish is looser than the policy, or could not be fulfilled.
    """
    visible = [bound.name for bound in rules if not bound.is_shadow]
    for name in overrides.probes:
        if name not in visible:
            raise RequestError(
                f"Unknown probe '{name}' in 'policies'.{did_you_mean(name, visible)}",
                code="probe_not_found",
                param="policies",
            )
    for side in overrides.sides("score"):
        _require_loose(rules, side)
    tight = tuple(_tightened(bound, chosen, overrides) for bound in rules)
    for side in overrides.sides("block"):
        _require_effect(tight, chosen, side)
    return tight


def _tightened(bound: BoundRule, chosen: Collection[str], overrides: PolicyOverrides) -> BoundRule:
    wish = overrides.probes.get(bound.name, PolicyOverride())
    if bound.is_shadow:
        return bound
    if wish.mode == "score" and bound.is_blocking:
        raise _too_loose(f"policies.{bound.name}", "The policy blocks where this probe flags.")
    if (wish.mode == "block" or wish.threshold is not None) and not bound.thresholds:
        raise RequestError(
            f"Probe '{bound.name}' names a class and flags nothing, so it cannot block and has no "
            "threshold.",
            code="cannot_block",
            param="policies",
        )
    if wish.threshold is not None:
        bound = _at(bound, wish.threshold)
    is_of_side = bound.side in overrides.sides("block") and bound.name in chosen
    if wish.mode == "block" or (is_of_side and bound.thresholds):
        return replace(bound, is_tightened=True)
    return bound


def _at(bound: BoundRule, threshold: float) -> BoundRule:
    if bound.mode == "route":
        raise _too_loose(
            f"policies.{bound.name}", "It routes by this threshold, and another changes the route."
        )
    lowest = min(bound.thresholds.values())
    if threshold > lowest:
        raise _too_loose(
            f"policies.{bound.name}", f"Got threshold {threshold}, wanted {lowest} or less."
        )
    return replace(bound, rule=replace(bound.rule, threshold=threshold))


def _require_loose(rules: Sequence[BoundRule], side: Side) -> None:
    blocking = [c.name for c in rules if c.side == side and c.is_blocking]
    if blocking:
        raise _too_loose(f"moderation.policy.{side}", f"The policy blocks by {blocking[0]}.")


def _require_effect(rules: Sequence[BoundRule], chosen: Collection[str], side: Side) -> None:
    """A block that no probe can bring about must not look like one."""
    if any(c.side == side and c.is_blocking and c.name in chosen for c in rules):
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
