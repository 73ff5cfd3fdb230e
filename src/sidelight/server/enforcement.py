"""Whether a request may begin with a turn that no probe reads.

One request under the policy: what is judged, what is let through, what is told.

Taken when the request begins and kept to its end, as its probes are.

What a request asks of the policy: only what makes it stricter.
"""

import asyncio
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Literal

from sidelight.engines.base import Event, Finished, PromptJudged, verdict_failure
from sidelight.errors import did_you_mean
from sidelight.policy.decisions import Decision, Record, decide, marks, too_long
from sidelight.policy.hold_back import End, HoldBack, by_probe, judged
from sidelight.policy.rules import BoundRule, Policy, Side
from sidelight.prompts import Conversation, PlainText
from sidelight.server.errors import RequestError
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
        clauses: Of every loaded probe, whether or not the client asked for its verdict.
        timeout_s: Seconds that the prompt's verdicts may take where a rule blocks; None: any.
        record: Takes what was decided.
    """

    clauses: Sequence[BoundRule]
    timeout_s: float | None
    record: Record

    @property
    def watch(self) -> list[str]:
        """The probes that are read after each token: those of the output, if one may cut it."""
        output = self._side("output")
        is_blocking = any(clause.is_blocking for clause in output)
        return [clause.name for clause in output] if is_blocking else []

    def admits(self, event: PromptJudged) -> bool:
        """Whether a prompt is answered; the engine asks before it draws the first token."""
        return not any(decision.is_blocking for decision in self.on_prompt(event))

    async def guard(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """The events that may go out, with verdicts at the rules' thresholds.

        Raises:
            RequestError: The prompt is blocked, by a flag or since it could not be judged.
        """
        async with aclosing(events):
            prompt = await self._prompt(events)
            decisions = self.on_prompt(prompt)
            self.record(decisions)
            self._require_passed(prompt, decisions)
            yield _decided(prompt, decisions)
            async with aclosing(self._written(events, prompt)) as written:
                async for event in written:
                    yield event

    def on_prompt(self, event: PromptJudged) -> list[Decision]:
        """What follows from the verdicts on the prompt."""
        return self._decide(self._side("input"), event)

    def on_check(self, event: PromptJudged, sides: Collection[Side]) -> PromptJudged:
        """A check's verdicts on these sides at the rules' thresholds; recorded, never blocked."""
        clauses = [clause for clause in self.clauses if clause.side in sides]
        decisions = self._decide(clauses, event)
        # Nothing is written, so there is nothing to block.
        self.record([_only_told(decision) for decision in decisions])
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

    async def _written(
        self, events: AsyncGenerator[Event, None], prompt: PromptJudged
    ) -> AsyncGenerator[Event, None]:
        """What may go out of the text; whatever ends it, a text that went out is recorded once."""
        holding = HoldBack(self._side("output"), prompt_tokens=prompt.tokens)
        has_sent = has_ended = False
        try:
            async for event in events:
                passed = holding.push(event)
                for end in passed:
                    if isinstance(end, End):
                        # Before the last of the text goes out, and with the slot free by then.
                        await events.aclose()
                        has_ended = True
                        self.record(end.decisions)
                for each in passed:
                    has_sent = True
                    yield each.finished if isinstance(each, End) else each
        finally:
            if has_sent and not has_ended:
                # No answer is left that could be refused.
                with suppress(RequestError):
                    self.record(holding.unfinished())

    def _side(self, side: Side) -> list[BoundRule]:
        return [clause for clause in self.clauses if clause.side == side]

    def _decide(self, clauses: Sequence[BoundRule], event: PromptJudged) -> list[Decision]:
        verdicts = by_probe(event.verdicts)
        return [decide(clause, judged(clause, verdicts, event.tokens)) for clause in clauses]

    async def _prompt(self, events: AsyncGenerator[Event, None]) -> PromptJudged:
        closed = [c for c in self._side("input") if c.is_blocking and c.rule.on_failure == "block"]
        try:
            async with asyncio.timeout(self.timeout_s if closed else None):
                event = await anext(events)
        except TimeoutError as error:
            self.record([decide(clause, None) for clause in closed])
            raise _late([clause.name for clause in closed], self.timeout_s) from error
        assert isinstance(event, PromptJudged)
        return event

    def _require_passed(self, event: PromptJudged, decisions: Sequence[Decision]) -> None:
        headers = {**_verdict_header(decisions), **marks(decisions)}
        blocking = [d.clause.name for d in decisions if d.action == "block"]
        if blocking:
            raise RequestError(
                f"The prompt was blocked by {', '.join(blocking)}.",
                code="content_filter",
                headers=headers,
            )
        failed = [d.clause for d in decisions if d.action == "fail_closed"]
        unread = [clause for clause in failed if clause.is_too_long(event.tokens)]
        if unread:
            raise _too_long(unread[0], event.tokens, headers)
        if failed and event.is_unfamiliar:
            raise _unfamiliar([clause.name for clause in failed], headers)
        if failed:
            raise _failed([clause.name for clause in failed], headers)


def _too_long(clause: BoundRule, tokens: int, headers: Mapping[str, str]) -> RequestError:
    return RequestError(
        f"The prompt has {tokens} tokens, but probe '{clause.name}' may judge at most "
        f"{clause.rule.max_tokens}, and the policy blocks what is not judged. Shorten it.",
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
    shown = [decision for decision in decisions if not decision.clause.is_shadow]
    verdicts = tuple(d.verdict for d in shown if d.verdict is not None)
    return header(SideReport(verdicts, tuple(d.clause.name for d in shown if d.verdict is None)))


def _decided(event: PromptJudged, decisions: Sequence[Decision]) -> PromptJudged:
    return replace(
        event,
        verdicts=tuple(d.verdict for d in decisions if d.verdict is not None),
        failed=tuple(d.clause.name for d in decisions if d.verdict is None),
        too_long=too_long(decisions, event.tokens),
    )


WishedMode = Literal["score", "block"]


@dataclass(frozen=True)
class PolicyOverride:
    """For one probe; None: as the policy says.

    Attributes:
        mode: ``block``, or ``score``, which changes nothing.
        threshold: Probability from which its labels count.
    """

    mode: WishedMode | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class PolicyOverrides:
    """Of one request.

    Attributes:
        input: For all chosen probes that judge the input.
        output: For all chosen probes that judge the output.
        probes: For one probe each.
    """

    input: WishedMode | None = None
    output: WishedMode | None = None
    probes: Mapping[str, PolicyOverride] = field(default_factory=dict)

    def sides(self, mode: WishedMode) -> list[Side]:
        """The sides for which this is asked."""
        asked: dict[Side, WishedMode | None] = {"input": self.input, "output": self.output}
        return [side for side, own in asked.items() if own == mode]


def tightened(
    clauses: Sequence[BoundRule], chosen: Collection[str], wishes: PolicyOverrides
) -> tuple[BoundRule, ...]:
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


def _tightened(clause: BoundRule, chosen: Collection[str], wishes: PolicyOverrides) -> BoundRule:
    wish = wishes.probes.get(clause.name, PolicyOverride())
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


def _at(clause: BoundRule, threshold: float) -> BoundRule:
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


def _require_loose(clauses: Sequence[BoundRule], side: Side) -> None:
    blocking = [c.name for c in clauses if c.side == side and c.is_blocking]
    if blocking:
        raise _too_loose(f"moderation.policy.{side}", f"The policy blocks by {blocking[0]}.")


def _require_effect(clauses: Sequence[BoundRule], chosen: Collection[str], side: Side) -> None:
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
