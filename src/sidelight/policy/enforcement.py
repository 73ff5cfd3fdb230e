"""One text under the policy: whether its prompt is answered, and what is sent of the answer.

It knows an engine's events and nothing of HTTP, so that any server can enforce a policy with it.
"""

from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

from sidelight.engines.base import Event, PromptJudged, ResponseScored, TextDelta, verdict_failure
from sidelight.models.conversation import Conversation, PlainText
from sidelight.policy.decisions import Decision, PolicyError, decide
from sidelight.policy.hold_back import Ended, HoldBack
from sidelight.policy.rules import Action, BoundRule, Policy, Side


@dataclass(frozen=True)
class Judged:
    """Judgement by one side's probes: of a prompt that may be answered, or of an answer so far."""

    tokens: int
    decisions: tuple[Decision, ...]


# What may be sent of an answer: ``Judged`` of the prompt, any number of ``TextDelta`` and, if they
# are asked for, of ``Judged`` of the answer, ``Ended``.
Passed = Judged | TextDelta | Ended


class TextObserver(Protocol):
    """Records what happens to one text. An error that it raises ends the text."""

    def prompt(self, event: PromptJudged, decisions: Sequence[Decision]) -> None:
        """The prompt was judged."""

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
        tells_scores: Whether to pass what probes of the output say after each token.

    Attributes:
        admitted: What was decided on the prompt; None: nothing yet, or it is refused.
        ended: How the text has ended; None while it is written.
    """

    def __init__(
        self,
        rules: Sequence[BoundRule],
        observe: Callable[[Conversation], TextObserver],
        *,
        tells_scores: bool = False,
    ):
        self._tells_scores = tells_scores
        self._input = [bound for bound in rules if bound.side == "input"]
        self._output = [bound for bound in rules if bound.side == "output"]
        self._observe = observe
        self._decided: tuple[PromptJudged, tuple[Decision, ...]] | None = None
        self.admitted: Judged | None = None
        self.ended: Ended | None = None

    @property
    def watch(self) -> list[str]:
        """The probes to read after each token: those of the output, if one may cut or redact it."""
        is_read = self._tells_scores or any(bound.is_enforced for bound in self._output)
        return [bound.name for bound in self._output] if is_read else []

    def admits(self, event: PromptJudged) -> bool:
        """Whether the prompt is answered; the engine asks before it draws the first token."""
        return not any(decision.is_blocking for decision in self._decisions(event))

    async def guard(
        self, text: Conversation, events: AsyncGenerator[Event, None]
    ) -> AsyncGenerator[Passed, None]:
        """The engine's events on a text, as far as they may be sent.

        Raises:
            PolicyError: The prompt is blocked, by a flag or because it could not be judged.
        """
        observer = self._observe(text)
        async with aclosing(events):
            prompt = await anext(events)
            assert isinstance(prompt, PromptJudged)
            decisions = self._decisions(prompt)
            observer.prompt(prompt, decisions)
            _require_passed(prompt, decisions)
            self.admitted = Judged(prompt.tokens, decisions)
            yield self.admitted
            holding = HoldBack(self._output)
            is_begun = False
            try:
                async for event in events:
                    observer.read(event)
                    passed = holding.push(event)
                    if passed and isinstance(passed[-1], Ended):
                        # Before the last of the text is sent, with the engine's slot already free.
                        await events.aclose()
                        self.ended = passed[-1]
                        observer.end(self.ended.decisions)
                    if self._tells_scores and isinstance(event, ResponseScored):
                        is_begun = True
                        decisions = _decide_all(self._output, event)
                        nothing = tuple(replace(each, action="none") for each in decisions)
                        yield Judged(event.tokens, nothing)
                    for each in passed:
                        if isinstance(each, TextDelta):
                            is_begun = True
                            observer.delta()
                        yield each
            finally:
                # No effect if `end` was called above. If neither text nor scores were sent, there
                # is no partial verdict to record.
                observer.end(holding.unfinished() if is_begun else (), is_cancelled=True)

    def _decisions(self, prompt: PromptJudged) -> tuple[Decision, ...]:
        """The decisions on the prompt, made once for equal verdicts."""
        if self._decided is None or self._decided[0] != prompt:
            self._decided = prompt, _decide_all(self._input, prompt)
        return self._decided[1]


def check_decisions(
    rules: Sequence[BoundRule], event: PromptJudged, sides: Collection[Side]
) -> list[Decision]:
    """The decisions if nothing is written, so that nothing can be blocked: a flag at most."""
    shown: dict[Action, Action] = {"block": "flag", "fail_closed": "none", "fail_open": "none"}
    decisions = _decide_all([bound for bound in rules if bound.side in sides], event)
    return [replace(d, action=shown.get(d.action, d.action)) for d in decisions]


def require_trusted_turns(policy: Policy, texts: Sequence[Conversation]) -> None:
    """Refuses conversations that begin with turns that no probe reads, unless they are trusted."""
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
    rules: Sequence[BoundRule], event: PromptJudged | ResponseScored
) -> tuple[Decision, ...]:
    return tuple(decide(bound, event.judgement, tokens=event.tokens) for bound in rules)


def _require_passed(event: PromptJudged, decisions: Sequence[Decision]) -> None:
    blocked = [d for d in decisions if d.action == "block"]
    if blocked:
        message = f"The prompt was blocked by {_names(blocked)}."
        raise PolicyError(message, code="content_filter", decisions=decisions)
    failed = [d for d in decisions if d.action == "fail_closed"]
    if not failed:
        return
    status = 400
    too_long = next((d.rule for d in failed if d.is_too_long), None)
    chats_only = [d for d in failed if not d.rule.probe.can_judge(is_plain=event.is_plain)]
    if too_long is not None:
        message = (
            f"The prompt has {event.tokens} tokens, but probe '{too_long.name}' may judge at most "
            f"{too_long.rule.max_tokens}, and the policy blocks what is not judged. Shorten it."
        )
    elif chats_only:
        message = (
            f"No verdict from {_names(chats_only)}: probes that were trained on chats alone cannot "
            "judge plain text, and the policy blocks what is not judged. Use /v1/chat/completions."
        )
    else:
        failure = verdict_failure([decision.rule.name for decision in failed])
        message = f"{failure} The policy blocks what is not judged."
        status = 500
    raise PolicyError(message, code="verdict_failed", decisions=decisions, status=status)


def _names(decisions: Sequence[Decision]) -> str:
    return ", ".join(decision.rule.name for decision in decisions)
