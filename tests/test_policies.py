"""Our own server under the laws of a policy, and what of it vLLM's server does not share."""

import logging
from contextlib import contextmanager
from dataclasses import replace

import pytest

import wordings
from policy_contract import (
    CHATS,
    GUARDRAIL,
    STREAMED,
    PolicyContract,
    chat,
    choices,
    sidelight_server,
)
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.errors import SidelightError
from sidelight.models.conversation import Reads
from sidelight.policy.rules import Policy, Rule
from worlds.models import INTENT, broken, three_probes, untrained_probe
from worlds.servers import MODEL, in_process

HELLO = [{"role": "user", "content": "hello"}]
GREEDY = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def server(subjects, tmp_path_factory):
    engine = TransformersEngine(subjects.backbone, subjects.probes)
    with sidelight_server(engine, subjects, tmp_path_factory.mktemp("server")) as served:
        yield served


@pytest.mark.slow
class TestSidelightServer(PolicyContract):
    @STREAMED
    def test_each_choice_is_classified_separately(self, server, subjects, streamed):
        ids, reason = subjects.sent(subjects.leaking)
        answer = server.post(chat(subjects.leaking, n=2, stream=streamed))
        assert choices(answer) == dict.fromkeys((0, 1), (subjects.decoded(ids), reason))


@pytest.fixture(scope="module")
def probes(tiny):
    return [*three_probes(tiny), untrained_probe(tiny, "late", reads=Reads("response"))]


@contextmanager
def serving(tiny, loaded, policy, **settings):
    settings = {"metrics_key": "scraper", **settings}
    with in_process(TransformersEngine(tiny, loaded), policy=policy, **settings) as http:
        yield http


def metrics(http):
    return http.get("/metrics", headers={"Authorization": "Bearer scraper"}).text


def asked(tiny, loaded, policy, **request):
    """The answer to one chat request."""
    with serving(tiny, loaded, policy) as http:
        return http.post(CHATS, json={**GREEDY, **request})


def test_server_refuses_to_start_with_inapplicable_policy(tiny, probes):
    engine, policy = TransformersEngine(tiny, probes), Policy(input={"toxic": Rule()})
    with (
        pytest.raises(SidelightError, match=wordings.DID_YOU_MEAN.format(name="toxicity")),
        in_process(engine, policy=policy),
    ):
        pytest.fail("it has started")
    assert not engine.is_ready


def test_thresholds_and_labels_determine_flags_and_gateway_headers(tiny, probes):
    policy = Policy(
        input={
            "toxicity": Rule("flag", threshold=0.0),
            "topics": Rule("route", threshold=0.0, labels=("violence",)),
            "intent": Rule("route"),
        },
        output={"late": Rule("flag", threshold=0.0)},
    )
    intent = untrained_probe(tiny, "intent", task=INTENT)
    answer = asked(tiny, [*probes[2:], *probes[:1], broken(intent)], policy)
    assert answer.headers["x-sidelight-flagged"] == "toxicity, late"
    assert answer.headers["x-sidelight-route"] == "violence, verdict_failed"
    labels = {v["probe"]: v.get("labels") for v in answer.json()["sidelight"]["verdicts"]}
    assert (labels["toxicity"], labels["topics"]) == (["toxic"], ["violence"])
    unmarked = asked(tiny, probes, Policy(input={"toxicity": Rule("flag", threshold=1.0)}))
    assert not {"x-sidelight-flagged", "x-sidelight-route"} & unmarked.headers.keys()


def test_label_cannot_inject_response_header(tiny):
    labels = replace(INTENT, labels=("billing", "a, x-admin: 1, é", "other"))
    probe = untrained_probe(tiny, "intent", task=labels)
    routes = dict.fromkeys(labels.labels, labels.labels[1])
    answer = asked(tiny, [probe], Policy(input={"intent": Rule("route", routes=routes)}))
    assert answer.headers["x-sidelight-route"] == "a%2C x-admin: 1%2C %C3%A9"
    assert "x-admin" not in answer.headers


def test_shadow_probes_stay_hidden_and_are_counted(tiny, probes):
    rule = Rule("shadow", threshold=0.0, shadow_of="toxicity")
    shadows = {"hidden": rule, "failing": rule}
    policy = Policy(input={"toxicity": Rule(threshold=0.0), **shadows})
    loaded = [*probes, untrained_probe(tiny, "hidden"), broken(untrained_probe(tiny, "failing"))]
    with serving(tiny, loaded, policy) as http:
        answer = http.post("/v1/moderations", json={"input": "x", "probes": ["toxicity"]})
        chat = http.post(CHATS, json=GREEDY)
        everything_sent = f"{chat.text} {chat.headers} {http.get('/v1/models').text}"
        series = metrics(http)
    assert answer.json()["results"][0]["category_scores"].keys() == {"toxicity/toxic"}
    assert not [name for name in shadows if name in everything_sent]
    agreed = 'sidelight_shadow_agreements_total{agreement="same",probe="toxicity",shadow="hidden"}'
    assert f"{agreed} 2.0" in series
    assert 'agreement="failed",probe="toxicity",shadow="failing"} 2.0' in series
    assert 'sidelight_actions_total{action="shadow",probe="hidden",side="input"} 2.0' in series


QUESTION = {"questions": [{"type": "predicate", "name": "toxicity"}]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "setting", "status"), [("block", "trust", 200), ("flag", "refuse", 400)]
)
def test_unread_system_turn_is_trusted_or_refused_as_configured(
    tiny, probes, mode, setting, status
):
    """Which policies refuse it without saying so is a law of ``test_policy_rules``."""
    system = [{"role": "system", "content": "abuse"}, *HELLO]
    later = [*HELLO, {"role": "assistant", "content": "hi"}, *system]
    policy = Policy(input={"toxicity": Rule(mode, threshold=1.0)}, system_turns=setting)
    with serving(tiny, probes, policy) as http:

        def statuses(turns):
            chat, decided = {**GREEDY, "messages": turns}, {"model": MODEL, "input": turns}
            return {
                http.post(CHATS, json=chat).status_code,
                http.post("/v1/decisions", json={**decided, **QUESTION}).status_code,
            }

        assert statuses(system) == {status}
        # What is refused is refused before anything is run.
        series = metrics(http)
        assert ("sidelight_prompt_tokens_total 0.0" in series) == (status == 400)
        assert statuses(HELLO) == statuses(later) == {200}


LONG = ["x", "x" * 50]
TEXTS = {
    "/v1/moderations": {"input": LONG, "probes": ["toxicity"]},
    "/v1/decisions": {"model": MODEL, "input": LONG[1], **QUESTION},
    GUARDRAIL: {
        "input_type": "request",
        "texts": LONG,
        "additional_provider_specific_params": {"probes": ["toxicity"]},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["score", "block"])
def test_checks_reject_overlong_texts_and_chats_report_missing_verdict(tiny, probes, mode):
    policy = Policy(
        input={"toxicity": Rule(mode, threshold=1.0, max_tokens=40)},
        output={"late": Rule(mode, max_tokens=3)},
    )
    with serving(tiny, probes, policy) as http:
        for path, body in TEXTS.items():
            answer = http.post(path, json=body)
            assert answer.status_code == 400, (path, answer.text)
            error = answer.json()["error"]
            assert error["code"] == "verdict_failed"
            assert "the limit of probe 'toxicity' is 40" in error["message"]
            assert f"Text {0 if path == '/v1/decisions' else 1} (" in error["message"]
        without_long = {"input": LONG[1:], "probes": ["topics"]}
        assert http.post("/v1/moderations", json=without_long).status_code == 200
        for stream in (False, True):
            told = http.post(CHATS, json={**GREEDY, "stream": stream}).text
            assert "No verdict from late: the text is longer than the policy" in told
            assert "not a finite number" not in told


def test_missing_verdicts_are_logged_and_counted(tiny, caplog):
    probe, rule = broken(untrained_probe(tiny, "early")), Rule("block")
    for on_failure, status, action in (("pass", 200, "fail_open"), ("block", 500, "fail_closed")):
        policy = Policy(input={"early": replace(rule, on_failure=on_failure)})
        with serving(tiny, [probe], policy) as http:
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="sidelight"):
                assert http.post(CHATS, json=GREEDY).status_code == status
            series = metrics(http)
        counted = f'sidelight_actions_total{{action="{action}",probe="early",side="input"}} 1.0'
        assert counted in series
        assert "Probe 'early' gave no verdict on the input" in caplog.text
        assert "hello" not in caplog.text


def test_blocked_prompt_generates_no_tokens(tiny, probes):
    passes = []
    count = tiny.model.register_forward_pre_hook(lambda *_: passes.append(1))
    policy = Policy(input={"toxicity": Rule("block", threshold=0.0)})
    with serving(tiny, probes, policy) as http:
        for stream in (False, True):
            assert http.post(CHATS, json={**GREEDY, "stream": stream}).status_code == 400
    count.remove()
    assert len(passes) == 2
