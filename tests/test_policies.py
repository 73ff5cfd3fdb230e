"""Rules from a file and from requests, and what clients and gateways see of them."""

import asyncio
import json
from dataclasses import replace

import openai
import pytest

from live import MODEL, http_client, openai_client, served
from sidelight.engines.transformers import TransformersEngine
from sidelight.errors import SidelightError
from sidelight.policy.rules import Policy, Rule
from sidelight.prompts import Reads
from sidelight.server.app import create_app
from tiny import INTENT, TOPICS, tiny_backbone, untrained_probe

HELLO = [{"role": "user", "content": "hello"}]
GREEDY = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


@pytest.fixture(scope="module")
def probes(backbone):
    return [
        untrained_probe(backbone, "toxicity"),
        untrained_probe(backbone, "intent", task=INTENT, mechanism="gate"),
        untrained_probe(backbone, "topics", task=TOPICS),
        untrained_probe(backbone, "late", reads=Reads("response")),
    ]


def test_a_server_does_not_start_with_a_policy_that_does_not_fit(backbone, probes):
    engine = TransformersEngine(backbone, probes)
    app = create_app(engine, policy=Policy(input={"toxic": Rule()}))

    async def start():
        async with app.router.lifespan_context(app):
            pytest.fail("it has started")

    with pytest.raises(SidelightError, match="Did you mean 'toxicity'"):
        asyncio.run(start())
    assert not engine.is_ready


def asked(backbone, loaded, policy, **request):
    """The raw response of one chat request."""
    with (
        served(TransformersEngine(backbone, loaded), policy=policy) as address,
        openai_client(address) as client,
    ):
        extra = {key: request.pop(key) for key in ("policies", "probes") if key in request}
        return client.chat.completions.with_raw_response.create(
            **GREEDY, **request, extra_body=extra
        )


def test_a_threshold_moves_the_reported_flag(backbone, probes):
    policy = Policy(
        input={"toxicity": Rule(threshold=0.0), "topics": Rule(threshold=0.0, labels=("sexual",))}
    )
    answer = asked(backbone, probes, policy).parse()
    by_probe = {v["probe"]: v for v in answer.model_extra["sidelight"]["verdicts"]}
    assert (by_probe["toxicity"]["label"], by_probe["toxicity"]["flagged"]) == ("toxic", True)
    assert by_probe["topics"]["labels"] == ["sexual"]
    assert answer.moderation.input.results[0].flagged


def test_marks_tell_a_gateway_what_is_flagged_and_where_to_go(backbone, probes):
    policy = Policy(
        input={
            "toxicity": Rule("flag", threshold=0.0),
            "intent": Rule("route", routes={label: f"desk of {label}" for label in INTENT.labels}),
            "topics": Rule("route", threshold=0.0, labels=("violence",)),
        },
        output={"late": Rule("flag", threshold=0.0)},
    )
    raw = asked(backbone, probes, policy, probes=["intent"])
    intent = json.loads(raw.headers["x-sidelight-verdicts"])[0]["label"]
    assert raw.headers["x-sidelight-flagged"] == "toxicity, late"
    assert raw.headers["x-sidelight-route"] == f"desk of {intent}, violence"
    unmarked = asked(backbone, probes, Policy(input={"toxicity": Rule("flag", threshold=1.0)}))
    assert not {"x-sidelight-flagged", "x-sidelight-route"} & unmarked.headers.keys()


def test_a_route_says_when_it_could_not_be_found(backbone):
    broken = untrained_probe(backbone, "intent", task=INTENT)
    broken.mechanism.bias.fill_(float("nan"))
    raw = asked(backbone, [broken], Policy(input={"intent": Rule("route")}))
    assert raw.headers["x-sidelight-route"] == "verdict_failed"


def test_a_label_cannot_forge_a_header(backbone):
    labels = replace(INTENT, labels=("billing", "a\r\nx-admin: 1, é", "other"))
    probe = untrained_probe(backbone, "intent", task=labels)
    routes = dict.fromkeys(labels.labels, labels.labels[1])
    raw = asked(backbone, [probe], Policy(input={"intent": Rule("route", routes=routes)}))
    assert raw.headers["x-sidelight-route"] == "a%0D%0Ax-admin: 1%2C %C3%A9"
    assert "x-admin" not in raw.headers


def test_a_blocked_prompt_is_openais_own_error(backbone, probes):
    policy = Policy(input={"toxicity": Rule("block", threshold=0.0)})
    with pytest.raises(openai.BadRequestError) as blocked:
        asked(backbone, probes, policy, probes=["intent"])
    assert blocked.value.code == "content_filter"
    assert "toxicity" in blocked.value.message
    assert "hello" not in blocked.value.message
    verdicts = json.loads(blocked.value.response.headers["x-sidelight-verdicts"])
    assert verdicts[0]["flagged"]


def test_a_probe_that_blocks_is_reported_whichever_were_chosen(backbone, probes):
    policy = Policy(output={"late": Rule("block", threshold=0.0, consecutive=1)})
    answer = asked(backbone, probes, policy, probes=["intent"]).parse()
    assert answer.choices[0].finish_reason == "content_filter"
    reported = [v["probe"] for v in answer.model_extra["sidelight"]["verdicts"]]
    assert reported == ["intent", "late"]
    assert answer.moderation.output.results[0].flagged
    assert answer.usage.completion_tokens < 6


BLOCK = {"model": "probes", "policy": {"input": {"mode": "block"}}}
BLOCK_OUTPUT = {"model": "probes", "policy": {"output": {"mode": "block"}}}


@pytest.mark.slow
def test_a_request_may_ask_to_be_blocked(backbone, probes):
    flagging = Policy(input={"toxicity": Rule(threshold=0.0)})
    with pytest.raises(openai.BadRequestError, match="blocked by toxicity"):
        asked(backbone, probes, flagging, moderation=BLOCK, probes=["toxicity"])
    with pytest.raises(openai.BadRequestError, match="blocked by toxicity"):
        asked(backbone, probes, Policy(), policies={"toxicity": {"mode": "block", "threshold": 0}})
    passing = Policy(input={"toxicity": Rule(threshold=1.0)})
    asked(backbone, probes, passing, moderation=BLOCK, probes=["toxicity"])
    output = {"late": Rule(threshold=0.0)}
    cut = asked(backbone, probes, Policy(output=output), moderation=BLOCK_OUTPUT).parse()
    assert cut.choices[0].finish_reason == "content_filter"


def test_a_request_cannot_change_a_route(backbone):
    probe = untrained_probe(backbone, "toxicity")
    routes = {"fine": "cheap", "toxic": "strong", "verdict_failed": "desk"}
    rule = Rule("route", threshold=1.0, routes=routes, on_failure="pass")
    policy = Policy(input={"toxicity": rule})
    for request in ({"moderation": BLOCK}, {"policies": {"toxicity": {"mode": "block"}}}):
        passed = asked(backbone, [probe], policy, **request)
        assert passed.headers["x-sidelight-route"] == "cheap"
    with pytest.raises(openai.BadRequestError, match="another changes the route") as refused:
        asked(backbone, [probe], policy, policies={"toxicity": {"threshold": 0}})
    assert refused.value.code == "policy_too_loose"
    flagging = Policy(input={"toxicity": replace(rule, threshold=0.0)})
    with pytest.raises(openai.BadRequestError, match="blocked by toxicity") as blocked:
        asked(backbone, [probe], flagging, moderation=BLOCK)
    # A gateway would send on what was to be blocked.
    assert "x-sidelight-route" not in blocked.value.response.headers
    probe.mechanism.bias.fill_(float("nan"))
    failed = asked(backbone, [probe], policy, moderation=BLOCK)
    assert failed.headers["x-sidelight-route"] == "desk"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (
            {"moderation": {"model": "x", "policy": {"input": {"mode": "score"}}}},
            "policy_too_loose",
        ),
        ({"policies": {"toxicity": {"mode": "score"}}}, "policy_too_loose"),
        ({"policies": {"toxicity": {"threshold": 0.9}}}, "policy_too_loose"),
        ({"policies": {"topics": {"threshold": 0.9}}}, "policy_too_loose"),
        ({"policies": {"intent": {"mode": "block"}}}, "cannot_block"),
        ({"policies": {"intent": {"threshold": 0.1}}}, "cannot_block"),
        ({"policies": {"hidden": {"mode": "block"}}}, "probe_not_found"),
        ({"moderation": BLOCK, "probes": ["intent"]}, "no_prompt_probe"),
        ({"moderation": BLOCK_OUTPUT, "probes": ["toxicity"]}, "no_response_probe"),
    ],
)
def test_an_override_that_is_looser_or_without_effect_is_a_400(backbone, probes, request_, code):
    policy = Policy(input={"toxicity": Rule("block", threshold=0.8), "hidden": Rule("shadow")})
    hidden = untrained_probe(backbone, "hidden")
    with pytest.raises(openai.BadRequestError) as refused:
        asked(backbone, [*probes, hidden], policy, **request_)
    assert refused.value.code == code
    assert "hidden" not in refused.value.message.partition("Known: ")[2]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"moderation": {"model": "x", "policy": {"inptu": {"mode": "block"}}}}, "inptu.*'input'"),
        (
            {"moderation": {"model": "x", "policy": {"input": {"mode": "block", "thresold": 0.1}}}},
            "thresold.*mode",
        ),
        ({"policies": {"toxicity": {"mod": "block"}}}, "mod.*'mode'"),
        ({"moderation": {"model": "x", "polcy": {"input": {"mode": "block"}}}}, "polcy.*'policy'"),
    ],
)
def test_a_misspelt_override_is_a_400(backbone, probes, request_, message):
    with pytest.raises(openai.BadRequestError, match=message):
        asked(backbone, probes, Policy(), **request_)


def test_no_request_is_answered_that_asks_for_a_looser_rule(backbone, probes):
    """A score where the server blocks is refused, even for probes that were not asked about."""
    policy = Policy(input={"toxicity": Rule("block", threshold=1.0)})
    loose = {"model": "x", "policy": {"input": {"mode": "score"}}}
    with pytest.raises(openai.BadRequestError):
        asked(backbone, probes, policy, moderation=loose, probes=["intent"])


def test_a_shadow_is_in_no_answer_and_in_the_counts(backbone, probes):
    hidden = untrained_probe(backbone, "hidden")
    failing = untrained_probe(backbone, "failing")
    failing.mechanism.bias.fill_(float("nan"))
    policy = Policy(
        input={
            "toxicity": Rule(threshold=0.0),
            "hidden": Rule("shadow", threshold=0.0, shadow_of="toxicity"),
            "failing": Rule("shadow", shadow_of="toxicity"),
        }
    )
    engine = TransformersEngine(backbone, [*probes, hidden, failing])
    with served(engine, policy=policy) as address, http_client(address) as http:
        chat = http.post("/v1/chat/completions", json=GREEDY)
        stream = http.post("/v1/chat/completions", json={**GREEDY, "stream": True})
        others = [
            http.get("/v1/models"),
            http.post("/v1/moderations", json={"input": "x"}),
            http.post("/classify", json={"input": "x"}),
            http.post("/v1/moderations", json={"input": "x", "probes": ["hidden"]}),
        ]
        text = http.get("/metrics").text
    answers = [chat, stream, *others]
    assert [response.status_code for response in answers] == [200, 200, 200, 200, 400, 400]
    for response in answers[:-1]:
        said = response.text + str(response.headers)
        assert "hidden" not in said
        assert "failing" not in said
    assert "hidden" not in others[-1].text.split("Known")[1]
    # Categories keep their bare names: a shadow does not make one ambiguous.
    assert "toxicity/toxic" in chat.text
    agreed = 'sidelight_shadow_agreements_total{agreement="same",probe="toxicity",shadow="hidden"}'
    assert f"{agreed} 3.0" in text
    assert 'agreement="failed",probe="toxicity",shadow="failing"} 3.0' in text
    assert 'sidelight_actions_total{action="shadow",probe="hidden",side="input"} 3.0' in text


ABUSE = [{"role": "system", "content": "abuse"}, *HELLO]
QUESTION = {"questions": [{"type": "predicate", "name": "toxicity"}]}
ENDPOINTS = [
    ("/v1/chat/completions", "messages", {**GREEDY, "stream": False}),
    ("/v1/chat/completions", "messages", {**GREEDY, "stream": True}),
    ("/v1/decisions", "input", {"model": MODEL, **QUESTION}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "field", "body"), ENDPOINTS)
def test_a_turn_that_no_probe_reads_is_trusted_or_refused(backbone, probes, path, field, body):
    rule = Rule("block", threshold=1.0)
    blocking, flagging = {"toxicity": rule}, {"toxicity": replace(rule, mode="flag")}
    developer = [{**ABUSE[0], "role": "developer"}, *HELLO]
    later = [*HELLO, {"role": "assistant", "content": "hi"}, *ABUSE]
    for policy, refused in (
        (Policy(input=blocking, system_turns="trust"), 200),
        (Policy(input=flagging), 200),
        (Policy(output={"late": rule}), 200),
        # Where a rule blocks prompts, the policy has to say that the turns are trusted.
        (Policy(input=blocking), 400),
        (Policy(input=flagging, system_turns="refuse"), 400),
        (Policy(input=blocking, system_turns="refuse"), 400),
    ):
        engine = TransformersEngine(backbone, probes)
        with served(engine, policy=policy) as address, http_client(address) as http:
            answers = [http.post(path, json={**body, field: t}) for t in (ABUSE, developer)]
            series = http.get("/metrics").text
            read = [http.post(path, json={**body, field: turns}) for turns in (HELLO, later)]
        assert [answer.status_code for answer in answers] == [refused, refused]
        # What is refused is refused before anything is run.
        assert ("sidelight_prompt_tokens_total 0.0" in series) == (refused == 400)
        assert [answer.status_code for answer in read] == [200, 200]
    error = answers[0].json()["error"]
    assert error["code"] == "system_turn_refused"
    assert "system_turns" in error["message"]
    assert "abuse" not in error["message"]


CHECKS = {
    "/v1/moderations": {"input": ["x", "x" * 50], "probes": ["toxicity"]},
    "/classify": {"input": ["x", "x" * 50], "model": "toxicity"},
    "/v1/decisions": {
        "model": MODEL,
        "input": "x" * 50,
        "questions": [{"type": "predicate", "name": "toxicity"}],
    },
    "/v1/systemone": {"state": "x" * 50, "questions": {"toxicity": {"type": "noul"}}},
    "/beta/litellm_basic_guardrail_api": {
        "input_type": "request",
        "texts": ["x", "x" * 50],
        "additional_provider_specific_params": {"probes": ["toxicity"]},
    },
}


@pytest.mark.parametrize("mode", ["score", "block"])
def test_a_check_of_a_text_longer_than_its_rule_allows_is_a_400_with_both_numbers(
    backbone, probes, mode
):
    policy = Policy(input={"toxicity": Rule(mode, max_tokens=40)})
    with (
        served(TransformersEngine(backbone, probes), policy=policy) as address,
        http_client(address) as http,
    ):
        for path, body in CHECKS.items():
            response = http.post(path, json=body)
            assert response.status_code == 400, (path, response.text)
            error = response.json()["error"]
            assert error["code"] == "verdict_failed"
            assert "probe 'toxicity' may judge at most 40" in error["message"]
            index = 0 if path in ("/v1/decisions", "/v1/systemone") else 1
            assert f"Text {index} (" in error["message"]
        others = {"input": ["x" * 50], "probes": ["topics"]}
        assert http.post("/v1/moderations", json=others).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mode", ["score", "block"])
def test_a_text_longer_than_its_rule_allows_is_reported_as_such(backbone, probes, mode, stream):
    rule = Rule(mode, max_tokens=3)
    policy = Policy(input={"toxicity": Rule(max_tokens=3)}, output={"late": rule})
    with (
        served(TransformersEngine(backbone, probes), policy=policy) as address,
        http_client(address) as http,
    ):
        body = {**GREEDY, "probes": ["toxicity", "late"], "stream": stream}
        told = http.post("/v1/chat/completions", json=body).text
    for name in ("toxicity", "late"):
        assert f"No verdict from {name}: the text is longer than the policy" in told
    assert "not a finite number" not in told


def test_what_was_not_judged_is_logged_and_counted(backbone, capfd):
    broken = untrained_probe(backbone, "early")
    broken.mechanism.bias.fill_(float("nan"))
    rule = Rule("block")
    for on_failure, status in (("pass", 200), ("block", 500)):
        policy = Policy(input={"early": replace(rule, on_failure=on_failure)})
        engine = TransformersEngine(backbone, [broken])
        with served(engine, policy=policy) as address, http_client(address) as http:
            assert http.post("/v1/chat/completions", json=GREEDY).status_code == status
            text = http.get("/metrics").text
        action = {"pass": "fail_open", "block": "fail_closed"}[on_failure]
        counted = f'sidelight_actions_total{{action="{action}",probe="early",side="input"}} 1.0'
        assert counted in text
        logged = capfd.readouterr().err
        assert "Probe 'early' gave no verdict on the input" in logged
        assert "hello" not in logged
