"""The second stage: an LLM judge decides on texts about which a probe is uncertain.

This module defines the questions, and the decisions with and without an answer. Judges are reached
through ``AsksJudges``, independent of clients and networks.
"""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from sidelight.judges.question import JudgeAnswer, JudgeError, Question
from sidelight.models.conversation import Conversation
from sidelight.models.invisible import Invisible, visible
from sidelight.policy.decisions import Decision, SecondOpinion
from sidelight.policy.redaction import redacted
from sidelight.policy.rules import BoundRule
from sidelight.types import Verdict


class AsksJudges(Protocol):
    """Asks judges for one request."""

    async def ask(self, judge: str, question: Question) -> JudgeAnswer:
        """Ask the judge with this name, and return its answer.

        Raises:
            JudgeError: The judge gave no answer.
        """
        ...

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """Do work that no client waits for."""
        ...


class SecondStage:
    """The questions about one prompt and the response to it.

    Args:
        judges: Interface to the judges.
        text: The prompt, as the client sent it.
        prompt_decisions: Decisions of the probes on the prompt, which determine what is redacted.
        invisible: How the policy handles invisible characters; judges never see them.
    """

    def __init__(
        self,
        judges: AsksJudges,
        text: Conversation,
        prompt_decisions: Iterable[Decision] = (),
        *,
        invisible: Invisible = "off",
    ):
        self.judges, self._invisible = judges, invisible
        self._turns = [*text]
        self._redacting = [d for d in prompt_decisions if _redacts(d, "input")]

    async def resolve(
        self, decisions: Sequence[Decision], response: str | None = None
    ) -> list[Decision]:
        """Resolve deferred decisions by asking their judges concurrently.

        Args:
            decisions: Decisions of the probes.
            response: The response for judges, used by output rules.
        """

        async def final(decision: Decision) -> Decision:
            if decision.deferred is None:
                return decision
            about = response if decision.rule.side == "output" else None
            opinion = await self.opinion(decision.rule, about, is_of_tools=decision.is_of_tools)
            return second_decision(decision, opinion)

        return [*await asyncio.gather(*map(final, decisions))]

    async def opinion(
        self, bound: BoundRule, response: str | None = None, *, is_of_tools: bool = False
    ) -> SecondOpinion:
        """The opinion of a rule's judge, or the reason for a missing one."""
        defer = bound.rule.defer
        assert defer is not None, "only rules that defer have questions"
        try:
            question = self._question(response, is_of_tools=is_of_tools)
            answer = await self.judges.ask(defer.judge, question)
        except JudgeError as error:
            return SecondOpinion(defer.judge, failures=(error.reason,))
        return SecondOpinion(defer.judge, answer.probability, answer.seconds)

    def _question(self, response: str | None, *, is_of_tools: bool) -> Question:
        """The question about the prompt or the response, without what rules redact.

        Raises:
            JudgeError: The spans to redact are unknown.
        """
        if not all(decision.has_spans for decision in self._redacting):
            raise JudgeError("not_redacted", "The spans to redact are unknown.")
        spans = [span for each in self._redacting for span in each.spans]
        turns = [
            replace(
                turn,
                content=self._read(
                    redacted(turn.content, [s for s in spans if (s.message or 0) == number])
                ),
            )
            for number, turn in enumerate(self._turns)
        ]
        if is_of_tools:
            turns = [turn for turn in turns if turn.role == "tool"] or turns
        return Question.about(turns, response if response is None else self._read(response))

    def _read(self, text: str) -> str:
        return visible(text) if self._invisible == "strip" else text


def redacted_response(text: str, decisions: Iterable[Decision]) -> str:
    """A response redacted by the rules."""
    spans = [span for each in decisions if _redacts(each, "output") for span in each.spans]
    return redacted(text, spans)


def second_decision(decision: Decision, second: SecondOpinion) -> Decision:
    """The final decision after a deferred decision's judge was asked."""
    bound, scored = decision.rule, decision.deferred
    assert scored is not None, "only deferred decisions have an opinion"
    if second.probability is None:
        if bound.rule.on_failure == "probe":
            return replace(decision, deferred=None, second=second)
        return Decision(bound, None, bound.action(None), second=second)
    is_flagged = bound.agrees(scored, second.probability)
    by_probe = decision.verdict is not None and decision.verdict.flagged
    verdict = opinion_verdict(bound, scored, is_flagged=is_flagged)
    second = replace(second, is_changed=is_flagged != by_probe)
    return Decision(bound, verdict, bound.action(verdict), second=second)


def cancelled(decision: Decision) -> Decision:
    """The record of a decision whose text was cancelled before its judge had answered."""
    bound, defer = decision.rule, decision.rule.rule.defer
    if decision.deferred is None or defer is None:
        return decision
    # Judges of shadows are asked afterwards.
    second = None if bound.is_shadow else SecondOpinion(defer.judge, failures=("cancelled",))
    return replace(decision, action="none", is_unfinished=True, deferred=None, second=second)


def opinion_verdict(bound: BoundRule, scored: Verdict, *, is_flagged: bool) -> Verdict:
    """The probe's scores with the judge's decision."""
    thresholds = dict.fromkeys(bound.thresholds, 0.0) if is_flagged else {}
    return bound.probe.task.decide(
        bound.name, scored.probabilities, thresholds, turn=scored.turn, version=scored.version
    )


def _redacts(decision: Decision, side: str) -> bool:
    return decision.rule.mode == "redact" and decision.rule.side == side
