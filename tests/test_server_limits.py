"""What one request may hold, when it ends, and how the server stops."""

import asyncio
import json
import logging
import logging.config
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from unittest.mock import Mock, patch

import httpx
import pytest
from fastapi.testclient import TestClient

from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.server.app import create_app, serve
from sidelight.server.config import ServerConfig
from sidelight.server.metrics import Metrics
from sidelight.server.middleware import RequestScope
from sidelight.server.observe import RequestObserver, log_settings
from sidelight.server.schemas import MAX_ITEMS
from worlds.models import three_probes, tiny_backbone
from worlds.servers import (
    MODEL,
    free_port,
    in_process,
    raw_connection,
    read_all,
    served,
    wait_until_ready,
)

CHAT, TEXT, MODERATIONS = "/v1/chat/completions", "/v1/completions", "/v1/moderations"
HELLO = {"role": "user", "content": "hello"}
BLOCK = {"type": "text", "text": "hello"}
CALL = {"function": {"arguments": ""}}
DECISION = {"model": MODEL, "questions": [{"name": "toxicity", "type": "predicate"}]}
GUARDRAIL, CALLS = "/beta/litellm_basic_guardrail_api", {"input_type": "request"}
# One question with so many levels.
CHOICES = {
    n: {"type": "score", "name": "x", "levels": [{}] * (n - 1)} for n in (MAX_ITEMS, MAX_ITEMS + 1)
}
TOO_LARGE = "request_too_large"
# Greedy: a drawn end of the text must not end what a test waits for.
VALID = {"model": MODEL, "messages": [HELLO], "max_tokens": 2, "temperature": 0}
# One text that fills the context is within the last one, two are not.
BYTES, TEXTS, TOKENS = 2**20, 3, 300
# Of the chat in `VALID`, as the tiny model's template renders it.
PROMPT = 9
# How long what has to happen may take at most.
PATIENCE_S = 60.0


def engine():
    backbone = tiny_backbone()
    return TransformersEngine(backbone, three_probes(backbone)), backbone


class Gate:
    """Holds each forward pass until it is opened."""

    def __init__(self, backbone):
        self.has_begun, self._is_open = threading.Event(), threading.Event()
        self.open = self._is_open.set
        backbone.model.register_forward_pre_hook(self._wait)

    def _wait(self, *_):
        self.has_begun.set()
        assert self._is_open.wait(PATIENCE_S)


@pytest.fixture(scope="module")
def http():
    config = ServerConfig(max_body_bytes=BYTES, max_batch_items=TEXTS, max_request_tokens=TOKENS)
    with TestClient(create_app(engine()[0], config), "http://localhost") as client:
        yield client


def post(http, path, body, *headers):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = [("Content-Type", "application/json"), *headers]
    return http.post(path, content=content, headers=named)


def error_of(answer):
    return answer.status_code, answer.json()["error"]["code"]


def chat(**changed):
    return {**VALID, **changed}


# A route, its body of a size, the largest size, and the code of what is larger. The tokens of a
# text are those of its letters and of the template.
LIMITS = [
    (MODERATIONS, lambda n: {"input": ["x"] * n}, TEXTS, "too_many_inputs"),
    (CHAT, lambda n: chat(n=n), TEXTS, "too_many_inputs"),
    # However many tokens are asked for, a text has no more than the context holds.
    (TEXT, lambda n: {"model": MODEL, "prompt": ["x"] * n, "max_tokens": 9999}, 1, TOO_LARGE),
    (CHAT, lambda n: chat(n=2, max_tokens=n - PROMPT), TOKENS // 2, TOO_LARGE),
    (MODERATIONS, lambda n: {"input": ["x" * (n - PROMPT + 5)] * 2}, TOKENS // 2, TOO_LARGE),
]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "body", "most", "code"), LIMITS)
def test_request_at_limit_passes_and_one_beyond_is_rejected(http, path, body, most, code):
    assert post(http, path, body(most)).status_code == 200
    assert error_of(post(http, path, body(most + 1))) == (400, code)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, lambda n: chat(messages=[HELLO] * n)),
        # The message counts too.
        (CHAT, lambda n: chat(messages=[HELLO | {"content": [BLOCK] * (n - 1)}])),
        ("/v1/decisions", lambda n: DECISION | {"input": [HELLO] * n}),
        (
            CHAT,
            lambda n: chat(
                messages=[HELLO | {"content": [BLOCK] * (n // 2 - 1)}] * 2 + [HELLO] * (n % 2)
            ),
        ),
        (GUARDRAIL, lambda n: CALLS | {"tool_calls": [CALL] * n}),
        (GUARDRAIL, lambda n: CALLS | {"texts": ["x"] * n}),
        (GUARDRAIL, lambda n: CALLS | {"texts": ["x"], "structured_messages": [HELLO] * n}),
        (
            GUARDRAIL,
            lambda n: (
                CALLS
                | {"texts": ["x"], "structured_messages": [HELLO | {"content": [BLOCK] * (n - 1)}]}
            ),
        ),
        ("/v1/decisions", lambda n: DECISION | {"input": "x", "questions": [CHOICES[n]]}),
        (MODERATIONS, lambda n: {"input": ["x"] * n}),
        ("/v1/redact", lambda n: {"input": ["x"] * n}),
    ],
)
def test_messages_and_content_items_are_limited(http, path, body):
    """Beyond that, their number is refused, whatever else is wrong with them."""
    within = post(http, path, body(MAX_ITEMS))
    assert f"at most {MAX_ITEMS} items" not in within.text
    refused = post(http, path, body(MAX_ITEMS + 1))
    assert refused.status_code == 400
    assert f"at most {MAX_ITEMS} items" in refused.json()["error"]["message"]


def test_body_size_and_worst_case_tokens_are_limited(http):
    body = json.dumps({"input": "x"}).encode()
    assert post(http, MODERATIONS, body.ljust(BYTES)).status_code == 200
    assert error_of(post(http, MODERATIONS, body.ljust(BYTES + 1))) == (413, "request_too_large")
    long = post(http, MODERATIONS, {"input": "word " * 200_000})
    assert error_of(long) == (400, "context_length_exceeded")
    assert error_of(post(http, CHAT, chat(n=2, max_tokens=None))) == (400, "request_too_large")


def test_total_tokens_per_request_are_limited_by_default(tiny):
    """Otherwise one request of 500 long texts would run for minutes."""
    engine = TransformersEngine(tiny, three_probes(tiny))
    with in_process(engine) as http, patch.object(engine, "classify", Mock(side_effect=OSError)):
        # Each has 184 tokens: 356 of them are within the limit.
        beyond = post(http, MODERATIONS, {"input": ["x" * 180] * 512})
        assert error_of(beyond) == (400, "request_too_large")
        message = beyond.json()["error"]["message"]
        assert "text 357 of 512 brings the request to 65688" in message
        assert "65536 (--max-request-tokens). Send fewer or shorter texts per request." in message
        # As many as may fit get as far as the engine.
        assert post(http, MODERATIONS, {"input": ["x" * 180] * 356}).status_code == 500
        assert engine.classify.call_count == 1


@pytest.mark.parametrize("first", ["Content-Length: 5", "Transfer-Encoding: chunked"])
def test_ambiguous_body_length_is_rejected_and_connection_closed(tiny, first):
    """RFC 9112, section 6.1: a proxy may have read another body than the server."""
    both = ["Content-Length: 5", "Transfer-Encoding: chunked"]
    lines = [f"POST {MODERATIONS} HTTP/1.1", "Host: localhost", first, *set(both) - {first}]
    body = b'd\r\n{"input":"x"}\r\n0\r\n\r\n'
    app = served(TransformersEngine(tiny, three_probes(tiny)))
    with app as address, raw_connection(address) as opened:
        opened.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        answer = read_all(opened)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"ambiguous_length" in answer
    assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    "body",
    [
        b'{"probes": ["toxicity"], "prob\\u0065s": []}',
        b'{"metadata": {"a": [{"b": 1, "b": 2}]}}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": "\\ud800"}',
        b'{"a": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_ambiguous_json_is_rejected(http, body):
    refused = post(http, CHAT, body)
    assert refused.status_code == 400
    assert "not valid JSON" in refused.json()["error"]["message"]


async def answer(app, sent):
    """Adds the messages that answer a bare request; its client stays and says nothing."""

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
    await app(scope, asyncio.Event().wait, send)


def ending(kind=None, *, deadline=0.001):
    """An application whose request ends by its deadline, perhaps midway."""

    async def hang(scope, receive, send):
        if kind is not None:
            headers = [(b"content-type", kind)]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        await asyncio.Event().wait()

    return RequestScope(
        hang, observer=RequestObserver(Metrics(engine()[0], tuple)), deadline=deadline
    )


def test_request_interrupted_by_shutdown_gets_shutting_down_error():
    async def cancelled(kind, sent):
        task = asyncio.create_task(answer(ending(kind, deadline=60), sent))
        await asyncio.sleep(0)
        task.cancel()
        # The cancellation still reaches the caller.
        with pytest.raises(asyncio.CancelledError):
            await task

    plain, streamed = [], []
    asyncio.run(cancelled(None, plain))
    assert plain[0]["status"] == 503
    assert json.loads(plain[1]["body"])["error"]["code"] == "shutting_down"
    asyncio.run(cancelled(b"text/event-stream", streamed))
    event = json.loads(streamed[-1]["body"].removeprefix(b"data: "))
    assert event["error"]["code"] == "shutting_down"
    assert not streamed[-1].get("more_body")
    # Nothing can be added to another kind of answer.
    asyncio.run(cancelled(b"application/json", cut := []))
    assert cut[-1]["body"] == b"begun"


def test_cancellation_inside_application_returns_500():
    async def app(scope, receive, send):
        raise asyncio.CancelledError

    sent = []
    scope = RequestScope(app, observer=RequestObserver(Metrics(engine()[0], tuple)), deadline=60)
    asyncio.run(answer(scope, sent))
    assert sent[0]["status"] == 500


def test_uvicorn_logs_no_traceback_for_cancelled_requests(capsys):
    logging.config.dictConfig(log_settings("info", as_json=False))
    for error in (asyncio.CancelledError(), ValueError()):
        logging.getLogger("uvicorn.error").error("Exception in ASGI application", exc_info=error)
    assert "ValueError" in (logged := capsys.readouterr().err)
    assert "Cancelled" not in logged


def test_request_past_deadline_ends_with_deadline_error():
    plain, streamed = [], []
    asyncio.run(answer(ending(), plain))
    code = json.loads(plain[1]["body"])["error"]["code"]
    assert (plain[0]["status"], code) == (504, "deadline_exceeded")
    asyncio.run(answer(ending(b"text/event-stream; charset=utf-8"), streamed))
    last = streamed[-1]
    assert last["body"].endswith(b"\n\n")
    event = json.loads(last["body"].removeprefix(b"data: "))
    assert event["error"]["code"] == "deadline_exceeded"
    assert not last.get("more_body")
    # Nothing can be added to another kind of answer.
    with pytest.raises(TimeoutError):
        asyncio.run(answer(ending(b"application/json"), []))


@pytest.mark.slow
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_running_requests_finish_and_rejects_new_ones(first):
    one, backbone = engine()
    gate, port, seen = Gate(backbone), free_port(), {}

    def ask():
        http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S)
        with http, ThreadPoolExecutor(1) as pool:
            wait_until_ready(http)
            running = pool.submit(http.post, CHAT, json={**VALID, "max_tokens": 40})
            assert gate.has_begun.wait(PATIENCE_S)
            os.kill(os.getpid(), first)
            # The kernel may have accepted a connection that the server then closes unanswered.
            with suppress(httpx.NetworkError, httpx.RemoteProtocolError):
                while True:
                    httpx.get(f"http://127.0.0.1:{port}/health")
            gate.open()
            seen["answer"] = running.result()

    # uvicorn passes the signal on once running requests are over; the test must outlive it.
    previous = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask)
            is_interrupt = first is signal.SIGINT
            with pytest.raises(KeyboardInterrupt) if is_interrupt else nullcontext():
                serve(lambda: one, ServerConfig(port=port))
            asked.result()
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert seen["answer"].json()["usage"]["completion_tokens"] == 40


@pytest.mark.slow
def test_request_during_model_loading_waits_until_server_is_ready():
    port, (loaded, _) = free_port(), engine()

    def ask():
        answer = httpx.get(f"http://127.0.0.1:{port}/ready", timeout=PATIENCE_S)
        os.kill(os.getpid(), signal.SIGINT)
        return answer

    with ThreadPoolExecutor(1) as pool:
        asked = []

        def load():
            asked.append(pool.submit(ask))
            with pytest.raises(TimeoutError):
                asked[0].result(timeout=0.2)
            return loaded

        with pytest.raises(KeyboardInterrupt):
            serve(load, ServerConfig(port=port))
        assert asked[0].result().json() == {"status": "ready"}
