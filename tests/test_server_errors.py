"""Every refusal has OpenAI's shape, says what to do, and tells nothing it should not."""

import asyncio
import gc
import io
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from fastapi import Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from live import MODEL, http_client, openai_client, served
from sidelight.engines.loading import LoadingEngine
from sidelight.engines.queue import Limits
from sidelight.engines.transformers import TransformersEngine
from sidelight.server.checks import ClassifyRequest, GuardrailRequest, TokenizeRequest
from sidelight.server.observe import without_message
from sidelight.server.questions import DecisionRequest, SystemOneRequest
from sidelight.server.requests import unless_left
from sidelight.server.schemas import ChatRequest, CompletionRequest, ModerationRequest
from tiny import three_probes, tiny_backbone

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
VALID = {"model": MODEL, "messages": HELLO, "max_tokens": 2}
KEY = "sk-\u00e9-secret"
LIMIT = 10_000
WRONG = [0] * 500
WRONG_BY_NAME = {str(number): 0 for number in range(500)}
QUESTIONS = [{"type": "predicate", "name": "toxicity"}]
LONG = "x" * 5000


@pytest.fixture(scope="module")
def address():
    backbone = tiny_backbone()
    engine = TransformersEngine(backbone, three_probes(backbone))
    with served(engine, max_body_bytes=LIMIT) as address:
        yield address


def error_of(response, status):
    assert response.status_code == status, response.text
    (body,) = response.json().values()
    assert body.keys() == {"message", "type", "param", "code"}
    assert body["message"]
    return body


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", "hello"),
        ("messages", [{"role": "wizard", "content": "x"}]),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "assistant", "content": None, "tool_calls": []}]),
        ("messages", [{"role": "user", "content": 3}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        ("model", None),
        ("n", 0),
        ("n", 17),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", 10**400),
        ("temperature", "warm"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_completion_tokens", -1),
        ("seed", 2**63),
        ("seed", "x"),
        ("stop", ["x"] * 17),
        ("stop", 3),
        ("stream", "yes"),
        ("probes", "toxicity"),
        ("moderation", {"model": "probes", "policy": {"output": {"mode": "block"}}}),
        ("moderation", {"model": "probes", "policy": {"input": {"mode": "forbid"}}}),
        ("policies", {"toxicity": {"threshold": 2}}),
        ("policies", {"toxicity": {"treshold": 0.1}}),
        ("policies", {"toxicity": {"threshold": 0.9}}),
        ("policies", {"toxic": {"mode": "block"}}),
    ],
)
def test_a_wrong_value_is_a_400_that_names_the_field(http, field, value):
    error = error_of(http.post(CHAT, json={**VALID, field: value}), 400)
    assert error["type"] == "invalid_request_error"
    assert field in error["message"]


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (ChatRequest, {"messages": WRONG}),
        (ChatRequest, {"messages": [{"role": "user", "content": WRONG}]}),
        (ChatRequest, {"messages": HELLO, "stop": WRONG}),
        (ChatRequest, {"messages": HELLO, "probes": WRONG}),
        (ChatRequest, {"messages": HELLO, "policies": WRONG_BY_NAME}),
        (ChatRequest, {"messages": HELLO, "policies": {"toxicity": WRONG_BY_NAME}}),
        (CompletionRequest, {"prompt": WRONG}),
        (ModerationRequest, {"input": WRONG}),
        (ClassifyRequest, {"input": WRONG}),
        (TokenizeRequest, {"messages": WRONG}),
        (GuardrailRequest, {"input_type": "request", "texts": WRONG}),
        (GuardrailRequest, {"input_type": "request", "images": WRONG}),
        (GuardrailRequest, {"input_type": "request", "tool_calls": WRONG}),
        (DecisionRequest, {"input": WRONG, "questions": QUESTIONS}),
        (DecisionRequest, {"input": [{"role": "user", "content": WRONG}], "questions": QUESTIONS}),
        (DecisionRequest, {"input": "x", "questions": WRONG}),
        (DecisionRequest, {"input": "x", "questions": [{"type": "choice", "choices": WRONG}]}),
        (DecisionRequest, {"input": "x", "questions": [{"type": "score", "levels": WRONG}]}),
        (SystemOneRequest, {"state": "x", "questions": WRONG_BY_NAME}),
        (SystemOneRequest, {"state": "x", "questions": {"x": {"type": "noul"}}, "images": WRONG}),
    ],
)
def test_only_the_first_of_many_wrong_items_is_checked(model, body):
    with pytest.raises(ValidationError) as raised:
        model.model_validate({"model": MODEL, **body})
    assert raised.value.error_count() == 1


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"model": LONG}),
        (CHAT, {"probes": [LONG]}),
        (CHAT, {"policies": {LONG: {}}}),
        (CHAT, {"policies": {"toxicity": {LONG: 1}}}),
        ("/v1/moderations", {"input": "x", "model": LONG}),
        ("/classify", {"input": "x", "model": LONG}),
        ("/tokenize", {"prompt": "x", "messages": None, "model": LONG}),
        ("/v1/decisions", {"input": "x", "questions": [{"type": LONG}]}),
        ("/v1/systemone", {"state": "x", "questions": {LONG: {}}}),
    ],
)
def test_an_error_does_not_repeat_a_long_name(http, path, fields):
    response = http.post(path, json={**VALID, **fields})
    error_of(response, 400)
    assert len(response.content) < len(LONG)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"model": "m", "messages": [], "temperature": NaN}',
        b'{"unknown": Infinity}',
        b'{"model": "\\ud800"}',
        b'{"model": "\xff"}',
        b"[" * 5000,
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/moderations"])
def test_what_is_not_a_json_object_is_a_400(http, path, body):
    headers = {"Content-Type": "application/json"}
    error_of(http.post(path, content=body, headers=headers), 400)


def test_a_body_of_another_type_is_a_400_that_names_the_type(http):
    response = http.post(CHAT, content=b"{}", headers={"Content-Type": "text/plain"})
    assert "Content-Type: application/json" in error_of(response, 400)["message"]


def test_unknown_fields_are_ignored(http):
    http.post(CHAT, json={**VALID, "logit_bias": {}, "user": "me"}).raise_for_status()


@pytest.mark.parametrize("path", [CHAT, "/v1/moderations"])
def test_an_unknown_model_is_a_404(http, path):
    request = {**VALID, "input": "x", "model": "tiny/lama"}
    error = error_of(http.post(path, json=request), 404)
    assert error["code"] == "model_not_found"
    assert f"Did you mean '{MODEL}'?" in error["message"]


@pytest.mark.parametrize("path", [CHAT, "/v1/moderations"])
def test_an_unknown_probe_is_a_400_that_lists_the_known_ones(http, path):
    error = error_of(http.post(path, json={**VALID, "input": "x", "probes": ["toxic"]}), 400)
    assert (error["code"], error["param"]) == ("probe_not_found", "probes")
    assert "Known: intent, topics, toxicity." in error["message"]


@pytest.mark.parametrize(("method", "status"), [("GET", 404), ("POST", 404)])
def test_an_unknown_route_is_a_404(http, method, status):
    assert "/v1/nothing" in error_of(http.request(method, "/v1/nothing"), status)["message"]


def test_a_wrong_method_is_a_405(http):
    error_of(http.get(CHAT), 405)


def test_a_text_that_is_too_long_is_refused_not_cut(http):
    long = {**VALID, "messages": [{"role": "user", "content": "x" * 300}]}
    for path, request in ((CHAT, long), ("/v1/moderations", {"input": ["x", "y" * 300]})):
        error = error_of(http.post(path, json=request), 400)
        assert error["code"] == "context_length_exceeded"


def test_a_large_body_is_a_413(http):
    error = error_of(http.post(CHAT, json={**VALID, "user": "x" * LIMIT}), 413)
    assert f"{LIMIT:,} bytes" in error["message"]


def test_a_large_body_without_a_declared_length_is_a_413(http):
    def chunks():
        for _ in range(100):
            yield b" " * 1000

    headers = {"Content-Type": "application/json"}
    error_of(http.post(CHAT, content=chunks(), headers=headers), 413)


@pytest.mark.slow
def test_a_busy_engine_is_a_429_with_a_time_to_retry():
    backbone = tiny_backbone()
    engine = TransformersEngine(backbone, [], limits=Limits(running=1, waiting=1))
    long = {**VALID, "max_tokens": 100}
    with (
        served(engine) as address,
        http_client(address) as http,
        ThreadPoolExecutor(6) as pool,
    ):
        responses = list(pool.map(lambda _: http.post(CHAT, json=long), range(6)))
    refused = [response for response in responses if response.status_code != 200]
    assert refused
    for response in refused:
        assert error_of(response, 429)["code"] == "engine_busy"
        assert int(response.headers["retry-after"]) >= 1


def test_a_loading_engine_is_a_503():
    backbone = tiny_backbone()
    may_load = threading.Event()

    def load():
        may_load.wait(10)
        return TransformersEngine(backbone, three_probes(backbone))

    with served(LoadingEngine(load)) as address, http_client(address) as http:
        assert http.get("/health").status_code == 200
        for path in ("/ready", "/v1/models"):
            error_of(http.get(path), 503)
        response = http.post(CHAT, json=VALID)
        error_of(response, 503)
        assert response.headers["retry-after"]
        assert http.get("/metrics").status_code == 200
        may_load.set()
        while http.get("/ready").status_code != 200:
            pass
        http.post(CHAT, json=VALID).raise_for_status()


def test_a_failed_step_is_a_500_without_traceback_or_text(caplog):
    backbone = tiny_backbone()

    def fail(_module, _args):
        raise RuntimeError(f"while reading {HELLO[0]['content']}")

    backbone.model.register_forward_pre_hook(fail)
    engine = TransformersEngine(backbone, [])
    with served(engine) as address, http_client(address) as http:
        error = error_of(http.post(CHAT, json=VALID), 500)
    assert error["code"] == "generation_failed"
    assert "hello" not in error["message"] + caplog.text
    assert "Traceback" not in error["message"]


def test_a_crash_of_the_server_is_a_500_and_logged_by_its_id_without_its_message(
    capfd, monkeypatch
):
    backbone = tiny_backbone()
    engine = TransformersEngine(backbone, [])

    def crash(*_args, **_options):
        raise ZeroDivisionError(HELLO[0]["content"])

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


@pytest.fixture
def logged():
    """What is logged, by the handlers' own filter."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(without_message)
    logging.getLogger().addHandler(handler)
    yield stream
    logging.getLogger().removeHandler(handler)


@pytest.mark.slow
def test_asyncio_logs_no_text_of_failures_that_nobody_fetched(logged):
    def fail(text):
        raise RuntimeError(text)

    async def fail_later(text):
        raise RuntimeError(text)

    async def go():
        asyncio.get_running_loop().call_soon(fail, "zebra")
        await asyncio.wait([asyncio.create_task(fail_later("zebra"))])

    asyncio.run(go())
    gc.collect()
    log = logged.getvalue()
    assert "Task exception was never retrieved" in log
    assert "Exception in callback" in log
    assert log.count("RuntimeError at") == 2
    assert "zebra" not in log


@pytest.mark.slow
def test_what_fails_once_its_client_has_left_is_not_logged(logged):
    async def fail():
        try:
            await asyncio.Event().wait()
        finally:
            raise RuntimeError

    async def leave():
        return {"type": "http.disconnect"}

    async def go():
        with pytest.raises(ClientDisconnect):
            await unless_left(Request({"type": "http"}, leave), fail())

    asyncio.run(go())
    gc.collect()
    assert not logged.getvalue()


@pytest.fixture(scope="module")
def guarded():
    backbone = tiny_backbone()
    engine = TransformersEngine(backbone, three_probes(backbone))
    with served(engine, api_key=["first", KEY]) as address:
        yield address


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer wrong", "Bearer firs", "Basic first", "first"],
)
@pytest.mark.parametrize(
    "path", ["/v1/models", "/metrics", "/version", "/docs", "/openapi.json", "/nothing"]
)
def test_without_a_key_every_route_is_a_401(guarded, path, header):
    headers = {} if header is None else {"Authorization": header}
    with http_client(guarded) as http:
        response = http.get(path, headers=headers)
    assert error_of(response, 401)["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


def test_what_a_load_balancer_asks_needs_no_key(guarded):
    with http_client(guarded) as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/ready").json() == {"status": "ready"}


def test_the_log_has_no_line_for_each_look_of_a_load_balancer(guarded, caplog):
    with caplog.at_level("INFO", logger="sidelight"), http_client(guarded) as http:
        for path in ("/health", "/ready", "/v1/models"):
            http.get(path, headers={"Authorization": "Bearer first"})
        # A request is logged after its answer.
        while not any("/v1/models" in line for line in caplog.messages):
            time.sleep(0.01)
    assert not any("/health" in line or "/ready" in line for line in caplog.messages)


def test_every_key_opens(guarded):
    with http_client(guarded) as http:
        for key in ("first", KEY):
            header = {"Authorization": f"Bearer {key}".encode()}
            assert http.get("/v1/models", headers=header).status_code == 200


def test_openais_client_raises_its_own_errors(guarded, address):
    with openai_client(guarded, "wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with openai_client(address) as client:
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")
        with pytest.raises(openai.BadRequestError, match="role"):
            client.chat.completions.create(
                model=MODEL, messages=[{"role": "wizard", "content": "x"}]
            )
