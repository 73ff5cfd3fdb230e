"""Rules that defer to a judge: on our own server, and how they are read."""

import asyncio
import logging
import math
import time
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.responses import JSONResponse

from defer_contract import DeferContract, deferring
from policy_contract import ADMIN, CHECKS, LEAK, chat, choices, refusal, verdicts
from sidelight.engines.base import Finished, ResponseScored, TextDelta
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.judges.question import JudgeAnswer
from sidelight.models.conversation import Message, Reads
from sidelight.policy.decisions import Decision, SecondOpinion
from sidelight.policy.enforcement import Enforcement
from sidelight.policy.hold_back import Ended, HoldBack
from sidelight.policy.rules import BoundRule, Defer, Rule
from sidelight.policy.second_stage import SecondStage
from sidelight.probes.card import TrainingRecord
from sidelight.statistics.background import Conversations, Traffic
from sidelight.types import Span, Verdict, Verdicts
from worlds.models import untrained_probe
from worlds.servers import served


@pytest.fixture(scope="module")
def server(subjects, tmp_path_factory):
    home = tmp_path_factory.mktemp("deferring")
    engine = TransformersEngine(subjects.backbone, subjects.probes)
    with (
        served(engine, admin_key=ADMIN) as address,
        deferring(address, engine.model, subjects, home) as live,
    ):
        yield live


@pytest.mark.slow
class TestSidelightServer(DeferContract):
    def test_log_explains_missing_judge_answer(self, server, subjects, caplog):
        server.defers()
        server.judge.answers(JSONResponse({}, status_code=500))
        with caplog.at_level(logging.WARNING, logger="sidelight"):
            assert server.post(chat(subjects.injected)).status_code == 500
        assert "gave no verdict on the input: blocked. Judge 'guardian': status." in caplog.text

    @pytest.mark.parametrize("streamed", [False, True])
    def test_judge_is_asked_about_choices_of_one_request_concurrently(
        self, server, subjects, streamed
    ):
        server.defers()
        policy = server.home / "deferring.toml"
        policy.write_text(policy.read_text().replace(f"threshold = {LEAK}", "threshold = 0.0"))
        server.serve(policy)
        server.judge.most_at_once = 0
        server.judge.says(0.1, after_s=0.2)
        # Different texts, so that each has a question of its own.
        body = {"n": 4, "temperature": 1.5, "seed": 1, "max_tokens": 24, "stream": streamed}
        assert server.post(chat(subjects.benign, **body)).status_code == 200
        assert server.judge.most_at_once > 1

    @pytest.mark.parametrize("kind", ["prompt", "stream", "check", "response"])
    def test_client_disconnect_while_asking_judge_is_counted(self, server, subjects, kind):
        server.defers()
        server.judge.says(0.1, after_s=1)
        path, body = chat(subjects.injected, stream=kind == "stream")
        if kind == "check":
            path, body = CHECKS, {"input": [subjects.injected], "probes": ["injection"]}
        elif kind == "response":
            path, body = chat(subjects.leaking)
        name = "leak" if kind == "response" else "injection"
        series = (
            (f'probe="{name}"', "sidelight_judge_questions_total", 'outcome="cancelled"'),
            (f'probe="{name}"', "sidelight_verdicts_total", 'outcome="unfinished"'),
            ("sidelight_requests_total", f'route="{path}"', 'status="499"'),
        )
        before = [server.counted(*words) for words in series]
        with pytest.raises(httpx.ReadTimeout):
            server.http.post(path, json=server._body(path, body), timeout=0.4)
        assert server.judge.asked
        deadline = time.perf_counter() + 5
        while [server.counted(*words) for words in series] != [count + 1 for count in before]:
            assert time.perf_counter() < deadline
            time.sleep(0.02)


@pytest.mark.slow
def test_other_sidelight_server_decides_deferred_texts(server, subjects):
    policy = server.home / "two-servers.toml"
    probe = subjects.by_name["injection"]
    odds = math.log(subjects.threshold / (1 - subjects.threshold))
    # It decides at 0.5, and the rule would flag every text.
    centred = replace(probe.calibration, shift=(probe.calibration.shift[0] - odds,))
    elsewhere = TransformersEngine(subjects.backbone, [probe.changed(calibration=centred)])
    with served(elsewhere) as address:
        policy.write_text(
            f"""
            [judges.elsewhere]
            url = "{address}/v1"
            model = "{elsewhere.model}"
            kind = "decisions"
            category = "injection"
            retries = 0
            timeout_s = 20
            [input.injection]
            mode = "block"
            threshold = 0.0
            defer = {{ judge = "elsewhere", share = 0.0 }}
            """
        )
        server.serve(policy)
        for text, is_flagged in ((subjects.injected, True), (subjects.benign, False)):
            answer = server.post(chat(text), ADMIN)
            assert (answer.status_code == 400) == is_flagged, answer.text
            if is_flagged:
                assert refusal(answer) == (400, "content_filter")
            else:
                entry = verdicts(answer)["injection"]
                assert (entry["decided_by"], entry["judge"]["changed"]) == ("judge", True)
                # A deferred prompt that passes is answered as without a judge.
                server.serve(server.home / "plain.toml")
                assert choices(answer) == choices(server.post(chat(text)))
                server.serve(policy)
    # It is gone: an unknown text does not pass.
    answer = server.post(chat("Where is the key?"))
    assert refusal(answer) == (500, "verdict_failed")


@pytest.fixture(scope="module")
def response_probe(tiny):
    return untrained_probe(tiny, "late", reads=Reads("response"))


def verdict(score):
    label = "toxic" if score >= 0.5 else "fine"
    scores = {"fine": 1 - score, "toxic": score}
    return Verdict("late", label, (label,), scores, label == "toxic")


def answered(probability):
    return SecondOpinion("guardian", probability)


NO_ANSWER = SecondOpinion("guardian", failures=("timeout",))


def run(response_probe, scores, final, ask, **rule):
    """What each token sends, where a judge is asked, and how the text ends."""
    defer = Defer("guardian", share=0.0, judge_every=rule.pop("judge_every", 4))
    holding = HoldBack([BoundRule(response_probe, Rule("block", defer=defer, **rule))])
    sent, asked, ended = [], [], None
    rest = Finished("stop", 7, len(scores), verdicts=Verdicts((verdict(final),)))
    for number, score in enumerate([*scores, None], 1):
        if score is None:
            passed = list(holding.push(rest))
        else:
            passed = list(holding.push(TextDelta(f"<{number}>", tokens=number)))
            passed += holding.push(ResponseScored(number, Verdicts((verdict(score),))))
        while questions := holding.questions():
            assert not any(isinstance(each, Ended) for each in passed)
            asked.append(number)
            passed += holding.answer({bound.name: ask(number) for bound in questions})
        for each in passed:
            if isinstance(each, Ended):
                ended = each
            else:
                sent.append((each.tokens, number))
        if ended:
            break
    return sent, asked, ended


@pytest.mark.slow
@settings(max_examples=150)
@given(
    scores=st.lists(st.floats(0, 1), min_size=1, max_size=24),
    final=st.floats(0, 1),
    answers=st.lists(st.sampled_from([0.1, 0.9, None]), min_size=26, max_size=26),
    consecutive=st.integers(1, 3),
    warm_up=st.integers(0, 4),
    hold_back=st.integers(0, 5) | st.none(),
    every=st.integers(1, 8),
    on_failure=st.sampled_from(["block", "pass", "probe"]),
)
def test_tokens_that_could_trigger_cut_wait_for_judge(
    response_probe, scores, final, answers, consecutive, warm_up, hold_back, every, on_failure
):
    def ask(number):
        probability = answers[number - 1]
        return NO_ANSWER if probability is None else answered(probability)

    sent, asked, ended = run(
        response_probe,
        scores,
        final,
        ask,
        consecutive=consecutive,
        warm_up=warm_up,
        hold_back=hold_back,
        judge_every=every,
        on_failure=on_failure,
    )
    counts = [i > warm_up and scores[i - 1] >= 0.5 for i in range(1, len(scores) + 1)]
    fires = [i for i in range(consecutive, len(scores) + 1) if all(counts[i - consecutive : i])]
    assert ended is not None
    is_blocked = {None: on_failure != "pass", 0.1: False, 0.9: True}
    stops = [n for n in asked if is_blocked[answers[n - 1]]]
    assert (ended.reason == "content_filter") == bool(stops)
    if stops:
        # Nothing that the streak has written, unless an earlier answer cleared it.
        assert asked[-1] == stops[0]
    for token, at in sent:
        open_fires = [i for i in fires if i <= min(at, len(scores))]
        cleared = max((n for n in asked if n <= at), default=0)
        last = next((i for i in open_fires if i > cleared), None)
        assert last is None or token < last or at > len(scores)
    # Between two questions of the middle are at least so many tokens.
    middle = [n for n in asked if n <= len(scores)]
    assert all(later - earlier >= every for earlier, later in pairwise(middle))
    (decision,) = ended.decisions
    assert (decision.second is not None) == bool(asked)
    if asked:
        assert decision.second.questions == len(asked)


def test_cleared_text_is_sent_and_later_text_waits(response_probe):
    sent, asked, ended = run(
        response_probe, [0.9] * 10, 0.9, lambda _: answered(0.1), consecutive=2
    )
    assert asked == [2, 6, 10, 11]
    assert sent == [(t, 2 if t <= 2 else 6 if t <= 6 else 10) for t in range(1, 11)]
    assert (ended.reason, ended.decisions[0].verdict.flagged) == ("stop", False)
    assert ended.decisions[0].second.is_changed
    assert ended.decisions[0].decided_by == "judge"


def test_enforcement_of_deferring_rule_requires_judges(response_probe):
    defer = Defer("guardian", share=0.0)
    with pytest.raises(AssertionError):
        Enforcement([BoundRule(response_probe, Rule("block", defer=defer))], lambda _: None)


def test_background_share_lowers_defer_threshold(tiny):
    probe = untrained_probe(tiny, "early", threshold=0.9)
    logits = np.linspace(-4, 2, 100)[:, None]
    background = Conversations(logits, np.zeros(100, dtype=np.int64))
    probe = probe.changed(training=TrainingRecord(traffic=Traffic(background, 0)))
    scores = probe.calibration.apply(logits)[:, 0]
    for share in (0.05, 0.2):
        bound = BoundRule(probe, Rule("block", defer=Defer("g", share=share)))
        deferred = (scores >= bound.defer_threshold).mean()
        assert deferred == pytest.approx(share)
    strict = BoundRule(probe, Rule("block", threshold=0.1, defer=Defer("g", share=0.05)))
    assert strict.defer_threshold == 0.1


def test_judge_receives_redacted_text_only():
    questions = []

    class Judges:
        async def ask(self, judge, question):
            questions.append(question)
            return JudgeAnswer(0.1)

    def redacting(spans):
        rule = SimpleNamespace(mode="redact", side="input", name="pii")
        return Decision(rule, Verdict("pii", "NAME", ("NAME",), {}, True, spans=spans), "redact")

    rule = SimpleNamespace(rule=Rule("block", defer=Defer("guardian")))
    text = [Message("user", "I am An\u200bn."), Message("user", "Call Bob.")]
    spans = [Span(5, 9, "NAME", message=0), Span(5, 8, "NAME", message=1)]
    unclassified = replace(redacting(()), verdict=None)
    decided = ((redacting(spans), True), (redacting(None), False), (unclassified, False))
    for decision, wanted in decided:
        second_stage = SecondStage(Judges(), text, [decision], invisible="strip")
        opinion = asyncio.run(second_stage.opinion(rule))
        assert (opinion.probability is not None) == wanted
    (question,) = questions
    assert [t.content for t in question.turns] == ["I am [NAME].", "Call [NAME]."]
    assert opinion.failures == ("not_redacted",)
