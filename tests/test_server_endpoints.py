"""The endpoints beside chat, and the report that leaves no chosen probe out in silence."""

import pytest

from live import MODEL, http_client, served
from sidelight.engines.base import PromptJudged
from sidelight.engines.transformers import TransformersEngine
from sidelight.errors import VerdictError
from sidelight.policy.decisions import decide
from sidelight.policy.enforcement import check_decisions
from sidelight.policy.rules import Policy, Rule, bound_rules
from sidelight.prompts import Reads
from sidelight.server.report import Report, category_names
from sidelight.types import Judgement, Task, Verdict
from tiny import TOPICS, three_probes, tiny_backbone, untrained_probe

# Batches of other shapes add in another order: float32 rounding over three layers.
ROUNDING = 1e-5
MODERATIONS = "/v1/moderations"


@pytest.fixture(scope="module")
def address(tiny):
    bare = untrained_probe(tiny, "spam", task=Task("binary", ("0", "1")))
    with served(TransformersEngine(tiny, [*three_probes(tiny), bare])) as address:
        yield address


def test_the_served_model_is_listed_with_its_probes(client):
    (model,) = client.models.list().data
    assert (model.id, model.object) == (MODEL, "model")
    assert model.model_extra["sidelight"]["probes"][0] == {
        "name": "toxicity",
        "kind": "binary",
        "labels": ["fine", "toxic"],
        "reads": "prompt",
        "version": "",
    }
    assert client.models.retrieve(MODEL) == model


def test_a_moderation_reports_every_category_and_no_other(client, http):
    (result,) = client.moderations.create(input="hello").results
    scores, categories = result.category_scores.to_dict(), result.categories.to_dict()
    labels = {"toxic", "billing", "refund", "other", "violence", "sexual", "spam"}
    assert scores.keys() == categories.keys() == labels
    assert result.category_applied_input_types.to_dict() == {label: ["text"] for label in labels}
    assert result.flagged == any(categories.values())
    verdicts = {v["probe"]: v for v in result.model_extra["sidelight"]["verdicts"]}
    assert scores["spam"] == verdicts["spam"]["probabilities"]["1"]
    # OpenAI's own category, of which no loaded probe knows anything.
    assert result.categories.harassment is None
    body = {"input": "hello", "probes": ["topics", "spam"]}
    (chosen,) = http.post(MODERATIONS, json=body).json()["results"]
    assert chosen["categories"].keys() == {"violence", "sexual", "spam"}


def test_each_text_of_a_list_is_judged_by_itself_and_as_a_chat(client):
    texts = ["hello", *(f"text {'long ' * i}" for i in range(5))]
    together = client.moderations.create(input=texts, model=MODEL).results
    for text, result in zip(texts, together, strict=True):
        (alone,) = client.moderations.create(input=text).results
        scores = alone.category_scores.to_dict()
        assert result.category_scores.to_dict() == pytest.approx(scores, abs=ROUNDING)
    message = {"role": "user", "content": "hello"}
    chat = client.chat.completions.create(model=MODEL, messages=[message], max_tokens=1)
    in_chat = {k: v for r in chat.moderation.input.results for k, v in r.category_scores.items()}
    assert together[0].category_scores.to_dict() == pytest.approx(in_chat, abs=ROUNDING)


@pytest.mark.slow
def test_thresholds_decide_the_flags_and_a_probe_of_responses_judges_no_prompt(tiny):
    probes = [
        untrained_probe(tiny, "always", threshold=0.0),
        untrained_probe(tiny, "never", threshold=1.0),
        untrained_probe(tiny, "topics", task=TOPICS, threshold=0.0),
        untrained_probe(tiny, "late", reads=Reads("both")),
    ]
    with served(TransformersEngine(tiny, probes)) as address, http_client(address) as http:
        (result,) = http.post(MODERATIONS, json={"input": "x"}).json()["results"]
        late = http.post(MODERATIONS, json={"input": "x", "probes": ["late"]})
    assert result["flagged"]
    flags = {"always/toxic": True, "never/toxic": False, "violence": True, "sexual": True}
    assert {name: result["categories"][name] for name in flags} == flags
    assert (late.status_code, late.json()["error"]["code"]) == (400, "no_prompt_probe")


def test_health_ready_and_version(http):
    assert http.get("/health").json() == {"status": "ok"}
    assert (http.head("/health").status_code, http.head("/health").content) == (200, b"")
    assert http.get("/ready").json() == {"status": "ready"}
    assert http.get("/version").json()["version"]


@pytest.mark.parametrize("path", ["/v1/moderations/", "/health/", "/v1/responses/r1"])
def test_an_unknown_route_has_a_code_and_leads_nowhere(http, path):
    answer = http.get(path, headers={"Host": "evil.example"})
    assert answer.status_code == 404
    assert "location" not in answer.headers
    assert answer.json()["error"]["code"] == "route_not_found"
    assert ("/v1/chat/completions" in answer.text) == ("responses" in path)


SAID = Verdict("early", "fine", ("fine",), {"fine": 1.0, "toxic": 0.0}, flagged=False)


@pytest.fixture(scope="module")
def report():
    backbone = tiny_backbone()
    reads = {"early": Reads("prompt"), "late": Reads("response")}
    probes = [untrained_probe(backbone, name, reads=read) for name, read in reads.items()]
    return Report("tiny/llama", probes, category_names(probes))


def decisions_on(report, judgement):
    """Of the probes that the judgement speaks of, as of a check."""
    known = {verdict.probe for verdict in judgement.verdicts} | {*judgement.failed}
    rules = bound_rules(Policy(), [probe for probe in report.probes if probe.name in known])
    return check_decisions(rules, PromptJudged(judgement, tokens=3), {"input", "output"})


@pytest.mark.parametrize(
    ("judgement", "has_response", "missing"),
    [
        (Judgement((SAID,)), False, None),
        (Judgement((SAID,)), True, "late"),
        (Judgement((SAID,), ("late",)), True, "late"),
        (Judgement((), ("early",)), False, "early"),
        # Unloaded since the request began.
        (Judgement(), False, "early"),
    ],
)
def test_a_probe_without_a_verdict_is_an_error(report, judgement, has_response, missing):
    decisions = decisions_on(report, judgement)
    if missing is None:
        report.require_all(decisions, has_response=has_response)
        assert [decision.verdict for decision in report.shown(decisions)] == [SAID]
        return
    with pytest.raises(VerdictError, match=missing):
        report.require_all(decisions, has_response=has_response)


def test_each_failure_has_its_own_reason(report):
    policy = Policy(output={"late": Rule(max_tokens=8)})
    rules = bound_rules(policy, report.probes)
    response = [decide(bound, Judgement(), tokens=9) for bound in rules]
    message = report.moderation((), response)["output"]["message"]
    assert "early: the output was not a finite number" in message
    assert "late: the text is longer than the policy" in message
