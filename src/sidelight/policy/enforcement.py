"""One text under the policy: whether its prompt is answered, and what is sent of the answer.

It knows an engine's events and nothing of HTTP, so that any server can enforce a policy with it.
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
from sidelight.models.conversation import Conversation, PlainText
from sidelight.models.invisible import Invisible
from sidelight.policy.decisions import Decision, PolicyError, decide
from sidelight.policy.hold_back import Ended, HoldBack
from sidelight.policy.rules import Action, BoundRule, Policy, Side
from sidelight.policy.second_stage import AsksJudges, SecondStage


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
    """Records what happens to one text. An error that it raises ends the text."""

    def prompt(self, event: PromptClassified, decisions: Sequence[Decision]) -> None:
        """The prompt was judged."""

    def shadow_opinions(self, decisions: Sequence[Decision], beside: Sequence[Decision]) -> None:
        """Judges were asked about probes in shadow mode, beside which others had decided."""

    def read(self, event: Event) -> None:
        """The engine has written or judged more, whether or not it is sent."""

    def delta(self) -> None:
        """A piece of text is sent."""

    def end(self, decisions: Sequence[Decision], *, is_cancelled: bool = False) -> None:
        """The text is complete, cut, or cancelled; only the first call counts."""


class Enforcement:
    """Enforces the policy on one text: decides on its prompt, then holds back or cuts the answer.

    Args:
        rules: One for every loaded probe, whether or not the client chose it.
        observe: Gives the observer of the text when the work on it begins.
        stream_scores: Whether to pass what probes of the output say after each token.
        judges: Asks the judges that rules defer to; None: no rule does.
        invisible: How the policy handles invisible characters.

    Attributes:
        admitted: What was decided on the prompt; None: nothing yet, or it is refused.
        ended: How the text has ended; None while it is written.
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
        """The probes to read after each token: those of the output, if one may cut or redact it."""
        is_read = self._stream_scores or any(bound.is_enforced for bound in self._output)
        return [bound.name for bound in self._output] if is_read else []

    def admits(self, event: PromptClassified) -> bool:
        """Whether the prompt is answered; the engine asks before it draws the first token.

        A prompt that a judge decides about is answered, and nothing of it is sent until it has.
        """
        return not any(_is_refused(decision) for decision in self._decisions(event))

    async def guard(
        self,
        text: Conversation,
        events: AsyncGenerator[Event, None],
        *,
        asked: Conversation | None = None,
    ) -> AsyncGenerator[Passed, None]:
        """The engine's events on a text, as far as they may be sent.

        Args:
            text: The prompt, for the observer.
            events: Of the engine.
            asked: The prompt that judges are asked about, where it differs.

        Raises:
            PolicyError: The prompt is blocked, by a flag or because it could not be judged.
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
                # No effect if `end` was called above. If neither text nor scores were sent, there
                # is no partial verdict to record.
                observer.end(holding.unfinished() if is_begun else (), is_cancelled=True)

    async def _passed(
        self,
        event: Event,
        events: AsyncGenerator[Event, None],
        holding: HoldBack,
        second_stage: SecondStage | None,
        observer: TextObserver,
    ) -> AsyncGenerator[Passed, None]:
        """What may be sent after an event, once the judges that it leads to have answered."""
        passed, running = holding.push(event), self._running(event)
        while True:
            if passed and isinstance(ended := passed[-1], Ended):
                # Before the last of the text is sent, with the engine's slot already free.
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
        """What probes of the output say so far, if it is passed on."""
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
    decided = await second_stage.resolve([d for d in decisions if d not in shadows], response)

    async def later() -> None:
        observer.shadow_opinions(await second_stage.resolve(shadows, response), decided)

    if shadows:
        second_stage.judges.later(later())
    by_name = {decision.rule.name: decision for decision in decided}
    return tuple(by_name.get(decision.rule.name, decision) for decision in decisions)


def _without_shadow_opinions(
    decisions: Sequence[Decision], second_stage: SecondStage | None
) -> Sequence[Decision]:
    """The decisions that are made; those that a judge is still asked about are recorded later."""
    if all(decision.deferred is None for decision in decisions):
        return decisions
    if second_stage is None:
        return [replace(decision, deferred=None) for decision in decisions]
    return [decision for decision in decisions if decision.deferred is None]


def check_decisions(
    rules: Sequence[BoundRule], event: PromptClassified, sides: Collection[Side]
) -> list[Decision]:
    """The decisions of the probes on a text after which nothing is written."""
    return [*_decide_all([bound for bound in rules if bound.side in sides], event)]


async def checked_decisions(
    decisions: Sequence[Decision],
    observer: TextObserver,
    second_stage: SecondStage | None,
    response: str | None = None,
) -> list[Decision]:
    """The decisions, with what judges say.

    Since nothing is written, nothing can be blocked: a flag is the most.

    Args:
        decisions: Of ``check_decisions``.
        observer: Of the text.
        second_stage: Asks judges; None: no rule defers.
        response: The answer in the text, as judges get it.
    """
    if second_stage is not None:
        decisions = await _after_second_stage(decisions, second_stage, observer, response=response)
    reported: dict[Action, Action] = {"block": "flag", "fail_closed": "none", "fail_open": "none"}
    return [replace(d, action=reported.get(d.action, d.action)) for d in decisions]


def require_trusted_turns(policy: Policy, texts: Sequence[Conversation]) -> None:
    """Refuse conversations that begin with turns that no probe reads, unless they are trusted."""
    if not policy.refuses_system_turns:
        return
    for text in texts:
        if not isinstance(text, PlainText) and text and text[0].role in ("system", "developer"):
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
    """Whether the prompt is refused, and no judge could let it pass."""
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
    chats_only = [d for d in failed if not d.rule.probe.can_classify(is_plain=event.is_plain)]
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
