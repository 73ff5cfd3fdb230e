"""What goes out of a text: when a running score counts, what is held back, and who may begin."""

import asyncio
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wordings
from sidelight.engines.base import Finished, PromptClassified, ResponseScored, TextDelta
from sidelight.models.conversation import EncodedPrompt, PlainText, Reads, TokenRole
from sidelight.policy.decisions import PolicyError
from sidelight.policy.enforcement import Classified, Enforcement
from sidelight.policy.hold_back import Ended, HoldBack
from sidelight.policy.rules import BoundRule, Rule
from sidelight.types import Task, Verdict, Verdicts
from worlds.models import TOPICS, untrained_probe

PROMPT = EncodedPrompt((1, 2, 3), (TokenRole.PROMPT,) * 3)


@pytest.fixture(scope="module")
def response_probe(tiny):
    return untrained_probe(tiny, "late", reads=Reads("response"))


def verdict(score, name="late"):
    flagged = score >= 0.5
    label = "toxic" if flagged else "fine"
    return Verdict(name, label, (label,), {"fine": 1 - score, "toxic": score}, flagged)


def holding(probe, **rule):
    """What holds back the text of a response that this probe judges."""
    return HoldBack([BoundRule(probe, Rule("block", **rule))])


def scored(token, *scores):
    return ResponseScored(token, Verdicts(tuple(map(verdict, scores))))


def finished(score, tokens):
    return Finished("stop", 7, tokens, verdicts=Verdicts((verdict(score),)))


@pytest.mark.slow
@settings(max_examples=60)
@given(
    scores=st.lists(st.floats(0, 1), min_size=1, max_size=30),
    final=st.floats(0, 1),
    rule=st.builds(
        Rule,
        mode=st.just("block"),
        threshold=st.floats(0, 1),
        consecutive=st.integers(1, 4),
        warm_up=st.integers(0, 6),
        hold_back=st.integers(0, 6) | st.none(),
    ),
    text_of=st.lists(st.booleans(), min_size=30, max_size=30),
)
def test_hold_back_matches_reference_definition(response_probe, scores, final, rule, text_of):
    """One token at a time, against a definition that looks at the whole response at once."""
    threshold, consecutive, warm_up = rule.threshold, rule.consecutive, rule.warm_up
    holding = HoldBack([BoundRule(response_probe, rule)])
    lag = consecutive if rule.hold_back is None else rule.hold_back
    count = [i > warm_up and scores[i - 1] >= threshold for i in range(1, len(scores) + 1)]
    fires = [i for i in range(consecutive, len(scores) + 1) if all(count[i - consecutive : i])]
    sent, ended, sent_at = [], None, {}
    for i in range(1, len(scores) + 1):
        out = holding.push(TextDelta(f"<{i}>", tokens=i)) if text_of[i - 1] else []
        out += holding.push(scored(i, scores[i - 1]))
        for event in out:
            if isinstance(event, Ended):
                ended = (i, event)
                break
            sent.append(event.tokens)
            sent_at[event.tokens] = i
        if ended:
            break
    assert (ended[0] if ended else None) == (fires[0] if fires else None)
    for token, at in sent_at.items():
        assert at >= token + lag
        assert at >= warm_up + consecutive
        # What was sent had been judged, and did not end a streak.
        assert not fires or at < fires[0]
    if ended:
        assert ended[1].reason == "content_filter"
        return
    *rest, end = holding.push(finished(final, len(scores)))
    texts = [i for i in range(1, len(scores) + 1) if text_of[i - 1]]
    if final >= threshold and texts:
        assert (rest, end.reason) == ([], "content_filter")
    else:
        assert sent + [event.tokens for event in rest] == texts
        assert end.reason == "stop"


def test_unscored_text_is_not_sent(response_probe):
    """An engine that forgets to score, or scores several tokens at once, is a fault, and closes."""
    for tokens, event in ((1, finished(0.0, 2)), (2, scored(2, 0.0)), (5, scored(5, 0.0))):
        holding_back = holding(response_probe, threshold=1.0)
        assert holding_back.push(TextDelta("a", tokens=tokens)) == []
        (end,) = holding_back.push(event)
        assert end.reason == "content_filter"
        assert end.decisions[0].action == "fail_closed"


@pytest.mark.parametrize(
    "events", [[scored(2, 1.0)], [scored(2, 0.0), finished(1.0, 2)]], ids=["midway", "at the end"]
)
def test_flagged_response_is_reported_as_block_even_after_failure(response_probe, events):
    holding_back = holding(response_probe, consecutive=1, on_failure="pass")
    holding_back.push(TextDelta("a", tokens=1))
    assert holding_back.push(scored(1)) == []
    holding_back.push(TextDelta("b", tokens=2))
    *_, (end,) = [holding_back.push(event) for event in events]
    assert end.reason == "content_filter"
    assert (end.decisions[0].action, end.decisions[0].status) == ("block", "flagged")


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_non_finite_score_fails_closed(response_probe, score):
    holding_back = holding(response_probe, threshold=1.0)
    holding_back.push(TextDelta("a", tokens=1))
    (end,) = holding_back.push(scored(1, score))
    assert (end.reason, end.decisions[0].action) == ("content_filter", "fail_closed")


@pytest.mark.parametrize("hold_backs", [(0, 3), (3, 0)])
def test_rule_with_longest_hold_back_decides(tiny, response_probe, hold_backs):
    """Else text would leave that the other rule may still cut."""
    strict = untrained_probe(tiny, "strict", reads=Reads("response"))
    rules = (Rule("block", threshold=1.0, consecutive=1, hold_back=n) for n in hold_backs)
    both = HoldBack([BoundRule(p, r) for p, r in zip((response_probe, strict), rules, strict=True)])
    sent = []
    for token in range(1, 6):
        verdicts = Verdicts((verdict(0.1), verdict(0.1, "strict")))
        both.push(TextDelta(f"{token}", tokens=token))
        sent.append([event.tokens for event in both.push(ResponseScored(token, verdicts))])
    assert sent == [[], [], [], [1], [2]]


def test_streak_counts_any_flagged_label(tiny):
    """Otherwise a text whose tokens are flagged by turns for two labels would pass."""
    topics = untrained_probe(tiny, "topics", task=TOPICS, reads=Reads("response"))
    holding_back = holding(topics, threshold=0.5, consecutive=2)
    for token, (violence, sexual) in enumerate([(0.1, 0.1), (0.9, 0.1), (0.1, 0.9)], 1):
        scores = {"violence": violence, "sexual": sexual}
        verdicts = Verdicts((topics.task.decide("topics", scores, topics.card.label_thresholds),))
        assert holding_back.push(TextDelta("a", tokens=token)) == []
        passed = holding_back.push(ResponseScored(token, verdicts))
    (end,) = passed
    assert (end.reason, end.completion_tokens) == ("content_filter", 3)


@pytest.mark.parametrize(
    ("gap", "cut_at"), [(scored(2), None), (scored(2, math.nan), None), (None, 4)]
)
def test_token_without_verdict_ends_streak(response_probe, gap, cut_at):
    holding_back, ends = holding(response_probe, consecutive=2, on_failure="pass"), []
    rest = [scored(3, 1.0), scored(4, 1.0 if gap is None else 0.0)]
    for event in [scored(1, 1.0), *([] if gap is None else [gap]), *rest]:
        ends += [event.tokens for end in holding_back.push(event) if isinstance(end, Ended)]
    assert ends == ([] if cut_at is None else [cut_at])


def test_empty_answer_passes_unclassified(response_probe):
    (end,) = holding(response_probe).push(Finished("stop", 7, 1, verdicts=Verdicts((), ("late",))))
    assert end.reason == "stop"


class Notes:
    """An observer that keeps the decisions that it hears, and whether its text was given up."""

    was_cancelled = None

    def prompt(self, event, decisions):
        self.of_prompt = decisions

    def read(self, event): ...

    def delta(self): ...

    def end(self, decisions, *, is_cancelled=False):
        if self.was_cancelled is None:
            self.of_end, self.was_cancelled = decisions, is_cancelled


@pytest.fixture(scope="module")
def prompt_probe(tiny):
    return untrained_probe(tiny, "early")


def prompt_event(score):
    return PromptClassified(Verdicts((verdict(score, "early"),)), PROMPT)


def guarded(enforcement, *events):
    async def engine():
        for event in events:
            yield event

    async def passed():
        return [event async for event in enforcement.guard(PlainText("x"), engine())]

    return asyncio.run(passed())


def test_cached_decision_applies_only_to_its_prompt(prompt_probe):
    """Decisions are kept from the engine's question on, but hold for that prompt alone."""
    enforcement = Enforcement([BoundRule(prompt_probe, Rule("block"))], lambda _: Notes())
    assert enforcement.admits(prompt_event(0.1))
    with pytest.raises(PolicyError, match=wordings.BLOCKED_BY.format(probe="early")):
        guarded(enforcement, prompt_event(0.9), Finished("stop", 3, 0))


def test_prompt_is_decided_once_for_engine_observer_and_client(prompt_probe, monkeypatch):
    decided: list[Task] = []
    decide = Task.decide

    def counted(task, *args, **options):
        decided.append(task)
        return decide(task, *args, **options)

    monkeypatch.setattr(Task, "decide", counted)
    notes = Notes()
    enforcement = Enforcement([BoundRule(prompt_probe, Rule("flag"))], lambda _: notes)
    assert enforcement.admits(prompt_event(0.9))
    admitted, ended = guarded(enforcement, prompt_event(0.9), Finished("stop", 3, 0))
    assert isinstance(admitted, Classified)
    assert len(decided) == 1
    assert [decision.action for decision in admitted.decisions] == ["flag"]
    assert notes.of_prompt is admitted.decisions
    assert notes.of_end == ended.decisions
    assert not notes.was_cancelled


def test_client_disconnect_is_recorded_as_cancellation(prompt_probe):
    notes = Notes()
    enforcement = Enforcement([BoundRule(prompt_probe, Rule("flag"))], lambda _: notes)

    async def engine():
        yield prompt_event(0.9)
        yield TextDelta("all that is read ", tokens=1)
        yield Finished("stop", 3, 0)

    async def leave():
        events = enforcement.guard(PlainText("x"), engine())
        read = [await anext(events), await anext(events)]
        await events.aclose()
        return read

    assert isinstance(asyncio.run(leave())[1], TextDelta)
    assert notes.was_cancelled
