"""``"explain": true``: where answers say why, and what a policy withholds of it."""

import json
from dataclasses import replace

import pytest

from live import MODEL, http_client, served
from sidelight.engines.transformers import TransformersEngine
from sidelight.errors import SidelightError
from sidelight.policy.rules import Policy, Rule, read_policy, require_policy_applies
from sidelight.prompts import Reads
from tiny import INTENT, tiny_backbone, untrained_probe

# In logits; as in test_mechanisms.py.
COMPLETE = 1e-4
KEY, ADMIN = "user-key", "admin-key"
TEXT = "Where is my refund?"
MESSAGES = [{"role": "user", "content": TEXT}]
ANSWERED = [*MESSAGES, {"role": "assistant", "content": "Yes."}]
CHAT = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 3}
QUESTIONS = [{"type": "predicate", "name": "toxicity"}, {"type": "predicate", "name": "late"}]
CHATS = "/v1/chat/completions"


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


@pytest.fixture(scope="module")
def probes(backbone):
    return [
        untrained_probe(backbone, "toxicity"),
        untrained_probe(backbone, "intent", task=INTENT, mechanism="gate"),
        untrained_probe(backbone, "late", reads=Reads("response")),
    ]


@pytest.fixture(scope="module")
def http(backbone, probes):
    with served(TransformersEngine(backbone, probes)) as address, http_client(address) as client:
        yield client


def ask(http, path, body, key=KEY):
    answer = http.post(path, json=body, headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text
    return answer.json()


def require_why(explanations, *names):
    assert [entry["probe"] for entry in explanations] == [*names]
    for entry in explanations:
        rest = entry["logit"] - entry["baseline"]
        tokens = sum(token["share"] for token in entry["tokens"])
        assert tokens + entry["template"] == pytest.approx(rest, abs=COMPLETE)
        assert sum(entry["layers"]) == pytest.approx(rest, abs=COMPLETE)


def test_each_check_says_why(http):
    said = ask(http, "/v1/moderations", {"input": [TEXT, "x"], "explain": True})
    for result, length in zip(said["results"], (len(TEXT), 1), strict=True):
        explanations = result["sidelight"]["explanations"]
        require_why(explanations, "toxicity", "intent")
        assert len(explanations[0]["tokens"]) == length
        assert {token["message"] for token in explanations[0]["tokens"]} == {0}
    said = ask(http, "/classify", {"model": "intent", "input": TEXT, "explain": True})
    require_why(said["data"][0]["explanations"], "intent")
    body = {"model": MODEL, "input": ANSWERED, "questions": QUESTIONS, "explain": True}
    said = ask(http, "/v1/decisions", body)
    require_why(said["explanations"], "toxicity", "late")
    assert {token["message"] for token in said["explanations"][1]["tokens"]} == {1}


def test_a_chat_says_why_once_plain_or_streamed(http):
    said = ask(http, CHATS, {**CHAT, "n": 2, "explain": True})
    require_why(said["sidelight"]["explanations"], "toxicity", "intent")
    body = {**CHAT, "n": 2, "stream": True, "explain": True}
    events = http.post(CHATS, json=body).text.split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events if "{" in event]
    told = [chunk for chunk in chunks if "explanations" in chunk.get("sidelight", {})]
    assert len(told) == 1
    # As the plain answer, up to the rounding of another batch.
    assert told[0]["moderation"]["output"]["code"] == "pending"
    require_why(told[0]["sidelight"]["explanations"], "toxicity", "intent")
    assert all("explanation" not in str(chunk) for chunk in chunks if chunk is not told[0])


@pytest.mark.parametrize("explain", [{}, {"explain": False}, {"explain": None}])
def test_nobody_gets_what_is_not_asked_for(http, explain):
    question = {"model": MODEL, "input": TEXT, "questions": QUESTIONS}
    for path, body in (
        (CHATS, CHAT),
        ("/v1/completions", {"model": MODEL, "prompt": "x", "max_tokens": 1}),
        ("/v1/moderations", {"input": TEXT}),
        ("/classify", {"model": "intent", "input": TEXT}),
        ("/v1/decisions", question),
    ):
        assert "explanation" not in str(ask(http, path, {**body, **explain}))


def test_plain_text_has_no_verdict_and_no_explanation(http):
    body = {"model": MODEL, "prompt": [TEXT, "x"], "max_tokens": 1, "explain": True}
    assert ask(http, "/v1/completions", body)["sidelight"]["explanations"] == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/systemone", {"state": "x", "questions": {"toxicity": {"type": "noul"}}}),
        (
            "/beta/litellm_basic_guardrail_api",
            {"input_type": "request", "texts": ["x"], "additional_provider_specific_params": {}},
        ),
    ],
)
def test_a_route_that_has_no_place_for_it_refuses(http, path, body):
    inner = body.get("additional_provider_specific_params", body)
    inner["explain"] = True
    answer = http.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].endswith("explain")


@pytest.mark.parametrize(
    ("rule", "is_told"),
    [
        (Rule(), True),
        (Rule("flag"), True),
        (Rule("flag", explain=False), False),
        (Rule("flag", disclose="labels"), False),
        (Rule("block", threshold=1.0), False),
        (Rule("block", threshold=1.0, disclose="scores"), False),
        (Rule("block", threshold=1.0, disclose="scores", explain=True), True),
    ],
)
def test_a_rule_decides_whether_ordinary_keys_learn_why(backbone, probes, rule, is_told):
    policy = Policy(input={"toxicity": rule})
    engine = TransformersEngine(backbone, probes)
    with (
        served(engine, policy=policy, api_key=KEY, admin_key=ADMIN) as address,
        http_client(address) as http,
    ):
        for path, body in ((CHATS, CHAT), ("/v1/moderations", {"input": TEXT})):
            for key, is_seen in ((KEY, is_told), (ADMIN, True)):
                said = ask(http, path, {**body, "explain": True}, key)
                said = said["results"][0] if "results" in said else said
                toxicity, intent = said["sidelight"]["explanations"]
                withheld = {"probe": "toxicity", "error": "not_disclosed"}
                assert (toxicity != withheld) == is_seen
                require_why([intent], "intent")


def test_nothing_is_said_of_a_probe_that_discloses_nothing(backbone, probes):
    policy = Policy(input={"toxicity": Rule("flag", disclose="none")})
    with (
        served(TransformersEngine(backbone, probes), policy=policy) as address,
        http_client(address) as http,
    ):
        said = ask(http, CHATS, {**CHAT, "explain": True})
        require_why(said["sidelight"]["explanations"], "intent")


@pytest.mark.parametrize("rule", [Rule("block", explain=True), Rule("shadow", explain=True)])
def test_a_policy_that_explains_what_it_does_not_disclose_is_refused(probes, rule):
    with pytest.raises(SidelightError, match="explain = true"):
        require_policy_applies(Policy(input={"toxicity": rule}), probes)


def test_the_policy_file_says_whether_a_rule_explains(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text("[input.toxicity]\nexplain = false\n[output.late]\nexplain = true\n")
    policy = read_policy(path)
    assert policy.input["toxicity"] == replace(Rule(), explain=False)
    assert policy.output["late"].explain is True
    path.write_text('[input.toxicity]\nexplain = "no"\n')
    with pytest.raises(SidelightError, match="explain"):
        read_policy(path)
