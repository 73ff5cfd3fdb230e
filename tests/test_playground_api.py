"""What the playground asks of the API: scores while a text is written, thresholds, shares."""

import json
from dataclasses import asdict

import pytest

from curves import with_curves
from live import MODEL, http_client, served
from sidelight.engines.transformers import TransformersEngine
from sidelight.policy.rules import Policy, Rule
from sidelight.prompts import Reads
from sidelight.server.config import ServerConfig
from sidelight.thresholds import read_curves
from sidelight.vllm.server import NO_PLACE
from tiny import INTENT, TOPICS, tiny_backbone, untrained_probe

KEY, ADMIN = "user-key", "admin-key"
TEXT = "Where is my refund?"
CHATS = "/v1/chat/completions"
CHAT = {
    "model": MODEL,
    "messages": [{"role": "user", "content": TEXT}],
    "temperature": 0,
    "max_tokens": 6,
    "stream": True,
    "stream_options": {"include_scores": True},
}


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


@pytest.fixture(scope="module")
def probes(backbone):
    return [
        with_curves(untrained_probe(backbone, "toxicity")),
        with_curves(untrained_probe(backbone, "topics", task=TOPICS)),
        untrained_probe(backbone, "intent", task=INTENT, mechanism="gate"),
        with_curves(untrained_probe(backbone, "late", reads=Reads("response"))),
    ]


@pytest.fixture
def ask(backbone, probes):
    """Asks a server under a policy, with the key of a user or an admin."""

    def ask(path, body=None, *, policy=None, key=KEY):
        engine = TransformersEngine(backbone, probes)
        keys = {"api_key": KEY, "admin_key": ADMIN}
        with served(engine, policy=policy, **keys) as address, http_client(address) as http:
            method = "GET" if body is None else "POST"
            headers = {"Authorization": f"Bearer {key}"}
            answer = http.request(method, path, json=body, headers=headers)
            assert answer.status_code == 200, answer.text
            return answer

    return ask


def chunks_of(answer):
    events = answer.text.split("\n\n")
    return [json.loads(event.removeprefix("data: ")) for event in events if "{" in event]


def running_of(chunks):
    return [chunk["sidelight"]["running"] for chunk in chunks if "running" in str(chunk)]


def test_a_stream_tells_the_score_after_each_token_before_its_text(ask):
    chunks = chunks_of(ask(CHATS, CHAT))
    running = running_of(chunks)
    assert [each["tokens"] for each in running] == [*range(1, len(running) + 1)]
    assert {each["index"] for each in running} == {0}
    last = running[-1]["verdicts"][0]
    (whole,) = chunks[-2]["choices"][0]["delta"]["sidelight"]["verdicts"]
    assert last["probe"] == "late"
    # The last token that is drawn is read too, since the probe is read after each.
    assert last["probabilities"] == pytest.approx(whole["probabilities"], abs=1e-5)


@pytest.mark.parametrize("options", [None, {}, {"include_scores": False}])
def test_nobody_gets_scores_that_are_not_asked_for(ask, options):
    assert running_of(chunks_of(ask(CHATS, {**CHAT, "stream_options": options}))) == []


def test_scores_change_nothing_else_of_a_stream(ask):
    def text(chunks):
        pieces = (choice["delta"] for chunk in chunks for choice in chunk["choices"])
        return "".join(piece.get("content", "") for piece in pieces)

    plain = chunks_of(ask(CHATS, {**CHAT, "stream_options": {}}))
    assert text(chunks_of(ask(CHATS, CHAT))) == text(plain)


@pytest.mark.parametrize(
    ("rule", "is_told"),
    [
        (Rule("flag"), True),
        (Rule("flag", disclose="labels"), False),
        (Rule("flag", disclose="none"), False),
        (Rule("block", threshold=1.0), False),
        (Rule("block", threshold=1.0, disclose="scores"), True),
        (Rule("shadow"), False),
    ],
)
def test_a_rule_decides_who_sees_running_scores_thresholds_and_curves(ask, rule, is_told):
    policy = Policy(output={"late": rule})
    for key, is_seen in ((KEY, is_told), (ADMIN, rule.mode != "shadow")):
        scores = running_of(chunks_of(ask(CHATS, CHAT, policy=policy, key=key)))
        assert any(each["verdicts"] for each in scores) == is_seen
        cards = ask("/v1/probes", policy=policy, key=key).json()["probes"]
        own = [card for card in cards if card["name"] == "late"]
        assert any(card["thresholds"] for card in own) == is_seen


def test_the_stream_of_a_cut_answer_ends_as_without_scores(ask):
    rule = Rule("block", threshold=0.0, disclose="scores")
    chunks = chunks_of(ask(CHATS, CHAT, policy=Policy(output={"late": rule})))
    assert [each["tokens"] for each in running_of(chunks)] == [1, 2]
    assert chunks[-2]["choices"][0]["finish_reason"] == "content_filter"
    assert all(not choice["delta"].get("content") for c in chunks for choice in c["choices"])


def test_probes_are_listed_with_thresholds_and_curves(ask, probes):
    policy = Policy(input={"topics": Rule("flag", threshold=0.3, labels=("sexual",))})
    cards = ask("/v1/probes", policy=policy).json()["probes"]
    assert [card["name"] for card in cards] == [probe.name for probe in probes]
    toxicity, topics, intent, late = cards
    curve = read_curves(probes[0].record["validation"]["curves"])["toxic"]
    (limit,) = toxicity["thresholds"]
    assert (limit["label"], limit["threshold"]) == ("toxic", 0.5)
    assert limit["curve"] == json.loads(json.dumps(asdict(curve)))
    assert [(one["label"], one["threshold"]) for one in topics["thresholds"]] == [("sexual", 0.3)]
    assert (topics["mode"], intent["thresholds"], late["reads"]) == ("flag", [], "response")


def test_a_matrix_divides_each_tokens_share_among_the_layers(ask):
    body = {"input": [TEXT], "probes": ["toxicity", "intent"], "explain": "matrix"}
    said = ask("/v1/moderations", body).json()["results"][0]["sidelight"]
    for found in said["explanations"]:
        for token in found["tokens"]:
            assert sum(token["layers"]) == pytest.approx(token["share"], abs=1e-5)
            assert len(token["layers"]) == len(found["layers"])
    plain = ask("/v1/moderations", {**body, "explain": True}).json()
    assert "'layers'" not in str(plain["results"][0]["sidelight"]["explanations"][0]["tokens"])


def test_another_word_than_matrix_is_refused(backbone, probes):
    with served(TransformersEngine(backbone, probes)) as address, http_client(address) as http:
        answer = http.post("/v1/moderations", json={"input": "x", "explain": "all"})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith("explain")


def test_without_the_option_there_is_no_page(backbone, probes):
    with served(TransformersEngine(backbone, probes)) as address, http_client(address) as http:
        assert http.get("/playground").status_code == 404
        assert http.get("/playground/page.js").status_code == 404
        assert http.get("/docs").status_code == 200


def test_a_page_answers_reading_alone(backbone, probes):
    engine = TransformersEngine(backbone, probes)
    with served(engine, playground=True) as address, http_client(address) as http:
        assert http.head("/playground").status_code == 200
        assert http.post("/playground").status_code == 405
        for path in ("/playground/__init__.py", "/playground/..%2fapp.py", "/playground/docs.html"):
            assert http.get(path).status_code == 404


def test_vllms_server_has_no_place_for_the_page():
    assert "playground" in NO_PLACE.keys() & ServerConfig.model_fields.keys()


def test_a_matrix_is_of_one_text(backbone, probes):
    texts = [TEXT, TEXT]
    ways = [
        ("/v1/moderations", {"input": texts}),
        ("/classify", {"model": "intent", "input": texts}),
        ("/v1/completions", {"model": MODEL, "prompt": texts, "max_tokens": 1}),
    ]
    with served(TransformersEngine(backbone, probes)) as address, http_client(address) as http:
        for path, body in ways:
            refused = http.post(path, json={**body, "explain": "matrix"})
            assert refused.json()["error"]["code"] == "too_many_inputs"
            assert http.post(path, json={**body, "explain": True}).status_code == 200


def test_a_client_that_leaves_with_scores_and_no_text_is_audited(backbone, probes, tmp_path):
    rule = Rule("block", threshold=1.0, disclose="scores", warm_up=60)
    audit = tmp_path / "audit.jsonl"
    options = {"policy": Policy(output={"late": rule}), "audit_log": audit}
    body = {**CHAT, "max_tokens": 100}
    with (
        served(TransformersEngine(backbone, probes), **options) as address,
        http_client(address) as http,
        http.stream("POST", CHATS, json=body) as answer,
    ):
        next(line for line in answer.iter_lines() if "running" in line)
    lines = map(json.loads, audit.read_text().splitlines())
    assert ("late", "unfinished") in {(line["probe"], line["outcome"]) for line in lines}
