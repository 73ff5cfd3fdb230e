"""What the playground asks of the API: scores while a text is written, thresholds, and why."""

import json
from contextlib import contextmanager
from dataclasses import asdict

import pytest

from policy_contract import CHATS, choices, chunks_of
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.models.conversation import Reads
from sidelight.policy.rules import Policy, Rule
from sidelight.server.config import ServerConfig
from sidelight.server.playground import STRICT
from sidelight_vllm.server import NO_PLACE
from worlds.data import with_curves
from worlds.models import INTENT, TOPICS, untrained_probe
from worlds.servers import MODEL, in_process

KEY, ADMIN = "user-key", "admin-key"
TEXT = "Where is my refund?"
DECISIONS = "/v1/decisions"
CHAT = {
    "model": MODEL,
    "messages": [{"role": "user", "content": TEXT}],
    "temperature": 0,
    "max_tokens": 6,
    "stream": True,
    "stream_options": {"include_scores": True},
}
ANSWERED = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "Yes."}]


@pytest.fixture(scope="module")
def probes(tiny):
    return [
        with_curves(untrained_probe(tiny, "toxicity")),
        with_curves(untrained_probe(tiny, "topics", task=TOPICS)),
        untrained_probe(tiny, "intent", task=INTENT, mechanism="gate"),
        with_curves(untrained_probe(tiny, "late", reads=Reads("response"))),
    ]


@contextmanager
def asking(backbone, probes, policy=None, **settings):
    """Asks a server under a policy, with the key of a user or an admin."""
    keys = {"api_key": KEY, "admin_key": ADMIN}
    engine = TransformersEngine(backbone, probes)
    with in_process(engine, policy=policy, **keys, **settings) as http:

        def ask(path, body=None, *, key=KEY, status=200):
            method = "GET" if body is None else "POST"
            headers = {"Authorization": f"Bearer {key}"}
            answer = http.request(method, path, json=body, headers=headers)
            assert answer.status_code == status, answer.text
            return answer

        yield ask


@pytest.fixture(scope="module")
def ask(tiny, probes):
    """Of the server without a policy."""
    with asking(tiny, probes) as ask:
        yield ask


def running_of(chunks):
    return [chunk["sidelight"]["running"] for chunk in chunks if "running" in str(chunk)]


def why(ask, *names, explain=True, turns=ANSWERED, **options):
    questions = [{"type": "predicate", "name": name} for name in names]
    body = {"model": MODEL, "input": turns, "questions": questions, "explain": explain}
    return ask(DECISIONS, body, **options).json()["explanations"]


def test_stream_sends_score_after_each_token_only_on_request(ask):
    answer = ask(CHATS, CHAT)
    chunks = chunks_of(answer)
    running = running_of(chunks)
    assert [each["tokens"] for each in running] == [*range(1, len(running) + 1)]
    assert {each["index"] for each in running} == {0}
    last = running[-1]["verdicts"][0]
    (final_entry,) = chunks[-2]["choices"][0]["delta"]["sidelight"]["verdicts"]
    assert last["probe"] == "late"
    # The last token that is drawn is read too, since the probe is read after each.
    assert last["probabilities"] == pytest.approx(final_entry["probabilities"], abs=1e-5)

    # Only where they are asked for, and they change no text.
    for options in (None, {}, {"include_scores": False}):
        plain = ask(CHATS, {**CHAT, "stream_options": options})
        assert running_of(chunks_of(plain)) == []
        assert choices(plain) == choices(answer)


def test_decision_explanations_cover_tokens_and_layers(ask):
    """As the library does (``test_explanation``); places are characters of the messages."""
    explanations = why(ask, "toxicity", "intent", "late")
    assert [entry["probe"] for entry in explanations] == ["toxicity", "intent", "late"]
    read = ((0, TEXT), (0, TEXT), (1, "Yes."))
    for entry, (message, content) in zip(explanations, read, strict=True):
        assert {token["message"] for token in entry["tokens"]} == {message}
        assert max(token["end"] for token in entry["tokens"]) == len(content)
    assert [entry["probe"] for entry in why(ask, "late", "violence", turns=TEXT)] == ["topics"]
    # A matrix divides each token's share among the layers.
    for found in why(ask, "toxicity", "intent", explain="matrix"):
        for token in found["tokens"]:
            assert sum(token["layers"]) == pytest.approx(token["share"], abs=1e-5)
            assert len(token["layers"]) == len(found["layers"])
    (plain,) = why(ask, "toxicity")
    assert "layers" not in plain["tokens"][0]


def test_decisions_include_explanations_only_on_request(ask):
    questions = [{"type": "predicate", "name": "toxicity"}]
    body = {"model": MODEL, "input": TEXT, "questions": questions}
    for explain in ({}, {"explain": False}, {"explain": None}):
        assert "explanations" not in ask(DECISIONS, {**body, **explain}).json()
    error = ask(DECISIONS, {**body, "explain": "all"}, status=400).json()["error"]
    assert error["param"].startswith("explain")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "scores", "shares"),
    [
        (Rule("flag"), True, True),
        (Rule("flag", disclose="labels"), False, False),
        (Rule("block", threshold=1.0), False, False),
        (Rule("block", threshold=1.0, disclose="scores"), True, False),
        (Rule("shadow"), False, None),
    ],
)
def test_rule_controls_access_to_scores_thresholds_and_explanations(
    tiny, probes, rule, scores, shares
):
    is_enforced = rule.mode != "shadow"
    with asking(tiny, probes, Policy(output={"late": rule})) as ask:
        for key, is_visible, learns in (
            (KEY, scores, shares),
            (ADMIN, is_enforced, is_enforced or None),
        ):
            running = running_of(chunks_of(ask(CHATS, CHAT, key=key)))
            assert any(each["verdicts"] for each in running) == is_visible
            cards = ask("/v1/probes", key=key).json()["probes"]
            cards_of_probe = [card for card in cards if card["name"] == "late"]
            assert any(card["thresholds"] for card in cards_of_probe) == is_visible
            found = why(ask, "toxicity", "late", key=key)
            assert "tokens" in found[0]
            undisclosed = {"probe": "late", "error": "not_disclosed"}
            assert found[1:] == {None: [], False: [undisclosed]}.get(learns, found[1:2])
            assert learns is not True or "tokens" in found[1]


def test_blocked_stream_with_scores_ends_with_content_filter(tiny, probes):
    rule = Rule("block", threshold=0.0, disclose="scores")
    with asking(tiny, probes, Policy(output={"late": rule})) as ask:
        answer = ask(CHATS, CHAT)
    assert [each["tokens"] for each in running_of(chunks_of(answer))] == [1, 2]
    assert choices(answer) == {0: ("", "content_filter")}


def test_probe_list_includes_thresholds_and_curves(tiny, probes):
    policy = Policy(input={"topics": Rule("flag", threshold=0.3, labels=("sexual",))})
    with asking(tiny, probes, policy) as ask:
        cards = ask("/v1/probes").json()["probes"]
    assert [card["name"] for card in cards] == [probe.name for probe in probes]
    toxicity, topics, intent, response_probe = cards
    curve = probes[0].card.training.curves["toxic"]
    (limit,) = toxicity["thresholds"]
    assert (limit["label"], limit["threshold"]) == ("toxic", 0.5)
    assert limit["curve"] == json.loads(json.dumps(asdict(curve)))
    assert [(one["label"], one["threshold"]) for one in topics["thresholds"]] == [("sexual", 0.3)]
    assert (topics["mode"], intent["thresholds"], response_probe["reads"]) == (
        "flag",
        [],
        "response",
    )


def test_playground_requires_option_but_no_key_and_sets_strict_csp(tiny, probes):
    engine = TransformersEngine(tiny, probes)
    with in_process(engine) as http:
        for path in ("/", "/playground", "/playground/", "/playground/page.js"):
            assert http.get(path).status_code == 404
    with in_process(engine, playground=True) as http:
        assert http.head("/playground").status_code == 200
        assert http.post("/playground").status_code == 405
        for path in ("/playground/__init__.py", "/playground/..%2fapp.py"):
            assert http.get(path).status_code == 404
    with in_process(engine, playground=True, api_key=KEY) as http:
        for path in ("/v1/probes", "/openapi.json", "/playground/x", "/x"):
            assert http.get(path).status_code == 401
        for path in ("/playground", "/playground/page.js", "/playground/style.css"):
            answer = http.get(path)
            assert answer.status_code == 200
            assert answer.headers["content-security-policy"] == STRICT
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "no-referrer"
        for path in ("/", "/playground/"):
            moved = http.get(path, follow_redirects=False)
            assert (moved.status_code, "://" in moved.headers["location"]) == (307, False)
            assert str(http.get(path, follow_redirects=True).url).endswith("localhost/playground")
    assert "default-src 'self'" in STRICT
    assert "unsafe" not in STRICT
    assert "playground" in NO_PLACE.keys() & ServerConfig.model_fields.keys()
