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


@pytest.fixture(scope="module")
def address():
    backbone = tiny_backbone()
    bare = untrained_probe(backbone, "spam", task=Task("binary", ("0", "1")))
    with served(TransformersEngine(backbone, [*three_probes(backbone), bare])) as address:
        yield address


def test_the_served_model_is_listed_with_its_probes(client):
    (model,) = client.models.list().data
    assert (model.id, model.object) == (MODEL, "model")
    probes = model.model_extra["sidelight"]["probes"]
    assert probes[0] == {
        "name": "toxicity",
        "kind": "binary",
        "labels": ["fine", "toxic"],
        "reads": "prompt",
        "version": "",
    }
    assert client.models.retrieve(MODEL) == model


def test_a_moderation_reports_every_category_and_no_other(client):
    (result,) = client.moderations.create(input="hello").results
    scores = result.category_scores.to_dict()
    categories = result.categories.to_dict()
    labels = {"toxic", "billing", "refund", "other", "violence", "sexual", "spam"}
    assert scores.keys() == categories.keys() == labels
    assert result.category_applied_input_types.to_dict() == {label: ["text"] for label in labels}
    assert result.flagged == any(categories.values())
    verdicts = {v["probe"]: v for v in result.model_extra["sidelight"]["verdicts"]}
    assert scores["spam"] == verdicts["spam"]["probabilities"]["1"]
    # OpenAI's own category, of which no loaded probe knows anything.
    assert result.categories.harassment is None


def test_each_text_of_a_list_is_judged_by_itself(client):
    texts = [f"text {'long ' * i}" for i in range(5)]
    together = client.moderations.create(input=texts, model=MODEL).results
    for text, result in zip(texts, together, strict=True):
        (alone,) = client.moderations.create(input=text).results
        assert result.category_scores.to_dict() == pytest.approx(
            alone.category_scores.to_dict(), abs=ROUNDING
        )


def test_a_moderation_says_what_a_chat_says(client):
    message = {"role": "user", "content": "hello"}
    chat = client.chat.completions.create(model=MODEL, messages=[message], max_tokens=1)
    (result,) = client.moderations.create(input="hello").results
    scores = [r.category_scores for r in chat.moderation.input.results]
    in_chat = {category: score for each in scores for category, score in each.items()}
    assert result.category_scores.to_dict() == pytest.approx(in_chat, abs=ROUNDING)


def test_a_moderation_by_named_probes(http):
    body = {"input": "hello", "probes": ["topics", "spam"]}
    (result,) = http.post("/v1/moderations", json=body).json()["results"]
    assert result["categories"].keys() == {"violence", "sexual", "spam"}


@pytest.mark.parametrize("text", [[], 3, [3], [["x"]], None])
def test_a_moderation_of_nothing_is_a_400(http, text):
    assert http.post("/v1/moderations", json={"input": text}).status_code == 400


def test_thresholds_decide_the_flags():
    backbone = tiny_backbone()
    probes = [
        untrained_probe(backbone, "always", threshold=0.0),
        untrained_probe(backbone, "never", threshold=1.0),
        untrained_probe(backbone, "topics", task=TOPICS, threshold=0.0),
    ]
    with served(TransformersEngine(backbone, probes)) as address, http_client(address) as http:
        (result,) = http.post("/v1/moderations", json={"input": "x"}).json()["results"]
    assert result["flagged"]
    assert result["categories"] == {
        "always/toxic": True,
        "never/toxic": False,
        "violence": True,
        "sexual": True,
    }


def test_a_text_that_no_probe_can_judge_is_refused():
    backbone = tiny_backbone()
    probes = [untrained_probe(backbone, "late", reads=Reads("both"))]
    with served(TransformersEngine(backbone, probes)) as address, http_client(address) as http:
        response = http.post("/v1/moderations", json={"input": "x"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "no_prompt_probe"


def test_health_ready_and_version(http):
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    assert http.get("/version").json()["version"]


SAID = Verdict("early", "fine", ("fine",), {"fine": 1.0, "toxic": 0.0}, flagged=False)


@pytest.fixture(scope="module")
def report():
    backbone = tiny_backbone()
    probes = [
        untrained_probe(backbone, "early"),
        untrained_probe(backbone, "late", reads=Reads("response")),
    ]
    return Report("tiny/llama", probes, category_names(probes))


def decisions_on(report, event):
    """Of the probes that the event speaks of, as of a check."""
    known = {verdict.probe for verdict in event.judgement.verdicts} | {*event.judgement.failed}
    probes = [probe for probe in report.probes if probe.name in known]
    return check_decisions(bound_rules(Policy(), probes), event, {"input", "output"})


def test_a_probe_of_the_response_is_not_required_where_there_is_none(report):
    decisions = decisions_on(report, PromptJudged(Judgement((SAID,)), tokens=3))
    report.require_all(decisions, has_response=False)
    assert [decision.verdict for decision in report.shown(decisions)] == [SAID]


@pytest.mark.parametrize(
    ("event", "has_response", "name"),
    [
        (PromptJudged(Judgement((SAID,)), tokens=3), True, "late"),
        (PromptJudged(Judgement((SAID,), ("late",)), tokens=3), True, "late"),
        (PromptJudged(Judgement((), ("early",)), tokens=3), False, "early"),
        # Unloaded since the request began.
        (PromptJudged(Judgement(), tokens=3), False, "early"),
    ],
)
def test_a_probe_without_a_verdict_is_an_error(report, event, has_response, name):
    with pytest.raises(VerdictError, match=name):
        report.require_all(decisions_on(report, event), has_response=has_response)


def test_each_failure_has_its_own_reason(report):
    policy = Policy(output={"late": Rule(max_tokens=8)})
    response = [
        decide(bound, Judgement(), tokens=9) for bound in bound_rules(policy, report.probes)
    ]
    message = report.moderation((), response)["output"]["message"]
    assert "early: the output was not a finite number" in message
    assert "late: the text is longer than the policy" in message
