"""Text on its way out: sent once it is judged, cut where a blocking rule says so.

Every token is judged before it is sent, with ``hold_back`` more behind it. Nothing is sent while a
rule is still warming up. The verdict on the whole text decides on what is left at its end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sidelight.engines.base import Event, Finished, PromptJudged, ResponseScored, TextDelta
from sidelight.policy.decisions import Decision, decide, too_long, unfinished
from sidelight.policy.rules import BoundRule, StreamingRule, Watched
from sidelight.types import Verdict


@dataclass(frozen=True)
class End:
    """The answer is complete, or cut.

    Attributes:
        finished: The last event.
        decisions: What led to it, of every probe that judges the output.
    """

    finished: Finished
    decisions: tuple[Decision, ...]


class HoldBack:
    """One answer's text between the engine and the client.

    Args:
        rules: Those of the output; without a blocking one, nothing is held.
        prompt_tokens: Of the request, for the usage of an answer that is cut.
    """

    def __init__(self, rules: Sequence[BoundRule], *, prompt_tokens: int):
        self._rules = rules
        self._tripwires = [_Tripwire(bound) for bound in rules if bound.is_blocking]
        self._prompt_tokens = prompt_tokens
        self._held: list[TextDelta] = []
        self._scored = 0
        self._written = 0
        self._running: dict[str, Verdict] = {}

    def push(self, event: Event) -> list[Event | End]:
        """What may go out because of the event; nothing may follow an ``End``."""
        match event:
            case TextDelta():
                self._written = event.tokens
                if not self._tripwires:
                    return [event]
                self._held.append(event)
                return []
            case ResponseScored():
                return self._after_score(event)
            case Finished():
                return self._after_all(event)
            case PromptJudged():
                return [event]

    def unfinished(self) -> list[Decision]:
        """What is known of the text if it is given up now."""
        return [
            unfinished(bound, judged(bound, self._running, self._written)) for bound in self._rules
        ]

    def _after_score(self, event: ResponseScored) -> list[Event | End]:
        self._scored = event.tokens
        self._running = verdicts = by_probe(event.verdicts)
        cuts = [wire.step(verdicts, tokens=event.tokens) for wire in self._tripwires]
        if any(cuts):
            return [self._cut(event, verdicts)]
        if any(event.tokens < wire.blind_until for wire in self._tripwires):
            return []
        safe = event.tokens - max((wire.held_tokens for wire in self._tripwires), default=0)
        return list(self._release(safe))

    def _after_all(self, event: Finished) -> list[Event | End]:
        verdicts = by_probe(event.verdicts)
        # Tokens without text are told too, by their log-probabilities.
        is_judged = self._scored >= self._written + len(event.logprobs)
        for wire in self._tripwires:
            wire.finish(verdicts, tokens=self._written, is_judged=is_judged)
        if any(wire.is_cut for wire in self._tripwires):
            return [self._cut(event, verdicts)]
        decisions = self._decisions(verdicts)
        return [*self._release(self._written), End(self._finished(event, decisions), decisions)]

    def _release(self, tokens: int) -> list[TextDelta]:
        """The held text that comes from the first tokens."""
        released = [delta for delta in self._held if delta.tokens <= tokens]
        self._held = self._held[len(released) :]
        return released

    def _cut(self, event: ResponseScored | Finished, verdicts: Mapping[str, Verdict]) -> End:
        self._held = []
        decisions = self._decisions(verdicts)
        finished = Finished(
            reason="content_filter",
            prompt_tokens=self._prompt_tokens,
            completion_tokens=max(self._scored, self._written),
        )
        return End(self._finished(finished, decisions), decisions)

    def _decisions(self, verdicts: Mapping[str, Verdict]) -> tuple[Decision, ...]:
        wires = {wire.rule.name: wire for wire in self._tripwires}
        return tuple(
            wires[bound.name].decision(verdicts)
            if bound.name in wires
            else decide(bound, judged(bound, verdicts, self._written))
            for bound in self._rules
        )

    def _finished(self, event: Finished, decisions: Sequence[Decision]) -> Finished:
        """The event with the verdicts as they were decided."""
        return replace(
            event,
            verdicts=tuple(d.verdict for d in decisions if d.verdict is not None),
            failed=tuple(d.rule.name for d in decisions if d.verdict is None),
            too_long=too_long(decisions, max(self._scored, self._written)),
        )


class _Tripwire:
    """What one blocking rule has seen of a text."""

    def __init__(self, bound: BoundRule):
        self.rule = bound
        self.held_tokens = bound.rule.held_tokens
        self.blind_until = bound.rule.warm_up + bound.rule.consecutive
        self.is_cut = False
        self._flagged = False
        self._failed = False
        self._tokens = 0
        self._streaming: dict[str, StreamingRule] = bound.streaming_rules()
        self._watched = dict.fromkeys(self._streaming, Watched())

    def step(self, verdicts: Mapping[str, Verdict], *, tokens: int) -> bool:
        """Whether the text is cut after one more token; a token that was left out is a failure."""
        verdict, expected = judged(self.rule, verdicts, tokens), self._tokens + 1
        self._tokens = tokens
        if verdict is None or tokens != expected:
            self._fail()
            return self.is_cut
        for label, rule in self._streaming.items():
            self._watched[label] = rule.advance(self._watched[label], verdict.probabilities[label])
        if any(watched.has_fired for watched in self._watched.values()):
            self._flag()
        return self.is_cut

    def finish(self, verdicts: Mapping[str, Verdict], *, tokens: int, is_judged: bool) -> None:
        """Takes the verdict on the whole text; an empty one has nothing to judge."""
        if not tokens:
            return
        verdict = judged(self.rule, verdicts, tokens)
        if verdict is None or not is_judged:
            self._fail()
        elif self.rule.decide(verdict).flagged:
            self._flag()

    def decision(self, verdicts: Mapping[str, Verdict]) -> Decision:
        """What it came to."""
        if self._failed and not self._flagged:
            return decide(self.rule, None)
        verdict = verdicts.get(self.rule.name)
        if verdict is None:
            return Decision(self.rule, None, "none")
        decided = self.rule.decide(verdict)
        return Decision(self.rule, decided, "block" if self.is_cut else "none")

    def _flag(self) -> None:
        self._flagged = self.is_cut = True

    def _fail(self) -> None:
        self._failed = True
        self.is_cut = self.is_cut or self.rule.fails_closed


def by_probe(verdicts: Sequence[Verdict]) -> dict[str, Verdict]:
    """The verdicts by their probe's name."""
    return {verdict.probe: verdict for verdict in verdicts}


def judged(bound: BoundRule, verdicts: Mapping[str, Verdict], tokens: int) -> Verdict | None:
    """The probe's verdict; None where it gave none, or the text is longer than it may judge."""
    return None if bound.is_too_long(tokens) else verdicts.get(bound.name)
