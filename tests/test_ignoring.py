"""Labelled words that a rule ignores: by texts, by patterns, and by a file."""

import json
import time
from dataclasses import replace

import pytest

import wordings
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.errors import SidelightError
from sidelight.policy.ignoring import Ignore
from sidelight.policy.rules import BoundRule, Policy, Rule, read_policy, require_policy_applies
from sidelight.types import Span, Verdict
from worlds.models import spans_probe, untrained_probe
from worlds.servers import in_process

TEXT = "Ask Ann Lee at Northwind, order INV-204."


def span(words: str, label: str = "NAME") -> Span:
    start = TEXT.index(words)
    return Span(start, start + len(words), label, 0.99, words=words)


SPANS = (span("Ann Lee"), span("Northwind", "PLACE"), span("INV-204"))


@pytest.fixture(scope="module")
def probe(tiny):
    return spans_probe(tiny, "pii")


def decided(probe, ignore: Ignore, **rule) -> Verdict:
    scores = {"NAME": 0.9, "PLACE": 0.8}
    verdict = Verdict("pii", "NAME", ("NAME", "PLACE"), scores, True, spans=SPANS)
    return BoundRule(probe, Rule("redact", ignore=ignore, **rule)).decide(verdict)


@pytest.mark.parametrize(
    ("ignore", "ignored"),
    [
        (Ignore(words=("northwind",)), ["Northwind"]),
        (Ignore(words=("ann  lee", "INV-204")), ["Ann Lee", "INV-204"]),
        (Ignore(patterns=(r"INV-\d+",)), ["INV-204"]),
        (Ignore(words=("Ann", "Lee", "wind", "Ann Lee at", "")), []),
        (Ignore(patterns=(r"Ann", r"\d+", r"Lee at.+", r"inv-204")), []),
        (Ignore(patterns=(r".+",)), ["Ann Lee", "Northwind", "INV-204"]),
    ],
)
def test_ignore_entry_matches_full_spans_only(probe, ignore, ignored):
    verdict = decided(probe, ignore)
    assert [span.words for span in verdict.ignored] == ignored
    assert [span.words for span in verdict.spans] == [
        w.words for w in SPANS if w.words not in ignored
    ]
    assert verdict.flagged == bool(verdict.spans)


def test_label_is_dropped_once_all_its_spans_are_ignored(probe):
    assert decided(probe, Ignore(words=("Northwind",))).labels == ("NAME",)
    assert decided(probe, Ignore(words=("INV-204",))).labels == ("NAME", "PLACE")
    nothing = decided(probe, Ignore(words=[span.words for span in SPANS]))
    assert (nothing.labels, nothing.flagged) == ((), False)


def test_verdict_lists_positions_of_ignored_spans_but_not_their_words(probe):
    verdict = decided(probe, Ignore(words=("Northwind",)))
    told = verdict.to_dict()
    assert [span["start"] for span in told["ignored"]] == [TEXT.index("Northwind")]
    for text in (json.dumps(told), repr(verdict)):
        assert "Northwind" not in text
    assert "ignored" not in decided(probe, Ignore()).to_dict()


def test_ignore_patterns_match_in_linear_time(probe):
    """A backtracking engine would need 2^40,000 steps."""
    ignore = Ignore(patterns=("(a+)+b",))
    start = time.perf_counter()
    assert not ignore.covers(Span(0, 40_000, "NAME", words="a" * 40_000))
    assert time.perf_counter() - start < 5


def policy_of(tmp_path, ignore: str) -> Policy:
    (tmp_path / "policy.toml").write_text(
        f'[input.pii]\nmode = "redact"\n[input.pii.ignore]\n{ignore}\n'
    )
    return read_policy(tmp_path / "policy.toml")


def test_ignore_file_is_read_relative_to_policy_file(tmp_path):
    (tmp_path / "names.txt").write_text("\ufeffNorthwind\n\n  Ann Lee \n", "utf-8")
    policy = policy_of(tmp_path, 'file = "names.txt"\nwords = ["INV-204"]')
    ignore = policy.input["pii"].ignore
    assert all(map(ignore.covers, SPANS))
    assert not ignore.covers(Span(0, 0, "NAME"))


@pytest.mark.parametrize(
    ("ignore", "told"),
    [
        ('file = "absent.txt"', "Cannot read .*absent.txt"),
        ('patterns = ["("]', "is not a valid RE2 pattern: missing"),
        ('patterns = ["(?=a)a"]', "neither look-around"),
        ('patterns = [".*"]', "also matches an empty text"),
        ('word = ["a"]', "unknown key: input.pii.ignore.word"),
        ("words = [1]", r"input.pii.ignore.words.0"),
    ],
)
def test_invalid_ignore_settings_are_rejected(tmp_path, ignore, told):
    with pytest.raises(SidelightError, match=told):
        policy_of(tmp_path, ignore)


def test_ignore_rules_require_span_probe(tiny):
    policy = Policy(input={"toxicity": Rule(ignore=Ignore(words=("a",)))})
    with pytest.raises(SidelightError, match=wordings.IGNORE_WITHOUT_SPANS):
        require_policy_applies(policy, [untrained_probe(tiny, "toxicity")])


@pytest.mark.slow
def test_server_leaves_ignored_words_and_reports_their_spans(tiny):
    probe = spans_probe(tiny, "pii")
    body = {"input": [TEXT]}

    def server(rule):
        policy = Policy(input={"pii": rule})
        return in_process(TransformersEngine(tiny, [probe]), policy=policy)

    with server(Rule("redact")) as http:
        (found,) = http.post("/v1/redact", json=body).json()["results"]
    first = found["spans"][0]
    words = TEXT[first["start"] : first["end"]]
    rule = Rule("redact", ignore=Ignore(words=(words,)))
    with server(rule) as http:
        (result,) = http.post("/v1/redact", json=body).json()["results"]
        (checked,) = http.post("/v1/moderations", json=body).json()["results"]
    same = [span for span in found["spans"] if TEXT[span["start"] : span["end"]] == words]
    assert result["spans"] == [span for span in found["spans"] if span not in same]
    assert words in result["text"]
    (verdict,) = checked["sidelight"]["verdicts"]
    assert verdict["ignored"] == same
    with server(replace(rule, disclose="labels")) as http:
        (checked,) = http.post("/v1/moderations", json=body).json()["results"]
    (verdict,) = checked["sidelight"]["verdicts"]
    assert not {"spans", "ignored"} & verdict.keys()
