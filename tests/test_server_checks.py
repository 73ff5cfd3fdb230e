"""The endpoints that judge and write nothing, in the words of OpenAI, vLLM and LiteLLM."""

import json

import pytest

from live import MODEL, http_client, openai_client, served
from sidelight.engines.transformers import TransformersEngine
from sidelight.prompts import Reads
from sidelight.types import Task
from tiny import INTENT, TOPICS, three_probes, tiny_backbone, untrained_probe

# Batches of other shapes add in another order: float32 rounding over three layers.
ROUNDING = 1e-5
TEXT = "Where is my refund?"
GUARDRAIL = "/beta/litellm_basic_guardrail_api"


@pytest.fixture(scope="module")
def address():
    backbone = tiny_backbone()
    probes = [
        *three_probes(backbone),
        untrained_probe(backbone, "spam", task=Task("binary", ("0", "1")), threshold=0.0),
        untrained_probe(backbone, "refusal", reads=Reads("response"), threshold=0.0),
    ]
    with served(TransformersEngine(backbone, probes)) as address:
        yield address


@pytest.fixture
def expected(http):
    """The probabilities of each probe on TEXT, as a moderation gives them."""
    (result,) = http.post("/v1/moderations", json={"input": TEXT}).json()["results"]
    return {v["probe"]: v["probabilities"] for v in result["sidelight"]["verdicts"]}


def tokens_of(http, text=TEXT):
    message = {"role": "user", "content": text}
    return http.post("/tokenize", json={"messages": [message]}).json()["count"]


def ask(http, questions, text=TEXT):
    body = {"model": MODEL, "input": text, "questions": questions}
    response = http.post("/v1/decisions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def predicate(name):
    return {"type": "predicate", "name": name, "instructions": "?"}


def choice(name, *values):
    choices = [{"value": value} for value in values]
    return {"type": "choice", "name": name, "instructions": "?", "choices": choices}


def test_openais_client_asks_several_questions_about_one_text(address, http, expected):
    labels = ["refund", "other", "billing"]
    with openai_client(address) as client:
        decision = client.decisions.create(
            model=MODEL, input=TEXT, questions=[predicate("toxicity"), choice("intent", *labels)]
        )
    toxic, intent = decision.answers
    assert toxic.probability == pytest.approx(expected["toxicity"]["toxic"], abs=ROUNDING)
    assert [p.value for p in intent.probabilities] == labels
    by_label = {p.value: p.probability for p in intent.probabilities}
    assert by_label == pytest.approx(expected["intent"], abs=ROUNDING)
    assert intent.choice == max(by_label, key=by_label.get)
    assert intent.confidence == by_label[intent.choice]
    assert decision.usage.input_tokens == decision.usage.total_tokens == tokens_of(http)
    assert decision.usage.output_tokens == 0


def test_a_predicate_may_name_a_category(http, expected):
    (answer,) = ask(http, [predicate("violence")])["answers"]
    assert answer["probability"] == pytest.approx(expected["topics"]["violence"], abs=ROUNDING)


def test_true_and_false_are_choices_of_a_binary_probe(http, expected):
    (answer,) = ask(http, [choice("spam", False, True)])["answers"]
    assert answer["choice"] is True
    assert [p["value"] for p in answer["probabilities"]] == [False, True]
    assert answer["confidence"] == pytest.approx(expected["spam"]["1"], abs=ROUNDING)


@pytest.mark.parametrize(
    "question",
    [
        predicate("nothing"),
        predicate("intent"),
        predicate(None),
        predicate("refusal"),
        choice("intent", "refund", "billing"),
        choice("intent", "refund", "billing", "other", "more"),
        choice("intent", "refund", "refund", "other"),
        choice("topics", "violence", "sexual"),
        {"type": "score", "name": "toxicity", "instructions": "?", "levels": [{"label": "low"}]},
    ],
)
def test_what_no_probe_answers_is_refused_and_the_rest_is_answered(http, question):
    refused, answered = ask(http, [question, predicate("toxicity")])["answers"]
    assert refused == {"type": "refusal", "name": question["name"]}
    assert answered["type"] == "predicate"


def test_questions_that_no_probe_answers_read_nothing(http):
    assert ask(http, [predicate("nothing")])["usage"]["input_tokens"] == 0


def test_a_conversation_with_its_response_is_judged_by_response_probes(http):
    turns = [
        {"role": "user", "content": [{"type": "input_text", "text": TEXT}]},
        {"type": "message", "role": "assistant", "content": "I cannot help with that."},
    ]
    early, late = ask(http, [predicate("toxicity"), predicate("refusal")], turns)["answers"]
    assert early["type"] == late["type"] == "predicate"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("questions", []),
        ("questions", [predicate("x")] * 401),
        ("questions", [{"type": "guess", "name": "x"}]),
        ("questions", [choice("x", "one")]),
        ("input", []),
        ("input", 3),
        ("input", [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]),
        ("input", [{"type": "function_call", "name": "f", "arguments": "", "call_id": "1"}]),
    ],
)
def test_a_wrong_decision_request_is_a_400_that_names_the_field(http, field, value):
    body = {"model": MODEL, "input": TEXT, "questions": [predicate("toxicity")], field: value}
    response = http.post("/v1/decisions", json=body)
    assert response.status_code == 400
    assert field in response.json()["error"]["message"]


def test_systemone_answers_by_question_id(http, expected):
    questions = {
        "toxicity": {"type": "noul", "instructions": "Is it toxic?"},
        "intent": {"type": "choice", "criteria": dict.fromkeys(INTENT.labels)},
        "nothing": {"type": "noul"},
        "topics": {"type": "score", "criteria": ["low", "high"]},
    }
    answer = http.post("/v1/systemone", json={"state": TEXT, "questions": questions}).json()
    toxic = expected["toxicity"]["toxic"]
    assert answer["object"] == "structured_decision"
    assert answer["answers"]["toxicity"]["noul"] == pytest.approx(toxic, abs=ROUNDING)
    intent = answer["answers"]["intent"]
    assert intent["probabilities"] == pytest.approx(expected["intent"], abs=ROUNDING)
    assert answer["answers"]["nothing"] == answer["answers"]["topics"] == {"type": "refusal"}
    assert answer["diagnostics"].keys() == {"toxicity", "intent"}
    assert answer["usage"] == {"input_tokens": tokens_of(http), "output_tokens": 0}


def test_systemone_judges_json_as_one_line(http):
    questions = {"toxicity": {"type": "noul"}}
    state = {"a": [1, "\u00e9"]}
    as_json = http.post("/v1/systemone", json={"state": state, "questions": questions}).json()
    text = '{"a": [1, "\u00e9"]}'
    as_text = http.post("/v1/systemone", json={"state": text, "questions": questions}).json()
    assert as_json["answers"] == as_text["answers"]


def test_deep_json_is_judged_at_the_length_that_it_was_sent(http):
    depth, questions = 100, {"toxicity": {"type": "noul"}}
    state = json.loads("[" * depth + "]" * depth)
    answer = http.post("/v1/systemone", json={"state": state, "questions": questions}).json()
    assert answer["usage"]["input_tokens"] == tokens_of(http, "[" * depth + "]" * depth)


@pytest.mark.parametrize("number", ["1e999", "-1e999"])
def test_systemone_refuses_a_number_that_no_float_holds(http, number):
    body = f'{{"state": [{number}], "questions": {{"toxicity": {{"type": "noul"}}}}}}'
    headers = {"Content-Type": "application/json"}
    error = http.post("/v1/systemone", content=body, headers=headers).json()["error"]
    assert error["param"] == "state"


def test_systemone_refuses_what_it_cannot_see(http):
    body = {"state": TEXT, "questions": {"toxicity": {"type": "noul"}}, "images": ["data:,x"]}
    assert http.post("/v1/systemone", json=body).status_code == 400


@pytest.mark.parametrize("how", [{"model": "intent"}, {"model": MODEL, "probes": ["intent"]}])
def test_classify_gives_one_probes_labels(http, expected, how):
    answer = http.post("/classify", json={"input": [TEXT, "x"], **how}).json()
    first, second = answer["data"]
    assert answer["model"] == "intent"
    assert (first["index"], second["index"], first["num_classes"]) == (0, 1, 3)
    probs = dict(zip(INTENT.labels, first["probs"], strict=True))
    assert probs == pytest.approx(expected["intent"], abs=ROUNDING)
    assert first["label"] == max(probs, key=probs.get)
    read = tokens_of(http) + tokens_of(http, "x")
    assert answer["usage"] == {"prompt_tokens": read, "total_tokens": read, "completion_tokens": 0}


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ({}, "probe_not_chosen"),
        ({"model": MODEL}, "probe_not_chosen"),
        ({"probes": ["intent", "spam"]}, "probe_not_chosen"),
        ({"probes": ["x"]}, "probe_not_found"),
        ({"model": "x"}, "model_not_found"),
        ({"model": "refusal"}, "no_prompt_probe"),
    ],
)
def test_classify_needs_one_probe_that_can_judge(http, how, code):
    response = http.post("/classify", json={"input": TEXT, **how})
    assert response.json()["error"]["code"] == code
    assert response.status_code in {400, 404}


def guard(http, **fields):
    return http.post(GUARDRAIL, json={"input_type": "request", "texts": [TEXT], **fields})


def test_the_guardrail_blocks_what_a_probe_flags(http):
    chosen = {"additional_provider_specific_params": {"probes": ["spam", "intent"]}}
    answer = guard(http, **chosen).json()
    assert (answer["action"], answer["blocked_reason"]) == ("BLOCKED", "Flagged by spam.")
    assert [v["probe"] for v in answer["sidelight"]["verdicts"]] == ["intent", "spam"]
    assert TEXT not in answer["blocked_reason"]


def test_the_guardrail_passes_what_no_probe_flags(http):
    chosen = {"additional_provider_specific_params": {"probes": ["intent"]}}
    answer = guard(http, **chosen).json()
    assert (answer["action"], answer["blocked_reason"]) == ("NONE", None)


def test_the_guardrail_passes_no_text_that_stands_in_another_field(http):
    for body in ({}, {"structured_messages": [{"role": "user", "content": TEXT}]}):
        answer = http.post(GUARDRAIL, json={"input_type": "request", **body})
        assert answer.status_code == 400
        assert "neither 'texts' nor 'tool_calls'" in answer.json()["error"]["message"]


def test_the_guardrail_judges_a_response_by_the_probes_of_responses(http):
    answer = guard(http, input_type="response", texts=["I cannot."]).json()
    assert answer["action"] == "BLOCKED"
    assert [v["probe"] for v in answer["sidelight"]["verdicts"]] == ["refusal"]


def called(arguments, name="search"):
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_the_guardrail_judges_a_response_that_is_only_a_tool_call(http):
    fields = {"input_type": "response", "texts": [], "tool_calls": [called('{"query": "bombs"}')]}
    answer = guard(http, **fields).json()
    assert (answer["action"], answer["blocked_reason"]) == ("BLOCKED", "Flagged by refusal.")
    assert "texts" not in answer


@pytest.mark.parametrize(("name", "read"), [("search", 'search\n{"a": 1}'), (None, '{"a": 1}')])
def test_the_guardrail_judges_a_tool_call_as_a_text_after_the_others(http, name, read):
    chosen = {"additional_provider_specific_params": {"probes": ["toxicity"]}}
    calls = guard(http, **chosen, tool_calls=[called('{"a": 1}', name)]).json()
    texts = guard(http, **chosen, texts=[TEXT, read]).json()
    assert calls["sidelight"] == texts["sidelight"]
    assert len(calls["sidelight"]["verdicts"]) == 2


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"function": {"name": "search"}},
        {"function": {"name": "search", "arguments": {"query": "bombs"}}},
        {"type": "custom", "custom": {"name": "search", "input": "bombs"}},
    ],
)
def test_the_guardrail_refuses_a_tool_call_that_it_cannot_read(http, call):
    refused = guard(http, tool_calls=[call])
    assert refused.status_code == 400
    assert refused.json()["error"]["param"].startswith("tool_calls.0.function")


def test_the_guardrail_does_not_judge_the_missing_prompt_of_a_response():
    backbone = tiny_backbone()
    probes = [
        untrained_probe(backbone, "wordy", reads=Reads(template=False)),
        untrained_probe(backbone, "refusal", reads=Reads("response"), threshold=0.0),
    ]
    with (
        served(TransformersEngine(backbone, probes)) as address,
        http_client(address) as http,
    ):
        answer = guard(http, input_type="response", texts=["I cannot."])
        series = http.get("/metrics").text
    assert answer.json()["blocked_reason"] == "Flagged by refusal."
    assert 'sidelight_verdicts_total{outcome="flagged",probe="refusal"} 1.0' in series
    counted = [line for line in series.splitlines() if 'probe="wordy"' in line]
    assert counted
    assert all(line.endswith(" 0.0") for line in counted)


def test_the_guardrail_refuses_what_it_cannot_judge(http):
    chosen = {"additional_provider_specific_params": {"probes": ["intent"]}}
    late = guard(http, input_type="response", **chosen)
    assert (late.status_code, late.json()["error"]["code"]) == (400, "no_response_probe")
    assert guard(http, images=["data:,x"]).status_code == 400
    late_only = {"additional_provider_specific_params": {"probes": ["refusal"]}}
    assert guard(http, **late_only).json()["error"]["code"] == "no_prompt_probe"
    assert guard(http, texts=["x" * 300]).json()["error"]["code"] == "context_length_exceeded"


def test_tokens_of_a_prompt_and_of_a_chat(http):
    plain = http.post("/tokenize", json={"prompt": "hi", "return_token_strs": True}).json()
    assert plain["token_strs"] == ["h", "i"]
    assert (plain["count"], plain["max_model_len"]) == (2, 256)
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    in_chat = http.post("/tokenize", json=chat).json()
    assert in_chat["token_strs"] is None
    request = {**chat, "max_tokens": 1}
    usage = http.post("/v1/chat/completions", json=request).json()["usage"]
    assert in_chat["count"] == len(in_chat["tokens"]) == usage["prompt_tokens"]


@pytest.mark.parametrize(
    "body",
    [{}, {"prompt": ""}, {"prompt": "x" * 300}, {"prompt": "x", "messages": []}],
)
def test_what_cannot_be_tokenised_is_a_400(http, body):
    assert http.post("/tokenize", json=body).status_code == 400


def test_multilabel_probes_classify_each_label_by_itself(http, expected):
    (data,) = http.post("/classify", json={"model": "topics", "input": TEXT}).json()["data"]
    probs = dict(zip(TOPICS.labels, data["probs"], strict=True))
    assert probs == pytest.approx(expected["topics"], abs=ROUNDING)
