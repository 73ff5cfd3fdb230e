"""No field of a request that matters is ignored in silence."""

import time
from contextlib import suppress

import pytest
from openai import BadRequestError
from pydantic import ValidationError

from live import MODEL, http_client, openai_client, served
from sidelight.engines.transformers import TransformersEngine
from sidelight.server.schemas import ModerationRequest, StreamOptions
from tiny import three_probes, tiny_backbone

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
SHORT = {"max_tokens": 1, "temperature": 0}
BODIES = {
    CHAT: {"model": MODEL, "messages": HELLO, **SHORT},
    TEXT: {"model": MODEL, "prompt": "hello", **SHORT},
    "/v1/moderations": {"input": "hello"},
    "/classify": {"model": "toxicity", "input": "hello"},
    "/beta/litellm_basic_guardrail_api": {"input_type": "request", "texts": ["hello"]},
    "/tokenize": {"prompt": "hello"},
    "/v1/decisions": {
        "model": MODEL,
        "input": "hello",
        "questions": [{"type": "predicate", "name": "toxicity"}],
    },
    "/v1/systemone": {"state": "hello", "questions": {"toxicity": {"type": "noul"}}},
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
# A value that asks for something else, and one that asks for what happens anyway.
UNSUPPORTED = {
    "tools": ([TOOL], []),
    "tool_choice": ("required", "none"),
    "functions": ([TOOL["function"]], []),
    "function_call": ({"name": "f"}, "auto"),
    "response_format": ({"type": "json_object"}, {"type": "text"}),
    "logit_bias": ({"5": -100}, {}),
    "frequency_penalty": (0.5, 0),
    "presence_penalty": (-0.5, 0.0),
    "modalities": (["text", "audio"], ["text"]),
    "audio": ({"voice": "alloy", "format": "wav"}, None),
    "prediction": ({"type": "content", "content": "x"}, None),
    "web_search_options": ({}, None),
    "reasoning_effort": ("high", "none"),
    "verbosity": ("low", "medium"),
    "store": (True, False),
    "top_k": (5, -1),
    "min_p": (0.1, 0.0),
    "repetition_penalty": (1.1, 1.0),
    "structured_outputs": ({"choice": ["a"]}, None),
    "extra_body": ({"probes": ["toxicity"]}, {}),
}


@pytest.fixture(scope="module")
def address():
    backbone = tiny_backbone()
    with served(TransformersEngine(backbone, three_probes(backbone))) as address:
        yield address


@pytest.fixture
def http(address):
    with http_client(address) as client:
        yield client


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_would_change_the_answer_is_refused_unless_it_asks_for_the_default(http, path, name):
    asked, default = UNSUPPORTED[name]
    refused = http.post(path, json={**BODIES[path], name: asked})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (
        400,
        "unsupported_parameter",
        name,
    )
    for value in (default, None):
        assert http.post(path, json={**BODIES[path], name: value}).status_code == 200


@pytest.mark.parametrize(("name", "value"), [("best_of", 2), ("echo", True), ("suffix", "x")])
def test_what_only_texts_have_is_refused_too(http, name, value):
    error = http.post(TEXT, json={**BODIES[TEXT], name: value}).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", name)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_fields_that_change_no_answer_are_taken(http, path):
    more = {
        "user": "u",
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "parallel_tool_calls": True,
    }
    more |= {"prompt_cache_key": "k", "safety_identifier": "s", "anything_else": [1]}
    assert http.post(path, json={**BODIES[path], **more}).status_code == 200


@pytest.mark.parametrize("path", BODIES)
def test_a_misspelt_field_is_refused_with_a_hint(http, path):
    assert http.post(path, json=BODIES[path]).status_code == 200
    fields = [name for name in BODIES[path] if len(name) > 4]
    misspelt = {f"{fields[-1]}s": fields[-1], fields[-1].upper(): fields[-1]}
    if path in (CHAT, TEXT):
        misspelt |= {"probe": "probes", "policy": "policies", "max_token": "max_tokens"}
        misspelt |= {"Probes": "probes", "moderations": "moderation", "max-tokens": "max_tokens"}
    for name, meant in misspelt.items():
        refused = http.post(path, json={**BODIES[path], name: None})
        error = refused.json()["error"]
        assert (error["code"], error["param"]) == ("unknown_parameter", name)
        assert f"'{meant}'" in error["message"]


def test_a_misspelt_field_of_the_guardrails_own_parameters_is_refused(http):
    path = "/beta/litellm_basic_guardrail_api"
    body = {**BODIES[path], "additional_provider_specific_params": {"probe": ["toxicity"]}}
    assert http.post(path, json=body).json()["error"]["code"] == "unknown_parameter"


def test_a_body_of_very_many_fields_is_refused(http):
    body = {**BODIES[CHAT], **{f"probe{number}": 0 for number in range(65)}}
    assert http.post(CHAT, json=body).json()["error"]["code"] == "too_many_values"


@pytest.mark.parametrize("model", [ModerationRequest, StreamOptions])
def test_a_very_long_name_of_a_field_is_compared_with_none(model):
    """That would hold up everybody for seconds."""
    start = time.process_time()
    with suppress(ValidationError):
        model.model_validate({"q" * 40_000_000: 0, "input": "hello"})
    assert time.process_time() - start < 1


@pytest.mark.parametrize("options", [{"include_usages": True}, {"continuous_usage_stats": True}])
def test_a_stream_has_no_other_options(http, options):
    body = {**BODIES[CHAT], "stream": True}
    assert http.post(CHAT, json={**body, "stream_options": options}).status_code == 400
    taken = {"include_usage": True, "include_obfuscation": False}
    assert http.post(CHAT, json={**body, "stream_options": taken}).status_code == 200


def test_openais_client_shows_the_code(address):
    with openai_client(address) as client, pytest.raises(BadRequestError) as raised:
        client.chat.completions.create(model=MODEL, messages=HELLO, tools=[TOOL])
    assert (raised.value.code, raised.value.param) == ("unsupported_parameter", "tools")
