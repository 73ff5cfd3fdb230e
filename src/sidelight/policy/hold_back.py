"""Text between engine and client: sent once it is judged, cut or redacted if a rule says so.

A token is sent once it and ``hold_back`` more are judged, and nothing is sent before every rule
could have cut the text. With a warm-up of 3 tokens, 2 in a row that cut, and 2 held back:

    last token judged    1  2  3  4   5   6  7  8
    tokens then sent     -  -  -  -  1-3  4  5  6

If tokens 7 and 8 are over the threshold, the text is cut at 8, and 6, 7 and 8 are never sent. The
verdict on the whole text decides about the last tokens at its end. A single token over the
threshold is often noise, so a rule wants several in a row.

A rule that redacts holds back what a later token can still label: the words of the last tokens, as
many as its probe looks ahead. It cuts nothing unless there is no verdict. Where a limit or a stop
ends the text, nothing follows that could label its last words, so they are not sent.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sidelight.engines.base import (
    Event,
    Finished,
    FinishReason,
    PromptJudged,
    ResponseScored,
    TextDelta,
)
from sidelight.policy.decisions import Decision, decide
from sidelight.policy.redaction import redacted
from sidelight.policy.rules import BoundRule
from sidelight.types import Judgement, Span


@dataclass(frozen=True)
class Ended:
    """The answer is complete, or cut.

    Attributes:
        reason: ``content_filter`` where it was cut.
        completion_tokens: Tokens written.
        decisions: What led to the end, of every probe that judges the output.
    """

    reason: FinishReason
    completion_tokens: int
    decisions: tuple[Decision, ...]


def redacted_spans(rules: Iterable[BoundRule], judgement: Judgement) -> list[Span]:
    """The words of an answer that rules redact."""
    return [
        span
        for bound in rules
        if bound.is_redacting and (verdict := judgement.verdict(bound.name)) is not None
        for span in bound.decide(verdict).spans or ()
    ]


class HoldBack:
    """One answer's text between the engine and the client, under the rules of the output.

    Without a rule that blocks or redacts, each piece of text is sent as it comes.
    """

    def __init__(self, rules: Sequence[BoundRule]):
        self._rules = rules
        self._enforced = {bound.name: _RuleState(bound) for bound in rules if bound.is_enforced}
        self._redacts = any(bound.is_redacting for bound in rules)
        self._held: list[TextDelta] = []
        # All that was written, and how many characters of it were released.
        self._text = ""
        self._released = 0
        # Characters that keep their spans, whatever follows; None: nobody knows.
        self._settled: int | None = None
        self._scored_tokens = 0
        self._written_tokens = 0
        self._running = Judgement()

    def push(self, event: Event) -> Sequence[TextDelta | Ended]:
        """The text that the event allows to be sent; nothing may follow an ``Ended``."""
        match event:
            case TextDelta():
                self._written_tokens = event.tokens
                if not self._enforced:
                    return [event]
                self._held.append(event)
                self._text += event.text
                return []
            case ResponseScored():
                return self._after_score(event)
            case Finished():
                return self._after_all(event)
            case PromptJudged():
                return []

    def unfinished(self) -> list[Decision]:
        """The end of a text that is cancelled now, with what is known of it; nothing follows."""
        known = [decide(bound, self._running, tokens=self._written_tokens) for bound in self._rules]
        return [replace(decision, action="none", is_unfinished=True) for decision in known]

    def _after_score(self, event: ResponseScored) -> Sequence[TextDelta | Ended]:
        self._scored_tokens, self._settled = event.tokens, event.settled
        self._running = event.judgement
        states = self._enforced.values()
        for state in states:
            state.step(self._running, tokens=event.tokens)
        if any(state.is_cut for state in states):
            return [self._cut(self._running)]
        if any(event.tokens < state.first_decidable_token for state in states):
            return []
        tokens = event.tokens - max((state.held_tokens for state in states), default=0)
        characters = self._final_characters(event.settled or 0) if self._redacts else None
        return self._release(tokens, self._running, characters=characters)

    def _final_characters(self, settled: int) -> int:
        """The first characters whose placeholders are final.

        A later word may join the last span, so a rule that ignores spans cannot tell yet.
        """
        for bound in self._rules:
            verdict = self._running.verdict(bound.name)
            if bound.is_redacting and bound.rule.ignore is not None and verdict is not None:
                for span in verdict.spans or ():
                    if span.end >= settled:
                        settled = min(settled, span.start)
        return settled

    def _after_all(self, event: Finished) -> Sequence[TextDelta | Ended]:
        judgement, tokens = event.judgement, self._written_tokens
        for state in self._enforced.values():
            state.finish(judgement, tokens=tokens, is_judged=self._scored_tokens >= tokens)
        if any(state.is_cut for state in self._enforced.values()):
            return [self._cut(judgement)]
        decisions = self._decisions(judgement)
        end = Ended(event.reason, event.completion_tokens, decisions)
        if self._redacts and event.is_stopped and self._settled is not None:
            self._drop_unsettled_words(self._settled, redacted_spans(self._rules, judgement))
        return [*self._release(tokens, judgement), end]

    def _release(
        self, tokens: int, judgement: Judgement, *, characters: int | None = None
    ) -> list[TextDelta]:
        """The held text that comes from the first tokens, and ends within the first characters."""
        spans = redacted_spans(self._rules, judgement)
        released: list[TextDelta] = []
        while self._held and self._held[0].tokens <= tokens:
            end = self._released + len(self._held[0].text)
            if characters is not None and end > characters:
                break
            delta = self._held.pop(0)
            if spans:
                text = redacted(self._text, spans, start=self._released, end=end)
                delta = replace(delta, text=text)
            released.append(delta)
            self._released = end
        return released

    def _drop_unsettled_words(self, characters: int, spans: Iterable[Span]) -> None:
        """Drops the words held after the first characters that are not labelled."""
        for span in sorted(spans):
            if not self._text[characters : span.start].strip():
                characters = max(characters, span.end)
        if not re.search(r"\w", self._text[characters:]):
            return
        self._text, start = self._text[:characters], self._released
        for i, delta in enumerate(self._held):
            end = start + len(delta.text)
            self._held[i] = replace(delta, text=self._text[start:end])
            start = end

    def _cut(self, judgement: Judgement) -> Ended:
        self._held.clear()
        tokens = max(self._scored_tokens, self._written_tokens)
        return Ended("content_filter", tokens, self._decisions(judgement))

    def _decisions(self, judgement: Judgement) -> tuple[Decision, ...]:
        tokens = max(self._scored_tokens, self._written_tokens)
        return tuple(
            self._enforced[bound.name].decision(judgement, tokens=tokens)
            if bound.is_enforced
            else decide(bound, judgement, tokens=self._written_tokens)
            for bound in self._rules
        )


class _RuleState:
    """The state of a rule that blocks or redacts: scores of a text so far, and whether it is cut.

    Attributes:
        held_tokens: How many judged tokens are held back.
        first_decidable_token: The first token at which the rule can cut, once its warm-up and a
            whole streak are over. Nothing is sent before it is judged.
    """

    def __init__(self, bound: BoundRule):
        rule = bound.rule
        hold_back = rule.consecutive if rule.hold_back is None else rule.hold_back
        # What a rule that redacts holds back are characters.
        self.held_tokens = hold_back if bound.is_blocking else 0
        self.first_decidable_token = rule.warm_up + rule.consecutive if bound.is_blocking else 0
        self._bound = bound
        self._has_flagged = False
        self._has_failed = False
        self._tokens = 0
        # Tokens in a row, up to the last one, of which a label counts: the same one or another.
        self._streak = 0

    @property
    def is_cut(self) -> bool:
        """Whether the rule cuts the text: it flagged, or could not judge and fails closed."""
        return self._has_flagged or (self._has_failed and self._bound.fails_closed)

    def step(self, judgement: Judgement, *, tokens: int) -> None:
        """Takes the scores of one more token; one without a score is a failure."""
        verdict = decide(self._bound, judgement, tokens=tokens).verdict
        is_next, self._tokens = tokens == self._tokens + 1, tokens
        if verdict is not None and not all(map(math.isfinite, verdict.probabilities.values())):
            verdict = None
        flags = verdict is not None and verdict.flagged
        counts = flags and self._bound.is_blocking and tokens > self._bound.rule.warm_up
        self._has_failed |= verdict is None or not is_next
        self._streak = (self._streak if is_next else 0) + 1 if counts else 0
        self._has_flagged |= self._streak >= self._bound.rule.consecutive

    def finish(self, judgement: Judgement, *, tokens: int, is_judged: bool) -> None:
        """Takes the verdict on the whole text; an empty one has nothing to judge."""
        if not tokens:
            return
        verdict = decide(self._bound, judgement, tokens=tokens).verdict
        if verdict is None or not is_judged:
            self._has_failed = True
        else:
            self._has_flagged |= verdict.flagged and self._bound.is_blocking

    def decision(self, judgement: Judgement, *, tokens: int) -> Decision:
        if self._has_failed and not self._has_flagged:
            return decide(self._bound, Judgement(), tokens=tokens)
        if self._bound.is_redacting:
            return decide(self._bound, judgement, tokens=tokens)
        verdict = judgement.verdict(self._bound.name)
        if verdict is None:
            return Decision(self._bound, None, "none")
        action = "block" if self._has_flagged else "none"
        return Decision(self._bound, self._bound.decide(verdict), action)
