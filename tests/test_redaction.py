"""Labelled words are replaced before they leave: in answers, and in what a gateway sends on."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wordings
from policy_contract import CHATS, GUARDRAIL, choices
from sidelight.engines.annotation import AnswerSpans
from sidelight.engines.base import Finished, ResponseScored, TextDelta
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.errors import SidelightError
from sidelight.policy.decisions import decide
from sidelight.policy.hold_back import HoldBack
from sidelight.policy.ignoring import Ignore
from sidelight.policy.redaction import redacted
from sidelight.policy.rules import (
    BoundRule,
    Policy,
    Rule,
    read_policy,
    require_policy_applies,
)
from sidelight.types import Span, Verdict, Verdicts
from worlds.models import NAMES_AND_PLACES, broken, spans_probe, untrained_probe
from worlds.servers import in_process

QUESTION = [{"role": "user", "content": "Who is it?"}]


@pytest.fixture(scope="module")
def response_probe(tiny):
    return spans_probe(tiny, "late", side="response")


@pytest.fixture(scope="module")
def prompt_probe(tiny):
    return spans_probe(tiny, "early")


# Pieces of words, blanks and marks, of one to five characters.
CHUNK = st.text(st.sampled_from("ab1'é\u0301\u200d李_ \n.,("), min_size=1, max_size=5)
SCORE = st.sampled_from([0.0, 0.0, 0.0, 0.95])


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(data=st.data(), lookahead=st.integers(0, 4), ignores=st.booleans())
def test_streamed_response_equals_redacted_full_text(response_probe, data, lookahead, ignores):
    """With a rule that ignores words, those stay, unless a later word joins them."""
    response_probe.mechanism.lookahead = lookahead
    chunks = data.draw(st.lists(CHUNK, min_size=1, max_size=25))
    count, text = len(chunks), "".join(chunks)
    ends = np.cumsum([*map(len, chunks)]).tolist()
    places = [*zip([0, *ends], ends, strict=False)]
    final = data.draw(st.lists(st.tuples(SCORE, SCORE), min_size=count, max_size=count))

    def labels(scores):
        return [
            (token, NAMES_AND_PLACES.labels[label], score)
            for token, row in enumerate(scores)
            for label, score in enumerate(row)
            if score
        ]

    def annotated(scores):
        verdict = Verdict("late", "NAME", (), {"NAME": 0.5, "PLACE": 0.5}, flagged=False)
        verdicts = Verdicts((verdict,), token_labels={"late": labels(scores)})
        return answer_spans.annotate(verdicts)

    spans = response_probe.spans.labelled_spans(
        text, places, labels(final), NAMES_AND_PLACES.labels
    )
    ignored = {words for span in spans for words in span.words.split()[:1]} if ignores else set()
    rule = Rule("redact", ignore=Ignore(words=tuple(ignored)) if ignores else None)
    answer_spans, holding = (
        AnswerSpans([response_probe]),
        HoldBack([BoundRule(response_probe, rule)]),
    )
    sent, waiting = "", 0
    for tokens, chunk in enumerate(chunks, start=1):
        answer_spans.push(chunk)
        waiting += 1
        # An engine may send several tokens at once.
        if tokens == count or data.draw(st.booleans()):
            holding.push(TextDelta("".join(chunks[tokens - waiting : tokens]), tokens=tokens))
            waiting = 0
        # What is not final yet is drawn again for every step.
        final_tokens = max(0, tokens - lookahead)
        rest = data.draw(
            st.lists(
                st.tuples(SCORE, SCORE),
                min_size=tokens - final_tokens,
                max_size=tokens - final_tokens,
            )
        )
        event = ResponseScored(
            tokens,
            annotated([*final[:final_tokens], *rest]),
            final_characters=answer_spans.final_characters(tokens),
        )
        released = "".join(delta.text for delta in holding.push(event))
        assert not released or tokens > lookahead
        sent += released
    *released, end = holding.push(Finished("stop", 3, count, verdicts=annotated(final)))
    sent += "".join(delta.text for delta in released)
    assert annotated(final).verdicts[0].spans == tuple(spans)
    full = {" ".join(words.split()).casefold() for words in ignored}
    spans = [span for span in spans if " ".join(span.words.split()).casefold() not in full]
    assert sent == redacted(text, spans)
    (decision,) = end.decisions
    assert decision.action == ("redact" if spans else "none")
    response_probe.mechanism.lookahead = 1


def test_overlapping_spans_merge_into_one_placeholder():
    spans = [Span(0, 3, "B"), Span(2, 6, "A"), Span(6, 8, "A"), Span(10, 12, "C")]
    assert redacted("abcdefghijklm", spans) == "[B][A]ij[C]m"
    assert redacted("abcdefghijklm", spans, start=3, end=11) == "[A]ij[C]"


def answers(http, **changes):
    """The texts of a chat's choices, and all bytes that came, plain and streamed."""
    body = {"model": "tiny/llama", "messages": QUESTION, "max_tokens": 60, "seed": 3, **changes}
    both = [http.post(CHATS, json={**body, "stream": stream}) for stream in (False, True)]
    texts, joined = ([text for text, _ in choices(answer).values()] for answer in both)
    return texts, joined, [f"{[*answer.headers.items()]}{answer.text}" for answer in both]


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.6, 0.9])
def test_redacted_words_never_leave_the_server(tiny, threshold, caplog):
    probe = spans_probe(tiny, "late", side="response", threshold=threshold)

    def served(**rules):
        policy = Policy(output={name: Rule("redact", disclose=d) for name, d in rules.items()})
        with in_process(TransformersEngine(tiny, [probe]), policy=policy) as http:
            return answers(http, n=3)

    raw, streamed, _ = served()
    assert raw == streamed
    open_texts, open_streamed, (open_plain, _) = served(late="scores")
    texts, joined, told = served(late=None)
    assert texts == joined == open_texts == open_streamed
    verdicts = json.loads(open_plain[open_plain.index('{"id"') :])["sidelight"]["verdicts"]
    spans = [[Span(**span) for span in verdict["spans"]] for verdict in verdicts]
    # The third is ended by the limit, but where no word waits.
    assert texts == [
        redacted(text, text_spans) for text, text_spans in zip(raw, spans, strict=True)
    ]
    words = {
        t[s.start : s.end] for t, text_spans in zip(raw, spans, strict=True) for s in text_spans
    }
    assert len(words) > 3
    # Shorter ones are parts of other words.
    for word in (json.dumps(word)[1:-1] for word in words if len(word) > 3):
        assert not any(word in each for each in (*told, caplog.text))
    assert '"spans"' not in told[0]
    assert "x-sidelight-flagged" in told[0]


@pytest.mark.slow
def test_truncated_response_omits_words_that_could_still_be_redacted(tiny):
    probe = spans_probe(tiny, "late", side="response", threshold=0.6)
    policy = Policy(output={"late": Rule("redact", disclose="scores")})
    lacking = []
    with (
        in_process(TransformersEngine(tiny, [probe])) as plain,
        in_process(TransformersEngine(tiny, [probe]), policy=policy) as http,
    ):
        ((full,), _, _) = answers(http, max_tokens=40)
        ends = [{"max_tokens": most} for most in range(1, 13)]
        ends += [{"max_tokens": 40, "stop": [letter]} for letter in "UNw8"]
        for end in ends:
            ((raw,), _, _) = answers(plain, **end)
            ((text,), streamed, (told, _)) = answers(http, **end)
            assert [text] == streamed
            # What follows may speak against a label of the last words.
            assert full.startswith(re.sub(r"(\s|\[[A-Z]+\])+$", "", text))
            (verdict,) = json.loads(told[told.index('{"id"') :])["sidelight"]["verdicts"]
            known = redacted(raw, [Span(**span) for span in verdict["spans"] or ()])
            assert known.startswith(text)
            # Of tokens, the probe looks ahead by one; of words, by the one that it ends in.
            lacking.append(known[len(text) :])
    assert all(len(words.split()) <= 1 for words in lacking)
    assert {bool(words) for words in lacking} == {True, False}


def test_redact_rule_without_verdict_blocks_unless_on_failure_is_pass(tiny, response_probe):
    for rule, reason, is_sent in (
        (Rule("redact"), "content_filter", False),
        (Rule("redact", on_failure="pass"), "length", True),
        (Rule("redact", max_tokens=1), "content_filter", False),
    ):
        probe = response_probe if rule.max_tokens else broken(response_probe)
        policy = Policy(output={"late": rule})
        with in_process(TransformersEngine(tiny, [probe]), policy=policy) as http:
            body = {"model": "tiny/llama", "messages": QUESTION, "max_tokens": 12, "seed": 3}
            (choice,) = http.post(CHATS, json=body).json()["choices"]
        assert choice["finish_reason"] == reason
        assert bool(choice["message"]["content"]) is is_sent


def test_redact_route_replaces_labelled_words(tiny, prompt_probe, response_probe):
    """What looks like a placeholder is text as any other."""
    texts = ["Ann Lee and Bo came to Rome", "[NAME] left Rome for [NAME_4111]", ""]
    with in_process(TransformersEngine(tiny, [prompt_probe, response_probe])) as http:
        answer = http.post("/v1/redact", json={"input": texts}).json()
        nothing = http.post("/v1/redact", json={"input": ""}).json()
        moderated = http.post("/v1/moderations", json={"input": texts[:2]}).json()
        refused = http.post("/v1/redact", json={"input": texts[:2], "probes": ["late"]})
        empty = http.post("/v1/moderations", json={"input": texts})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "no_span_probe"
    assert (empty.status_code, empty.json()["error"]["code"]) == (400, "verdict_failed")
    assert [answer["results"].pop()] == nothing["results"] == [{"text": "", "spans": []}]
    spans = [[Span(**span) for span in result["spans"]] for result in answer["results"]]
    rows = zip(texts[:2], spans, answer["results"], moderated["results"], strict=True)
    for text, text_spans, result, check in rows:
        (verdict,) = check["sidelight"]["verdicts"]
        assert verdict["spans"] == result["spans"]
        assert text_spans
        assert result["text"] == redacted(text, text_spans)
    assert any(span.start > texts[1].index("[NAME_") for span in spans[1])


def test_redact_route_masks_text_even_when_spans_are_hidden(tiny, prompt_probe):
    body = {"input": "Ann Lee and Bo came to Rome"}
    keys = {"api_key": ("client",), "admin_key": ("boss",)}

    def redaction(http, key):
        answer = http.post("/v1/redact", json=body, headers={"Authorization": f"Bearer {key}"})
        return answer.json()["results"][0]

    policy = Policy(input={"early": Rule("redact", disclose="labels")})
    with in_process(TransformersEngine(tiny, [prompt_probe]), policy=policy, **keys) as http:
        client, boss = redaction(http, "client"), redaction(http, "boss")
    assert client == {"text": boss["text"], "spans": []}
    assert boss["spans"]


def test_gateway_receives_redacted_texts_and_holdback_lengths(tiny, prompt_probe, response_probe):
    policy = Policy(input={"early": Rule("redact")}, output={"late": Rule("redact")})
    text = "Ann Lee and Bo came to Rome, and then 400 more"
    with in_process(
        TransformersEngine(tiny, [prompt_probe, response_probe]), policy=policy
    ) as http:
        masked = http.post("/v1/redact", json={"input": text}).json()["results"][0]["text"]
        for kind in ("request", "response"):
            body = {"input_type": kind, "texts": ["", text]}
            answer = http.post(GUARDRAIL, json=body).json()
            assert answer["action"] == "GUARDRAIL_INTERVENED"
            assert answer["texts"][0] == ""
            assert answer["texts"][1] != text
            if kind == "request":
                assert answer["texts"][1] == masked
                assert "stream_holdback_chars" not in answer
            else:
                assert answer["stream_holdback_chars"] == [*map(len, answer["texts"])]
        chat = {"model": "tiny/llama", "messages": QUESTION, "max_tokens": 1}
        assert http.post(CHATS, json=chat).status_code == 200


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.9, ("BLOCKED", "Flagged by early.")), (1.0, ("NONE", None))]
)
def test_tool_call_needing_redaction_is_blocked(tiny, threshold, expected):
    probe = spans_probe(tiny, "early", threshold=threshold)
    policy = Policy(input={"early": Rule("redact")})
    call = {"type": "function", "function": {"name": "f", "arguments": "Ann Lee came to Rome"}}
    with in_process(TransformersEngine(tiny, [probe]), policy=policy) as http:
        body = {"input_type": "request", "tool_calls": [call]}
        answer = http.post(GUARDRAIL, json=body).json()
    assert (answer["action"], answer["blocked_reason"]) == expected


def test_conversation_spans_name_their_message(tiny, prompt_probe):
    turns = [("user", "Ann Lee is"), ("assistant", "and Bo"), ("user", "in Rome, not 400")]
    messages = [{"role": role, "content": content} for role, content in turns]
    with in_process(TransformersEngine(tiny, [prompt_probe])) as http:
        body = {"model": "tiny/llama", "messages": messages, "max_tokens": 1}
        chat = http.post(CHATS, json=body).json()
        question = {"type": "predicate", "name": "NAME"}
        body = {"model": "tiny/llama", "input": messages, "questions": [question]}
        decided = http.post("/v1/decisions", json=body).json()
    (verdict,) = chat["sidelight"]["verdicts"]
    spans = verdict["spans"]
    assert {span["message"] for span in spans} <= {0, 1, 2}
    assert len({span["message"] for span in spans}) > 1
    for span in spans:
        word = turns[span["message"]][1][span["start"] : span["end"]]
        assert word
        assert word == word.strip()
    asked = [(span["message"], span["start"], span["end"]) for span in decided["spans"]["early"]]
    assert asked


def test_redact_rule_requires_span_probe_and_rejects_unrelated_keys(tiny, prompt_probe, tmp_path):
    readout = untrained_probe(tiny, "readout")
    with pytest.raises(SidelightError, match=wordings.LABELS_NO_SPANS):
        require_policy_applies(Policy(input={"readout": Rule("redact")}), [readout])
    path = tmp_path / "policy.toml"
    for key in ("threshold = 0.5", "consecutive = 2", "hold_back = 3", "routes = {}"):
        path.write_text(f'[output.late]\nmode = "redact"\n{key}\n')
        with pytest.raises(SidelightError, match=wordings.CANNOT_HOLD):
            read_policy(path)
    path.write_text('[input.early]\nmode = "redact"\nlabels = ["NAME"]\n')
    rule = read_policy(path).input["early"]
    bound = BoundRule(prompt_probe, rule)
    spans = (Span(0, 2, "NAME"), Span(3, 4, "PLACE"))
    verdict = Verdict("early", "NAME", (), {"NAME": 0.9, "PLACE": 0.9}, flagged=True, spans=spans)
    assert bound.decide(verdict).spans == spans[:1]
    # A gateway hears of a text that has a label as a whole, although no word can be redacted.
    decision = decide(bound, Verdicts((replace(verdict, spans=()),)), tokens=3)
    assert (decision.action, bool(bound.headers(decision.verdict))) == ("none", True)
