"""Enforcement of the policy on one text: whether its prompt is answered, and which part of the
response is sent.

It works on engine events, independent of HTTP, so that any server can use it.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

from sidelight.engines.base import (
    Event,
    PromptClassified,
    ResponseScored,
    TextDelta,
    verdict_failure,
)
from sidelight.models.conversation import Conversation
from sidelight.models.invisible import Invisible
from sidelight.policy.decisions import Decision, PolicyError, decide
from sidelight.policy.hold_back import Ended, HoldBack
from sidelight.policy.rules import Action, BoundRule, Policy, Side
from sidelight.policy.second_stage import AsksJudges, SecondStage, cancelled


@dataclass(frozen=True)
class Classified:
    """Classification by one side's probes: of a prompt that may be answered, or of an answer so
    far.
    """

    tokens: int
    decisions: tuple[Decision, ...]


# What may be sent of an answer: ``Classified`` of the prompt, any number of ``TextDelta`` and, if
# they are asked for, of ``Classified`` of the answer, ``Ended``.
Passed = Classified | TextDelta | Ended


class TextObserver(Protocol):
    """Records the events of one text. An error that it raises ends the text."""

    def prompt(self, event: PromptClassified, decisions: Sequence[Decision]) -> None:
        """The prompt was classified."""

    def shadow_opinions(self, decisions: Sequence[Decision], beside: Sequence[Decision]) -> None:
        """Judges were asked about probes in shadow mode, after the other probes had decided."""

    def read(self, event: Event) -> None:
        """The engine has generated or classified more, whether or not it is sent."""

    def delta(self) -> None:
        """Text is sent."""

    def end(self, decisions: Sequence[Decision], *, is_cancelled: bool = False) -> None:
        """The text is complete, cut off, or cancelled; only the first call counts."""


class Enforcement:
    """Enforces the policy on one text: decides on its prompt, then holds back or ends the response.

    Args:
        rules: The rule of every loaded probe, whether or not the client chose it.
        observe: Creates the observer of the text when work on it begins.
        stream_scores: Whether to emit the verdicts of response probes after each token.
        judges: Interface to the judges that rules defer to; None if no rule defers.
        invisible: How the policy handles invisible characters.

    Attributes:
        admitted: Decisions on an admitted prompt; None if undecided or refused.
        ended: How the text has ended; None during generation.
    """

    def __init__(
        self,
        rules: Sequence[BoundRule],
        observe: Callable[[Conversation], TextObserver],
        *,
        stream_scores: bool = False,
        judges: AsksJudges | None = None,
        invisible: Invisible = "off",
    ):
        assert judges is not None or not any(bound.rule.defer for bound in rules), "no judges"
        self._stream_scores = stream_scores
        self._judges = judges
        self._invisible: Invisible = invisible
        self._input = [bound for bound in rules if bound.side == "input"]
        self._output = [bound for bound in rules if bound.side == "output"]
        self._observe = observe
        self._decided: tuple[PromptClassified, tuple[Decision, ...]] | None = None
        self.admitted: Classified | None = None
        self.ended: Ended | None = None

    @property
    def monitored(self) -> list[str]:
        """The probes to evaluate after each token: those of the output, if one may block or redact
        it.
        """
        is_read = self._stream_scores or any(bound.is_enforced for bound in self._output)
        return [bound.name for bound in self._output] if is_read else []

    def admits(self, event: PromptClassified) -> bool:
        """Whether the prompt is answered; the engine asks before it samples the first token.

        Generation starts for a prompt that a judge decides on, but nothing is sent until it has
        decided.
        """
        return not any(_is_refused(decision) for decision in self._decisions(event))

    async def guard(
        self,
        text: Conversation,
        events: AsyncGenerator[Event, None],
        *,
        asked: Conversation | None = None,
    ) -> AsyncGenerator[Passed, None]:
        """Filter the engine's events on a text to those that may be sent.

        Args:
            text: The prompt, for the observer.
            events: Events of the engine.
            asked: The prompt for judges, if different.

        Raises:
            PolicyError: The prompt is blocked by a flag, or because it could not be classified.
        """
        observer = self._observe(text)
        async with aclosing(events):
            prompt = await anext(events)
            assert isinstance(prompt, PromptClassified)
            decisions, second_stage = self._decisions(prompt), None
            if self._judges is not None and self.admits(prompt):
                asked = text if asked is None else asked
                second_stage = SecondStage(
                    self._judges, asked, decisions, invisible=self._invisible
                )
                decisions = await _after_second_stage(decisions, second_stage, observer)
            observer.prompt(prompt, _without_shadow_opinions(decisions, second_stage))
            _require_passed(prompt, decisions)
            self.admitted = Classified(prompt.tokens, decisions)
            yield self.admitted
            holding = HoldBack(self._output)
            is_begun = False
            try:
                async for event in events:
                    observer.read(event)
                    passing = self._passed(event, events, holding, second_stage, observer)
                    async with aclosing(passing) as passed:
                        async for each in passed:
                            is_begun = True
                            yield each
            finally:
                # No effect if `end` was called above. If neither text nor scores were sent, and no
                # judge was asked, there is no partial verdict to record.
                unfinished = holding.unfinished()
                is_begun |= any(decision.second for decision in unfinished)
                observer.end(unfinished if is_begun else (), is_cancelled=True)

    async def _passed(
        self,
        event: Event,
        events: AsyncGenerator[Event, None],
        holding: HoldBack,
        second_stage: SecondStage | None,
        observer: TextObserver,
    ) -> AsyncGenerator[Passed, None]:
        """What may be sent after an event, once the judges that it involves have answered."""
        passed, running = holding.push(event), self._running(event)
        while True:
            if passed and isinstance(ended := passed[-1], Ended):
                # Before the end of the text is sent, when the engine's slot is already free.
                await events.aclose()
                if second_stage is not None:
                    decisions = await _after_second_stage(
                        ended.decisions, second_stage, observer, response=holding.text
                    )
                    ended = replace(ended, decisions=decisions)
                    passed = [*passed[:-1], ended]
                self.ended = ended
                observer.end(_without_shadow_opinions(ended.decisions, second_stage))
            for each in (*running, *passed):
                if isinstance(each, TextDelta):
                    observer.delta()
                yield each
            questions = holding.questions()
            if self.ended is not None or not questions:
                return
            assert second_stage is not None, "rules that defer come with judges"
            opinions = await asyncio.gather(
                *(second_stage.opinion(bound, holding.text) for bound in questions)
            )
            names = (bound.name for bound in questions)
            passed, running = holding.answer(dict(zip(names, opinions, strict=True))), ()

    def _running(self, event: Event) -> Sequence[Classified]:
        """The verdicts of response probes so far, if scores are streamed."""
        if not self._stream_scores or not isinstance(event, ResponseScored):
            return ()
        scores = _decide_all(self._output, event)
        nothing = (replace(each, action="none", deferred=None) for each in scores)
        return [Classified(event.tokens, tuple(nothing))]

    def _decisions(self, prompt: PromptClassified) -> tuple[Decision, ...]:
        """The decisions on the prompt, made once for equal verdicts."""
        if self._decided is None or self._decided[0] != prompt:
            self._decided = prompt, _decide_all(self._input, prompt)
        return self._decided[1]


async def _after_second_stage(
    decisions: Sequence[Decision],
    second_stage: SecondStage,
    observer: TextObserver,
    *,
    response: str | None = None,
) -> tuple[Decision, ...]:
    """The decisions, with what judges say; those of shadows come later, without delay for the
    client.
    """
    shadows = [d for d in decisions if d.rule.is_shadow and d.deferred is not None]
    try:
        decided = await second_stage.resolve([d for d in decisions if d not in shadows], response)
    except asyncio.CancelledError:
        # Otherwise a client that leaves early could try texts on the probe unrecorded.
        observer.end([cancelled(decision) for decision in decisions], is_cancelled=True)
        raise

    async def later() -> None:
        observer.shadow_opinions(await second_stage.resolve(shadows, response), decided)

    if shadows:
        second_stage.judges.later(later())
    by_name = {decision.rule.name: decision for decision in decided}
    return tuple(by_name.get(decision.rule.name, decision) for decision in decisions)


def _without_shadow_opinions(
    decisions: Sequence[Decision], second_stage: SecondStage | None
) -> Sequence[Decision]:
    """The final decisions; those that await a judge are recorded later."""
    if all(decision.deferred is None for decision in decisions):
        return decisions
    if second_stage is None:
        return [replace(decision, deferred=None) for decision in decisions]
    return [decision for decision in decisions if decision.deferred is None]


def check_decisions(
    rules: Sequence[BoundRule], event: PromptClassified, sides: Collection[Side]
) -> list[Decision]:
    """The decisions of the probes on a text that is only classified."""
    return [*_decide_all([bound for bound in rules if bound.side in sides], event)]


async def checked_decisions(
    decisions: Sequence[Decision],
    observer: TextObserver,
    second_stage: SecondStage | None,
    response: str | None = None,
) -> list[Decision]:
    """Complete the decisions with the opinions of judges.

    Nothing is generated, so nothing can be blocked; the strongest action is a flag.

    Args:
        decisions: Result of ``check_decisions``.
        observer: Observer of the text.
        second_stage: Interface to judges; None if no rule defers.
        response: The response in the text, for the judges.
    """
    if second_stage is not None:
        decisions = await _after_second_stage(decisions, second_stage, observer, response=response)
    reported: dict[Action, Action] = {"block": "flag", "fail_closed": "none", "fail_open": "none"}
    return [replace(d, action=reported.get(d.action, d.action)) for d in decisions]


def require_trusted_turns(policy: Policy, texts: Sequence[Conversation]) -> None:
    """Refuse conversations that begin with turns that no probe reads, unless these are trusted."""
    if not policy.refuses_system_turns:
        return
    for text in texts:
        if text and text[0].role in ("system", "developer"):
            raise PolicyError(
                f"The conversation begins with a {text[0].role} turn, which no probe of chats "
                "reads, so the server's policy refuses it. Begin with a user's turn. If only the "
                'operator writes such turns, set system_turns = "trust" in the policy.',
                code="system_turn_refused",
            )


def _decide_all(
    rules: Sequence[BoundRule], event: PromptClassified | ResponseScored
) -> tuple[Decision, ...]:
    return tuple(decide(bound, event.verdicts, tokens=event.tokens) for bound in rules)


def _is_refused(decision: Decision) -> bool:
    """Whether the prompt is refused regardless of any judge."""
    return decision.is_blocking and decision.deferred is None


def _require_passed(event: PromptClassified, decisions: Sequence[Decision]) -> None:
    blocked = [d for d in decisions if d.action == "block"]
    if blocked:
        message = f"The prompt was blocked by {_names(blocked)}."
        raise PolicyError(message, code="content_filter", decisions=decisions)
    failed = [d for d in decisions if d.action == "fail_closed"]
    if not failed:
        return
    status = 400
    too_long = next((d.rule for d in failed if d.is_too_long), None)
    chats_only = [d for d in failed if not d.rule.probe.can_classify(event.prompt)]
    if too_long is not None:
        message = (
            f"The prompt has {event.tokens} tokens, but probe '{too_long.name}' classifies at "
            f"most {too_long.rule.max_tokens}, and the policy blocks text without a verdict. "
            "Shorten the prompt."
        )
    elif chats_only:
        message = (
            f"No verdict from {_names(chats_only)}: probes that were trained only on chats "
            "cannot classify plain text, and the policy blocks text without a verdict. Use "
            "/v1/chat/completions."
        )
    else:
        failure = verdict_failure([decision.rule.name for decision in failed])
        message = f"{failure} The policy blocks text without a verdict."
        status = 500
    raise PolicyError(message, code="verdict_failed", decisions=decisions, status=status)


def _names(decisions: Sequence[Decision]) -> str:
    return ", ".join(decision.rule.name for decision in decisions)
