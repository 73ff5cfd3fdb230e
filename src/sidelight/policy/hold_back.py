"""The text between engine and client: sent once it is classified, and ended or redacted by rules.

A token is sent once it and ``hold_back`` further tokens are classified, and nothing is sent before
every rule could have ended the text. With a warm-up of 3 tokens, ``consecutive`` of 2 and
``hold_back`` of 2:

    last token read      1  2  3  4   5   6  7  8
    tokens then sent     -  -  -  -  1-3  4  5  6

If tokens 7 and 8 are above the threshold, the text ends at 8, and 6, 7 and 8 are never sent. The
verdict on the whole text decides on the last tokens at its end. A single token above the threshold
is often noise, so a rule requires several in a row.

A rule that redacts holds back what a later token can still label: the words of the last tokens, as
many as its probe looks ahead. It ends the text only if there is no verdict. If a limit or a stop
string ends the text, nothing follows that could label its last words, so they are not sent.

A rule that defers does not end the text directly. When its streak is complete, its judge is asked
about the text so far, and the text after the last answer is held back until the next one.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from sidelight.engines.base import (
    Event,
    Finished,
    FinishReason,
    PromptClassified,
    ResponseScored,
    TextDelta,
)
from sidelight.policy.decisions import Decision, SecondOpinion, decide
from sidelight.policy.redaction import redacted
from sidelight.policy.rules import BoundRule
from sidelight.policy.second_stage import opinion_verdict
from sidelight.types import Span, Verdict, Verdicts


@dataclass(frozen=True)
class Ended:
    """The response is complete, or a rule has ended it.

    Attributes:
        reason: ``content_filter`` if a rule has ended it.
        completion_tokens: Number of generated tokens.
        decisions: The decision of every probe that classifies the output.
    """

    reason: FinishReason
    completion_tokens: int
    decisions: tuple[Decision, ...]


def redacted_spans(rules: Iterable[BoundRule], verdicts: Verdicts) -> list[Span]:
    """The spans of a response that rules redact."""
    return [
        span
        for bound in rules
        if bound.is_redacting and (verdict := verdicts.verdict(bound.name)) is not None
        for span in bound.decide(verdict).known_spans
    ]


class HoldBack:
    """The text of one response between the engine and the client, under the output rules.

    Without a rule that blocks or redacts, text is sent immediately.
    """

    def __init__(self, rules: Sequence[BoundRule]):
        self._rules = rules
        self._enforced = {bound.name: _RuleState(bound) for bound in rules if bound.is_enforced}
        self._redacts = any(bound.is_redacting for bound in rules)
        self._keeps_text = bool(self._enforced) or any(bound.rule.defer for bound in rules)
        self._pending: list[TextDelta] = []
        # The generated text, and the number of its characters that were released.
        self._text = ""
        self._released = 0
        # Number of leading characters whose spans are final; None if unknown.
        self._final_end: int | None = None
        self._scored_tokens = 0
        self._written_tokens = 0
        self._running = Verdicts()
        # The text is complete, but a judge is still being asked about it.
        self._finished: Finished | None = None

    @property
    def text(self) -> str:
        """The generated text so far, redacted by the rules."""
        return redacted(self._text, redacted_spans(self._rules, self._running))

    def questions(self) -> list[BoundRule]:
        """The rules whose judges must be asked about ``text`` before anything else happens."""
        tokens, is_end = self._scored_tokens, self._finished is not None
        states = self._enforced.values()
        if any(state.is_cut for state in states):
            return []
        return [state.bound for state in states if state.is_due(tokens=tokens, is_end=is_end)]

    def answer(self, opinions: Mapping[str, SecondOpinion]) -> Sequence[TextDelta | Ended]:
        """Apply the opinions on ``questions`` by rule; return the text that may be sent, or its
        end.
        """
        for name, opinion in opinions.items():
            self._enforced[name].answer(opinion, tokens=self._scored_tokens)
        if self._finished is not None:
            return self._end(self._finished)
        return self._after_step()

    def push(self, event: Event) -> Sequence[TextDelta | Ended]:
        """Process an event; return the text that may be sent. Nothing may follow an ``Ended``."""
        match event:
            case TextDelta():
                self._written_tokens = event.tokens
                if self._keeps_text:
                    self._text += event.text
                if not self._enforced:
                    return [event]
                self._pending.append(event)
                return []
            case ResponseScored():
                return self._after_score(event)
            case Finished():
                return self._after_all(event)
            case PromptClassified():
                return []

    def unfinished(self) -> list[Decision]:
        """End a text that is being cancelled, with what is known so far; nothing follows."""
        known = [decide(bound, self._running, tokens=self._written_tokens) for bound in self._rules]
        return [
            replace(
                d, action="none", is_unfinished=True, deferred=None, second=self._asked(d.rule.name)
            )
            for d in known
        ]

    def _asked(self, name: str) -> SecondOpinion | None:
        """What a rule's judge was asked of a text that is cancelled now."""
        if (state := self._enforced.get(name)) is None:
            return None
        return state.asked(is_due=name in {bound.name for bound in self.questions()})

    def _after_score(self, event: ResponseScored) -> Sequence[TextDelta | Ended]:
        self._scored_tokens, self._final_end = event.tokens, event.final_characters
        self._running = event.verdicts
        for state in self._enforced.values():
            state.step(self._running, tokens=event.tokens)
        return self._after_step()

    def _after_step(self) -> Sequence[TextDelta | Ended]:
        states, tokens = self._enforced.values(), self._scored_tokens
        if any(state.is_cut for state in states):
            return [self._cut(self._running)]
        if any(tokens < state.first_decidable_token for state in states):
            return []
        tokens = min((state.released_tokens(tokens) for state in states), default=tokens)
        characters = self._final_characters(self._final_end or 0) if self._redacts else None
        return self._release(tokens, self._running, characters=characters)

    def _final_characters(self, final: int) -> int:
        """Number of leading characters whose placeholders are final.

        A later word may extend the last span, so a rule that ignores spans cannot decide yet.
        """
        for bound in self._rules:
            verdict = self._running.verdict(bound.name)
            if bound.is_redacting and bound.rule.ignore is not None and verdict is not None:
                for span in verdict.known_spans:
                    if span.end >= final:
                        final = min(final, span.start)
        return final

    def _after_all(self, event: Finished) -> Sequence[TextDelta | Ended]:
        verdicts, tokens = event.verdicts, self._written_tokens
        for state in self._enforced.values():
            state.finish(verdicts, tokens=tokens, is_scored=self._scored_tokens >= tokens)
        self._running, self._finished = verdicts, event
        return [] if self.questions() else self._end(event)

    def _end(self, event: Finished) -> Sequence[TextDelta | Ended]:
        verdicts, tokens = event.verdicts, self._written_tokens
        if any(state.is_cut for state in self._enforced.values()):
            return [self._cut(verdicts)]
        decisions = self._decisions(verdicts)
        end = Ended(event.reason, event.completion_tokens, decisions)
        if self._redacts and event.is_stopped and self._final_end is not None:
            self._drop_unsettled_words(self._final_end, redacted_spans(self._rules, verdicts))
        return [*self._release(tokens, verdicts), end]

    def _release(
        self, tokens: int, verdicts: Verdicts, *, characters: int | None = None
    ) -> list[TextDelta]:
        """Release the held text from the first tokens that ends within the first characters."""
        spans = redacted_spans(self._rules, verdicts)
        released: list[TextDelta] = []
        while self._pending and self._pending[0].tokens <= tokens:
            end = self._released + len(self._pending[0].text)
            if characters is not None and end > characters:
                break
            text = redacted(self._text, spans, start=self._released, end=end)
            released.append(replace(self._pending.pop(0), text=text))
            self._released = end
        return released

    def _drop_unsettled_words(self, characters: int, spans: Iterable[Span]) -> None:
        """Drop the words held after the first characters that are not labelled."""
        for span in sorted(spans):
            if not self._text[characters : span.start].strip():
                characters = max(characters, span.end)
        if not re.search(r"\w", self._text[characters:]):
            return
        self._text, start = self._text[:characters], self._released
        for i, delta in enumerate(self._pending):
            end = start + len(delta.text)
            self._pending[i] = replace(delta, text=self._text[start:end])
            start = end

    def _cut(self, verdicts: Verdicts) -> Ended:
        self._pending.clear()
        tokens = max(self._scored_tokens, self._written_tokens)
        return Ended("content_filter", tokens, self._decisions(verdicts))

    def _decisions(self, verdicts: Verdicts) -> tuple[Decision, ...]:
        tokens = max(self._scored_tokens, self._written_tokens)
        return tuple(
            self._enforced[bound.name].decision(verdicts, tokens=tokens)
            if bound.is_enforced
            else decide(bound, verdicts, tokens=self._written_tokens)
            for bound in self._rules
        )


class _RuleState:
    """The state of a rule that blocks or redacts: scores so far, and whether it ends the text.

    Attributes:
        bound: The rule.
        first_decidable_token: The first token at which the rule can end the text, after its warm-up
            and a full streak. Nothing is sent before it is classified.
    """

    def __init__(self, bound: BoundRule):
        rule = bound.rule
        hold_back = rule.consecutive if rule.hold_back is None else rule.hold_back
        self.bound = bound
        # A rule that redacts holds back characters.
        self._hold_back_tokens = hold_back if bound.is_blocking else 0
        self.first_decidable_token = rule.warm_up + rule.consecutive if bound.is_blocking else 0
        self._has_flagged = False
        self._has_failed = False
        self._tokens = 0
        # Number of latest consecutive tokens with a counting label, the same or different ones.
        self._streak = _Streak(rule.consecutive)
        self._deferral = None if rule.defer is None else _Deferral(bound, rule.defer.judge_every)

    @property
    def is_cut(self) -> bool:
        """Whether the rule ends the text: it flagged, or had no verdict and fails closed."""
        return self._has_flagged or (self._has_failed and self.bound.fails_closed)

    def released_tokens(self, tokens: int) -> int:
        """Number of tokens that may be sent, given the number of classified tokens."""
        if self._deferral is not None:
            return self._deferral.released_tokens(tokens, self._hold_back_tokens)
        return tokens - self._hold_back_tokens

    def is_due(self, *, tokens: int, is_end: bool) -> bool:
        """Whether its judge must be asked now."""
        return self._deferral is not None and self._deferral.is_due(tokens, is_end=is_end)

    def answer(self, opinion: SecondOpinion, *, tokens: int) -> None:
        """Apply the judge's opinion on the text up to this token."""
        assert self._deferral is not None, "only rules that defer have a judge"
        flagged = self._deferral.answer(opinion, tokens)
        if flagged is None:
            self._has_failed = True
        else:
            self._has_flagged |= flagged

    def asked(self, *, is_due: bool) -> SecondOpinion | None:
        """What its judge was asked of a text that is cancelled; ``is_due``: with no answer yet."""
        return None if self._deferral is None else self._deferral.asked(is_due=is_due)

    def step(self, verdicts: Verdicts, *, tokens: int) -> None:
        """Apply the scores of another token; a missing score is a failure."""
        verdict = decide(self.bound, verdicts, tokens=tokens).verdict
        is_next, self._tokens = tokens == self._tokens + 1, tokens
        if verdict is not None and not all(map(math.isfinite, verdict.probabilities.values())):
            verdict = None
        can_cut = self.bound.is_blocking and tokens > self.bound.rule.warm_up
        flags = verdict is not None and verdict.flagged and can_cut
        self._has_failed |= verdict is None or not is_next
        is_complete = self._streak.step(counts=flags, is_next=is_next)
        if self._deferral is None:
            self._has_flagged |= is_complete
        elif verdict is not None:
            self._deferral.step(verdict, tokens, is_next=is_next, can_cut=can_cut)
            if is_complete:
                self._deferral.is_flagged_by_probe = True

    def finish(self, verdicts: Verdicts, *, tokens: int, is_scored: bool) -> None:
        """Apply the verdict on the whole text; an empty text is not classified."""
        if not tokens:
            return
        verdict = decide(self.bound, verdicts, tokens=tokens).verdict
        if verdict is None or not is_scored:
            self._has_failed = True
        elif self._deferral is not None:
            self._deferral.finish(verdict, tokens)
        else:
            self._has_flagged |= verdict.flagged and self.bound.is_blocking

    def decision(self, verdicts: Verdicts, *, tokens: int) -> Decision:
        second = None if self._deferral is None else self._deferral.opinion(self._has_flagged)
        if self._has_failed and not self._has_flagged:
            return replace(decide(self.bound, Verdicts(), tokens=tokens), second=second)
        if self.bound.is_redacting:
            return decide(self.bound, verdicts, tokens=tokens)
        verdict = verdicts.verdict(self.bound.name)
        if verdict is None:
            return Decision(self.bound, None, "none", second=second)
        verdict = self.bound.decide(verdict)
        if second is not None:
            verdict = opinion_verdict(self.bound, verdict, is_flagged=self._has_flagged)
        action = "block" if self._has_flagged else "none"
        return Decision(self.bound, verdict, action, second=second)


class _Streak:
    """A streak of consecutive counting tokens."""

    def __init__(self, wanted: int):
        self._wanted, self._length = wanted, 0

    def step(self, *, counts: bool, is_next: bool) -> bool:
        """Apply another token; return whether the streak is complete."""
        self._length = (self._length if is_next else 0) + 1 if counts else 0
        return self._length >= self._wanted


class _Deferral:
    """Pending questions to a judge about a text, and its answers.

    Attributes:
        is_flagged_by_probe: Whether the probe alone would have ended the text since the last
            answer.
    """

    def __init__(self, bound: BoundRule, every: int):
        self._bound, self._every = bound, every
        self._streak = _Streak(bound.rule.consecutive)
        self._scored: Verdict | None = None
        # The first token since the last answer at which the streak was complete.
        self._open: int | None = None
        self._asked: int | None = None
        # Number of tokens cleared by the last answer.
        self._passed = 0
        self._opinion: SecondOpinion | None = None
        self._has_probe_flagged = False
        self.is_flagged_by_probe = False

    def step(self, verdict: Verdict, tokens: int, *, is_next: bool, can_cut: bool) -> None:
        self._scored = verdict
        counts = can_cut and self._bound.defers(verdict)
        if self._streak.step(counts=counts, is_next=is_next) and self._open is None:
            self._open = tokens

    def finish(self, verdict: Verdict, tokens: int) -> None:
        self._scored = verdict
        self.is_flagged_by_probe |= verdict.flagged
        # The client has cached the answer to a repeated question.
        if self._bound.defers(verdict) and self._open is None:
            self._open = tokens

    def is_due(self, tokens: int, *, is_end: bool) -> bool:
        if self._open is None:
            return False
        return is_end or self._asked is None or tokens - self._asked >= self._every

    def released_tokens(self, tokens: int, hold_back: int) -> int:
        if self._open is None:
            return max(self._passed, tokens - hold_back)
        return max(self._passed, min(tokens, self._open - 1) - hold_back)

    def answer(self, opinion: SecondOpinion, tokens: int) -> bool | None:
        """Whether the text is flagged; None if unknown, where ``on_failure`` applies."""
        self._has_probe_flagged |= self.is_flagged_by_probe
        self._opinion = opinion if self._opinion is None else self._opinion + opinion
        if opinion.probability is not None:
            assert self._scored is not None, "a judge is asked about a scored text"
            is_flagged = self._bound.agrees(self._scored, opinion.probability)
        elif self._bound.rule.on_failure == "probe":
            is_flagged = self.is_flagged_by_probe
        else:
            is_flagged = None
        self._asked = self._passed = tokens
        self._open, self.is_flagged_by_probe = None, False
        return is_flagged

    def asked(self, *, is_due: bool) -> SecondOpinion | None:
        if not is_due:
            return self._opinion
        assert self._bound.rule.defer is not None, "only rules that defer have questions"
        unanswered = SecondOpinion(self._bound.rule.defer.judge, failures=("cancelled",))
        return unanswered if self._opinion is None else self._opinion + unanswered

    def opinion(self, is_flagged: bool) -> SecondOpinion | None:
        if self._opinion is None:
            return None
        return replace(self._opinion, is_changed=is_flagged != self._has_probe_flagged)
