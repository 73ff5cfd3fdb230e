"""One request under the policy: what is judged, what is let through, what is told.

Taken when the request begins and kept to its end, as its probes are.
"""

import asyncio
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace

from sidelight.engines.base import verdict_failure
from sidelight.engines.events import Event, Finished, PromptJudged
from sidelight.server.errors import RequestError
from sidelight.server.policy.clauses import Clause
from sidelight.server.policy.decisions import Decision, Record, decide, marks, too_long
from sidelight.server.policy.holding import End, HoldBack, by_probe, judged
from sidelight.server.policy.rules import Side
from sidelight.server.report import Told, header


@dataclass(frozen=True)
class Enforcement:
    """The rules of one request.

    Attributes:
        clauses: Of every loaded probe, whether or not the client asked for its verdict.
        timeout_s: Seconds that the prompt's verdicts may take where a rule blocks; None: any.
        record: Takes what was decided.
    """

    clauses: Sequence[Clause]
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

    def _side(self, side: Side) -> list[Clause]:
        return [clause for clause in self.clauses if clause.side == side]

    def _decide(self, clauses: Sequence[Clause], event: PromptJudged) -> list[Decision]:
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


def _too_long(clause: Clause, tokens: int, headers: Mapping[str, str]) -> RequestError:
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
    return header(Told(verdicts, tuple(d.clause.name for d in shown if d.verdict is None)))


def _decided(event: PromptJudged, decisions: Sequence[Decision]) -> PromptJudged:
    return replace(
        event,
        verdicts=tuple(d.verdict for d in decisions if d.verdict is not None),
        failed=tuple(d.clause.name for d in decisions if d.verdict is None),
        too_long=too_long(decisions, event.tokens),
    )
