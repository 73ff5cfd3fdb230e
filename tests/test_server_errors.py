"""Every refusal has OpenAI's shape, says what to do, and tells nothing it should not."""

import asyncio
import gc
import io
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from unittest.mock import Mock

import pytest
from pydantic import ValidationError

from sidelight.engines.base import EngineBusyError, EngineUnavailableError, GenerationError
from sidelight.engines.queue import Limits
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.errors import ContextLengthError, SidelightError, VerdictError
from sidelight.server.errors import as_request_error
from sidelight.server.guardrail import GuardrailRequest
from sidelight.server.observe import LogFormatter
from sidelight.server.questions import DecisionRequest
from sidelight.server.schemas import ChatRequest, CompletionRequest, TextsRequest
from worlds.models import three_probes
from worlds.servers import MODEL, http_client, served

CHAT, TEXT, MODERATIONS = "/v1/chat/completions", "/v1/completions", "/v1/moderations"
HELLO = [{"role": "user", "content": "hello"}]
VALID = {"model": MODEL, "messages": HELLO, "max_tokens": 2}
QUESTIONS = [{"type": "predicate", "name": "toxicity"}]
BODIES = {
    CHAT: VALID,
    TEXT: {"model": MODEL, "prompt": "hello", "max_tokens": 2},
    MODERATIONS: {"input": "hello"},
    "/v1/decisions": {"model": MODEL, "input": "hello", "questions": QUESTIONS},
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
LIMIT = 50_000
WRONG = [0] * 500


@pytest.fixture(scope="module")
def address(tiny):
    engine = TransformersEngine(tiny, three_probes(tiny))
    with served(engine, max_body_bytes=LIMIT) as address:
        yield address


def error_of(response, status):
    assert response.status_code == status, response.text
    (body,) = response.json().values()
    assert body.keys() == {"message", "type", "param", "code"}
    assert body["message"]
    return body


WRONG_VALUES = {
    "messages": [[], "hello", [{"role": "wizard", "content": "x"}], [{"role": "user"}]],
    "model": [None],
    "n": [0, 17],
    "temperature": [-0.1, 2.1, 10**400, "warm"],
    "top_p": [0, 1.1],
    "max_tokens": [0, 1.5],
    "max_completion_tokens": [0],
    "seed": [2**63, -(2**63) - 1, "x"],
    "stop": [["x"] * 17, 3],
    "prompt": [[], [1, 2], None, ["x"] * 17],
    "stream": ["yes"],
    "stream_options": [{"include_usages": True}, {"continuous_usage_stats": True}],
    "probes": ["toxicity"],
    "moderation": [{"policy": {"input": {"mode": "block"}}}],
}


@pytest.mark.parametrize("field", WRONG_VALUES)
def test_invalid_value_returns_400_naming_the_field(http, field):
    path = TEXT if field == "prompt" else CHAT
    for value in WRONG_VALUES[field]:
        error = error_of(http.post(path, json={**BODIES[path], field: value}), 400)
        assert error["type"] == "invalid_request_error"
        assert field in error["message"]


@pytest.mark.parametrize(
    ("path", "values"),
    [
        (CHAT, {"temperature": 2, "top_p": 1, "seed": -(2**63), "stop": ["#"] * 16}),
        (CHAT, {"max_completion_tokens": 1, "seed": 2**63 - 1, "n": 16}),
        (TEXT, {"max_tokens": 1, "prompt": ["x"] * 16}),
        ("/v1/decisions", {"questions": QUESTIONS * 400}),
    ],
)
def test_boundary_values_are_accepted(http, path, values):
    answer = http.post(path, json={**BODIES[path], **values})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", BODIES)
def test_unknown_field_is_rejected_on_every_route(http, path):
    assert http.post(path, json=BODIES[path]).status_code == 200
    for name in ("probe", "policies", "Model", "max-tokens", "extra_body", "top_k"):
        error = error_of(http.post(path, json={**BODIES[path], name: None}), 400)
        assert (error["code"], error["param"]) == ("unknown_parameter", name)
        assert "Known: " in error["message"]


# Of OpenAI's fields, each with a value that would change the answer.
NOT_HERE = {"tools": [TOOL], "tool_choice": "required", "function_call": {"name": "f"}}
NOT_HERE |= {"response_format": {"type": "json_object"}, "reasoning_effort": "high"}
NOT_HERE |= {"logprobs": True, "top_logprobs": 2, "logit_bias": {"5": -100}, "store": True}
NOT_HERE |= {"frequency_penalty": 0.5, "presence_penalty": -0.5, "service_tier": "flex"}
NOT_HERE |= {"best_of": 2, "echo": True, "suffix": "x", "modalities": ["audio"]}


def test_field_error_advice_matches_field_and_engine(http):
    for path, name, value, advice in (
        (CHAT, "prompt", "hello", "send the prompt to /v1/completions"),
        (TEXT, "messages", HELLO, "the messages to /v1/chat/completions"),
        (CHAT, "tools", [TOOL], "this engine does not support tool calling"),
    ):
        message = error_of(http.post(path, json={**BODIES[path], name: value}), 400)["message"]
        assert advice in message


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_vllm_only_features_are_rejected_by_name(http, path):
    for name, value in NOT_HERE.items():
        error = error_of(http.post(path, json={**BODIES[path], name: value}), 400)
        assert (error["code"], error["param"]) == ("unsupported_parameter", name)
        assert "--engine vllm" in error["message"]
        assert "GGUF" not in error["message"]
    # Without alternatives, but with the log-probability of each token; and nearly 1, but no number.
    for name, value in {"logprobs": 0, "best_of": True, "web_search_options": {}}.items():
        assert error_of(http.post(path, json={**BODIES[path], name: value}), 400)["param"] == name
    nothing = dict.fromkeys(NOT_HERE)
    assert http.post(path, json={**BODIES[path], **nothing}).status_code == 200


# What clients always send, of which nothing is read.
HARMLESS = {"user": "u", "metadata": {"a": "b"}, "safety_identifier": "s", "store": False}
HARMLESS |= {"prompt_cache_key": "k", "parallel_tool_calls": True, "service_tier": "auto"}
HARMLESS |= {"logprobs": False, "logit_bias": {}, "frequency_penalty": 0, "presence_penalty": 0.0}
HARMLESS |= {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none"}
HARMLESS |= {"echo": False, "best_of": 1, "suffix": "", "modalities": ["text"]}
HARMLESS |= {"top_logprobs": 0, "functions": []}


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_harmless_client_fields_are_accepted(http, path):
    options = {"include_usage": True, "include_obfuscation": False}
    for stream in ({}, {"stream": True, "stream_options": options}):
        answer = http.post(path, json={**BODIES[path], **HARMLESS, **stream})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (ChatRequest, {"messages": WRONG}),
        (ChatRequest, {"messages": [{"role": "user", "content": WRONG}]}),
        (ChatRequest, {"messages": HELLO, **{str(number): 0 for number in range(500)}}),
        (CompletionRequest, {"prompt": WRONG}),
        (TextsRequest, {"input": WRONG}),
        (GuardrailRequest, {"input_type": "request", "tool_calls": WRONG}),
        (DecisionRequest, {"input": [{"role": "user", "content": WRONG}], "questions": QUESTIONS}),
        (DecisionRequest, {"input": "x", "questions": WRONG}),
        (DecisionRequest, {"input": "x", "questions": [{"type": "choice", "choices": WRONG}]}),
    ],
)
def test_validation_stops_at_first_invalid_item(model, body):
    with pytest.raises(ValidationError) as raised:
        model.model_validate({"model": MODEL, **body})
    assert raised.value.error_count() == 1


def test_very_long_field_name_does_not_slow_validation():
    """That would hold up every client for seconds."""
    start = time.process_time()
    with suppress(ValidationError):
        TextsRequest.model_validate({"q" * 40_000_000: 0, "input": "hello"})
    assert time.process_time() - start < 1


@pytest.mark.parametrize("path", [CHAT, MODERATIONS])
def test_unknown_model_returns_404_and_unknown_probe_returns_400(http, path):
    body = BODIES[path]
    error_of(http.post(path, json={**body, "model": "x" * 4096}), 404)
    error_of(http.post(path, json={**body, "model": "x" * 4097}), 400)
    error = error_of(http.post(path, json={**body, "model": "tiny/lama"}), 404)
    assert error["code"] == "model_not_found"
    assert f"Did you mean '{MODEL}'?" in error["message"]
    error = error_of(http.post(path, json={**body, "probes": ["toxic"]}), 400)
    assert (error["code"], error["param"]) == ("probe_not_found", "probes")
    assert "Known: intent, topics, toxicity." in error["message"]


PLAIN = {"content": b"{}", "headers": {"Content-Type": "text/plain"}}
TOO_LONG = [{"role": "user", "content": "x" * 300}]


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "word"),
    [
        # Not led to the right one, at a host that the client names.
        ("GET", "/v1/moderations/", {}, 404, "/v1/moderations/"),
        ("GET", "/v1/responses/r1", {}, 404, "/v1/chat/completions"),
        ("GET", CHAT, {}, 405, CHAT),
        ("POST", CHAT, PLAIN, 400, "Content-Type: application/json"),
        ("POST", CHAT, {"json": {**VALID, "messages": TOO_LONG}}, 400, "tokens"),
        ("POST", TEXT, {"json": {"model": MODEL, "prompt": ""}}, 400, "empty"),
        ("POST", MODERATIONS, {"json": {"input": ["x", "y" * 300]}}, 400, "tokens"),
    ],
)
def test_unservable_requests_are_rejected_instead_of_truncated(
    http, method, path, options, status, word
):
    assert word in error_of(http.request(method, path, **options), status)["message"]


def test_oversized_body_without_content_length_returns_413(http):
    headers, chunks = {"Content-Type": "application/json"}, (b" " * 1000 for _ in range(100))
    error_of(http.post(CHAT, content=chunks, headers=headers), 413)


@pytest.mark.slow
def test_busy_engine_returns_429_with_retry_after(tiny):
    engine = TransformersEngine(tiny, [], limits=Limits(running=1, waiting=1))
    long = {**VALID, "max_tokens": 50}
    with served(engine) as address, http_client(address) as http, ThreadPoolExecutor(6) as pool:
        responses = list(pool.map(lambda _: http.post(CHAT, json=long), range(6)))
    refused = [response for response in responses if response.status_code != 200]
    assert refused
    for response in refused:
        assert error_of(response, 429)["code"] == "engine_busy"
        assert int(response.headers["retry-after"]) >= 1


def test_server_crash_returns_500_and_logs_id_without_message(capfd, monkeypatch, tiny):
    engine = TransformersEngine(tiny, [])
    crash = Mock(side_effect=ZeroDivisionError(HELLO[0]["content"]))
    monkeypatch.setattr(engine, "generate", crash)
    with served(engine) as address, http_client(address) as http:
        response = http.post(CHAT, json=VALID)
        text = http.get("/metrics").text
    error, logged = error_of(response, 500), capfd.readouterr().err
    assert 'route="/v1/chat/completions",status="500"' in text
    request_id = response.headers["x-request-id"]
    assert request_id in error["message"]
    assert f"Request {request_id} failed." in logged
    assert "ZeroDivisionError" in logged
    assert "hello" not in error["message"] + logged


@pytest.mark.slow
def test_asyncio_logs_omit_exception_messages():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LogFormatter(as_json=False))

    def fail(text):
        raise RuntimeError(text)

    async def fail_later(text):
        raise RuntimeError(text)

    async def go():
        asyncio.get_running_loop().call_soon(fail, "zebra")
        await asyncio.wait([asyncio.create_task(fail_later("zebra"))])

    logging.getLogger().addHandler(handler)
    # Or the collection would look through all that other tests have made.
    gc.freeze()
    asyncio.run(go())
    gc.collect()
    gc.unfreeze()
    logging.getLogger().removeHandler(handler)
    log = stream.getvalue()
    assert "Task exception was never retrieved" in log
    assert "Exception in callback" in log
    assert log.count("RuntimeError at") == 2
    assert "zebra" not in log


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (SidelightError("x"), 400, None),
        (ContextLengthError("x"), 400, "context_length_exceeded"),
        (EngineBusyError(waiting=2, limit=2), 429, "engine_busy"),
        (EngineUnavailableError("x"), 503, "unavailable"),
        (GenerationError("x"), 500, "generation_failed"),
        (VerdictError("x"), 500, "verdict_failed"),
    ],
)
def test_each_kind_of_error_has_its_status_and_code(error, status, code):
    request_error = as_request_error(error)
    assert request_error.status == status
    assert request_error.body["error"]["code"] == code
