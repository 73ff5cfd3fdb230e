"""``/classify``, as vLLM's clients ask it: one probe, and a label that is the decision."""

import pytest

from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.models.conversation import Message, Reads
from sidelight.policy.rules import Rule
from sidelight.server.classify import classification_of
from worlds.models import (
    INTENT,
    NAMES_AND_PLACES,
    TOPICS,
    TOXICITY,
    spans_probe,
    three_probes,
    untrained_probe,
)
from worlds.servers import ENGINE_ROUNDING, MODEL, served, under_rules

TEXT = "Where is my refund?"
TURNS = [{"role": "user", "content": TEXT}]
ANSWERED = [*TURNS, {"role": "assistant", "content": "I cannot help with that."}]
ADMIN = "admin-key"


@pytest.fixture(scope="module")
def address(tiny):
    probes = [
        *three_probes(tiny),
        spans_probe(tiny, "words", threshold=0.5),
        untrained_probe(tiny, "refusal", reads=Reads("response"), threshold=0.0),
    ]
    with served(TransformersEngine(tiny, probes)) as address:
        yield address


def classify(http, path="/classify", **body):
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(http, headers=None, **body):
    answer = http.post("/classify", json=body, headers=headers)
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"], error["message"]


@pytest.mark.parametrize("path", ["/classify", "/v1/classify"])
def test_classify_returns_label_and_all_probabilities_per_text(http, tiny, path):
    texts = [TEXT, "hello"]
    answer = classify(http, path, model="toxicity", input=texts)
    body = {"input": texts, "probes": ["toxicity"]}
    moderated = http.post("/v1/moderations", json=body).json()["results"]
    for index, (found, wanted) in enumerate(zip(answer["data"], moderated, strict=True)):
        (verdict,) = wanted["sidelight"]["verdicts"]
        probabilities = [verdict["probabilities"][label] for label in TOXICITY.labels]
        assert found["probs"] == pytest.approx(probabilities, abs=ENGINE_ROUNDING)
        assert (found["index"], found["label"]) == (index, verdict["label"])
        assert found["num_classes"] == 2
    assert answer["id"].startswith("classify-")
    assert (answer["object"], answer["model"]) == ("list", "toxicity")
    tokens = sum(len(tiny.encoder.encode([Message("user", text)])) for text in texts)
    usage = {name: answer["usage"][f"{name}_tokens"] for name in ("prompt", "completion", "total")}
    assert usage == {"prompt": tokens, "completion": 0, "total": tokens}


def test_probabilities_follow_label_order_of_models_route(http):
    (model,) = http.get("/v1/models").json()["data"]
    for probe in model["sidelight"]["probes"]:
        (found,) = classify(http, model=probe["name"], input=TEXT)["data"]
        assert found["num_classes"] == len(found["probs"]) == len(probe["labels"])
        if probe["kind"] == "multiclass":
            assert found["label"] == probe["labels"][found["probs"].index(max(found["probs"]))]


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_binary_label_is_positive_exactly_when_rule_flags(tiny, threshold):
    """Also where the other label is the more probable one."""
    probe = untrained_probe(tiny, "toxicity")
    with under_rules(tiny, [probe], {"toxicity": Rule("flag", threshold=threshold)}) as http:
        found = classify(http, input=[TEXT, "a", "x"])["data"]
    assert len({max(each["probs"]) == each["probs"][1] for each in found}) == 2
    assert {each["label"] for each in found} == {"fine" if threshold else "toxic"}


@pytest.mark.parametrize(
    ("task", "thresholds", "label"),
    [
        (TOXICITY, {"toxic": 0.3}, "toxic"),
        (TOXICITY, {"toxic": 0.7}, "fine"),
        (INTENT, {}, "refund"),
        (INTENT, {"billing": 0.2}, "billing"),
        (INTENT, {"billing": 0.2, "refund": 0.2}, "refund"),
        (TOPICS, {"violence": 0.2, "sexual": 0.2}, "sexual"),
        (TOPICS, {"violence": 0.2, "sexual": 0.7}, "violence"),
        (TOPICS, {"violence": 0.7, "sexual": 0.7}, "none"),
    ],
)
def test_label_is_highest_scoring_one_that_holds(task, thresholds, label):
    scores = {name: [0.4, 0.6, 0.1][index] for index, name in enumerate(task.labels)}
    found = classification_of(0, task.decide("probe", scores, thresholds))
    assert (found.label, found.probs) == (label, [*scores.values()])


def test_span_label_holds_regardless_of_text_score():
    scores = dict.fromkeys(NAMES_AND_PLACES.labels, 0.1)
    verdict = NAMES_AND_PLACES.decide(
        "words", scores, dict.fromkeys(NAMES_AND_PLACES.labels, 0.9), annotated=["PLACE"]
    )
    assert classification_of(0, verdict).label == "PLACE"


def test_conversation_is_classified_like_chat(http):
    blocks = [{"type": "text", "text": TEXT}]
    labels = [
        classify(http, model="toxicity", messages=[{"role": "user", "content": content}])["data"]
        for content in (TEXT, blocks)
    ]
    assert labels[0] == labels[1] == classify(http, model="toxicity", input=TEXT)["data"]
    decided = {"model": MODEL, "input": ANSWERED}
    decided["questions"] = [{"type": "predicate", "name": "refusal"}]
    (found,) = classify(http, model="refusal", messages=ANSWERED)["data"]
    (answer,) = http.post("/v1/decisions", json=decided).json()["answers"]
    assert found["probs"][1] == pytest.approx(answer["probability"], abs=ENGINE_ROUNDING)


def test_response_probe_classifies_bare_text_as_response(http):
    """As the guardrail judges a response; a rail of outputs sends no prompt either."""
    (found,) = classify(http, model="refusal", input="I cannot help.")["data"]
    body = {"input_type": "response", "texts": ["I cannot help."]}
    guarded = http.post("/beta/litellm_basic_guardrail_api", json=body).json()
    (verdict,) = guarded["sidelight"]["verdicts"]
    wanted = [*verdict["probabilities"].values()]
    assert found["probs"] == pytest.approx(wanted, abs=ENGINE_ROUNDING)
    assert found["label"] == "toxic"


def test_model_field_names_probe_or_defaults_to_only_prompt_probe(tiny, http):
    for name in (None, MODEL):
        body = {"input": TEXT} if name is None else {"input": TEXT, "model": name}
        status, code, param, message = refusal(http, **body)
        assert (status, code, param) == (400, "probe_required", "model")
        assert "toxicity, intent, topics, words" in message
    status, code, param, message = refusal(http, input=TEXT, model="toxic")
    assert (status, code, param) == (404, "model_not_found", "model")
    assert "Did you mean 'toxicity'?" in message
    probes = [untrained_probe(tiny, "toxicity"), untrained_probe(tiny, "newer")]
    response_probe = untrained_probe(tiny, "refusal", reads=Reads("response"))
    with under_rules(tiny, [*probes, response_probe], {"newer": Rule("shadow")}) as single_rule:
        for body in ({}, {"model": MODEL}, {"model": "toxicity"}):
            assert classify(single_rule, input=TEXT, **body)["model"] == "toxicity"
        status, code, _, message = refusal(single_rule, input=TEXT, model="newer")
        assert (status, code) == (404, "model_not_found")
        assert "newer" not in message.partition("Known:")[2]


def test_refusal_without_prompt_probe_explains_why(tiny):
    response_probe = untrained_probe(tiny, "refusal", reads=Reads("response"))
    with under_rules(tiny, [response_probe]) as http:
        status, code, _, message = refusal(http, input=TEXT)
        assert (status, code) == (400, "probe_required")
        assert "refusal" in message
    with under_rules(tiny, [untrained_probe(tiny, "newer")], {"newer": Rule("shadow")}) as http:
        status, code, _, message = refusal(http, input=TEXT)
        assert (status, code) == (400, "no_prompt_probe")
        assert "shadow" in message
        assert "newer" not in message


def test_response_probe_rejects_input_without_response(http):
    status, code, _, _ = refusal(http, model="refusal", messages=TURNS)
    assert (status, code) == (400, "no_prompt_probe")
    status, code, _, _ = refusal(http, model="refusal", input="")
    assert (status, code) == (400, "no_prompt_probe")


def test_classify_hides_scores_from_clients_but_not_admins(tiny):
    probe = untrained_probe(tiny, "labelled", threshold=0.0)
    with under_rules(tiny, [probe], {"labelled": Rule("block")}) as http:
        key = {"Authorization": f"Bearer {ADMIN}"}
        (found,) = classify(http, model="labelled", input=TEXT)["data"]
        assert (found["label"], found["probs"]) == ("toxic", [0.0, 1.0])
        body = {"model": "labelled", "input": TEXT}
        (entry,) = http.post("/classify", json=body, headers=key).json()["data"]
        assert 0 < entry["probs"][0] < 1


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("truncate_prompt_tokens", 5, "unsupported_parameter"),
        ("truncate_prompt_tokens", -1, "unsupported_parameter"),
        ("truncation_side", "left", "unsupported_parameter"),
        ("use_activation", False, None),
        ("cache_salt", "salt", "unsupported_parameter"),
        ("chat_template", "{{ messages }}", "unsupported_parameter"),
        ("chat_template_kwargs", {"tools": []}, "unsupported_parameter"),
        ("continue_final_message", True, "unsupported_parameter"),
        ("padding", "max_length", "unsupported_parameter"),
        ("priority", 1, "unsupported_parameter"),
        ("normalize", True, "unsupported_parameter"),
        ("threshold", 0.5, "unknown_parameter"),
        ("input", [1, 2], None),
        ("input", [[1, 2]], None),
        ("input", [], None),
        ("input", 5, None),
        ("messages", TURNS, "missing_parameter"),
        ("input", None, "missing_parameter"),
    ],
)
def test_unsupported_or_invalid_parameters_are_rejected(http, field, value, code):
    body = {"model": "toxicity", "input": TEXT, field: value}
    status, found, param, _ = refusal(http, **body)
    assert (status, found) == (400, code)
    assert param.startswith("input" if code == "missing_parameter" else field)


def test_default_fields_of_vllm_clients_are_accepted(http):
    fields = {"user": "u", "request_id": "1", "priority": 0, "add_special_tokens": True}
    fields |= {"truncate_prompt_tokens": None, "use_activation": True, "padding": "do_not_pad"}
    assert classify(http, model="toxicity", input=TEXT, **fields)["data"]


def test_one_missing_verdict_fails_entire_request(tiny):
    """An entry less would look like a harmless text."""
    probe = untrained_probe(tiny, "words", reads=Reads(template=False))
    with under_rules(tiny, [probe]) as http:
        status, code, _, message = refusal(http, input=[TEXT, ""])
        assert (status, code) == (400, "verdict_failed")
        assert "Text 1" in message
        assert refusal(http, input=["x" * 300])[:2] == (400, "context_length_exceeded")
        assert refusal(http, input=["x"] * 600)[:2] == (400, "too_many_inputs")
