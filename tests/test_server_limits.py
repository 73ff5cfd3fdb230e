"""One client cannot hold what all of them need: time, tokens, places, connections."""

import json
import os
import resource
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from itertools import islice
from pathlib import Path

import httpx
import pytest
import uvicorn

from live import MODEL, http_client, served, wait_until_ready
from sidelight.engines.transformers import TransformersEngine
from sidelight.errors import SidelightError
from sidelight.server.app import serve
from sidelight.server.config import ServerConfig
from sidelight.server.middleware import Drain, DrainingServer, within_system
from sockets import answers, connection, read_all, request
from tiny import three_probes, tiny_backbone

CHAT = "/v1/chat/completions"
GUARDRAIL = "/beta/litellm_basic_guardrail_api"
HELLO = [{"role": "user", "content": "hello"}]
PARTS = [{"type": "text", "text": "hello"}]
REFUSAL = (400, "context_length_exceeded")
QUESTIONS = [{"name": "toxicity", "type": "predicate"}]
# Greedy: a drawn end of the text must not end what a test waits for.
VALID = {"model": MODEL, "messages": HELLO, "max_tokens": 2, "temperature": 0}
# Short enough to wait for; no test needs anything to happen within it.
SOON_S = 0.5
# Long enough for a busy machine to do what a test needs within it.
LATER_S = 3.0
# How long what has to happen may take at most.
PATIENCE_S = 60.0


def engine():
    backbone = tiny_backbone()
    return TransformersEngine(backbone, three_probes(backbone)), backbone


def slow(backbone, seconds=0.05):
    """Makes each forward pass take a while."""
    backbone.model.register_forward_pre_hook(lambda *_: time.sleep(seconds))


def is_idle(http):
    """Whether the engine holds no request any more; asked until it is, for a while."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        series = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines())
        if series["sidelight_requests_running"] == series["sidelight_requests_waiting"] == "0.0":
            return True
        time.sleep(0.01)
    return False


@pytest.fixture(scope="module")
def bounded():
    limits = {"max_messages": 5, "max_batch_items": 3, "max_request_tokens": 60}
    with served(engine()[0], **limits) as address:
        yield address


@pytest.fixture(scope="module")
def impatient():
    with served(engine()[0], header_s=SOON_S, body_s=SOON_S, connections=20) as address:
        yield address


def test_more_texts_than_allowed_are_refused(bounded):
    with http_client(bounded) as http:
        assert http.post("/v1/moderations", json={"input": ["x"] * 3}).status_code == 200
        refused = http.post("/v1/moderations", json={"input": ["x"] * 4})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "too_many_inputs")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {**VALID, "messages": HELLO * 6}),
        (CHAT, {**VALID, "messages": [{"role": "user", "content": PARTS * 5}]}),
        ("/tokenize", {"messages": HELLO * 6}),
        ("/v1/decisions", {"model": MODEL, "input": HELLO * 6, "questions": QUESTIONS}),
        (GUARDRAIL, {"input_type": "request", "tool_calls": [{"function": {"arguments": ""}}] * 6}),
    ],
)
def test_more_messages_than_allowed_are_refused(bounded, path, body):
    with http_client(bounded) as http:
        refused = http.post(path, json=body)
        assert http.post(CHAT, json={**VALID, "messages": HELLO * 5}).status_code == 200
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "too_many_messages")


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# Four megabytes each.
OVERSIZED = {
    CHAT: {**VALID, "messages": [{"role": "user", "content": "word " * 800_000}]},
    "/v1/moderations": {"input": ["word " * 1_600] * 500},
}


@pytest.mark.slow
@pytest.mark.parametrize("path", OVERSIZED)
def test_a_burst_of_oversized_bodies_holds_up_nobody_and_leaves_no_memory(path):
    sent = request(path, json.dumps(OVERSIZED[path]).encode(), "Connection: close")

    def send():
        with connection(address, timeout=PATIENCE_S) as opened:
            opened.sendall(sent)
            (answer,) = answers(read_all(opened))
        return answer.status, json.loads(answer.body)["error"]["code"]

    with (
        served(engine()[0]) as address,
        http_client(address) as http,
        ThreadPoolExecutor(8) as pool,
    ):
        # What the first ones leave behind is loaded once, such as the tokenizer's vocabulary.
        assert {pool.submit(send).result() for _ in range(3)} == {REFUSAL}
        before, slowest = resident_bytes(), []
        # Another process may hold up one burst, and not all.
        while min(slowest, default=1.0) >= 0.5 and len(slowest) < 4:
            burst = [pool.submit(send) for _ in range(24)]
            waited = [0.0]
            while not all(answer.done() for answer in burst):
                start = time.perf_counter()
                assert http.get("/health").status_code == 200
                waited.append(time.perf_counter() - start)
            assert {answer.result() for answer in burst} == {REFUSAL}
            slowest.append(max(waited))
        assert min(slowest) < 0.5
        end = time.monotonic() + PATIENCE_S
        while resident_bytes() > 1.1 * before:
            assert time.monotonic() < end
            time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {**VALID, "max_tokens": 100}),
        (CHAT, {"model": MODEL, "messages": HELLO}),
        (CHAT, {**VALID, "messages": [{"role": "user", "content": "x" * 70}]}),
        ("/v1/moderations", {"input": ["x" * 30, "y" * 30]}),
    ],
)
def test_more_tokens_than_allowed_are_refused(bounded, path, body):
    with http_client(bounded) as http:
        refused = http.post(path, json=body)
        assert http.post(CHAT, json=VALID).status_code == 200
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "request_too_large")


def test_a_prompt_of_several_texts_is_counted_once_and_weighs_for_each(monkeypatch):
    one, _ = engine()
    tokenize, counted = one.tokenize, []

    async def noted(text):
        counted.append(text)
        return await tokenize(text)

    monkeypatch.setattr(one, "tokenize", noted)
    with (
        served(one, max_request_tokens=60) as address,
        http_client(address) as http,
    ):
        assert http.post(CHAT, json={**VALID, "n": 2}).status_code == 200
        refused = http.post(CHAT, json={**VALID, "n": 16})
    assert refused.json()["error"]["code"] == "request_too_large"
    assert len(counted) == 2


@pytest.mark.slow
@pytest.mark.parametrize("head", [b"", b"POST /v1/chat", b"GET /health HTTP/1.1\r\nX: "])
def test_a_client_that_sends_no_whole_head_is_cut_off(impatient, head):
    with connection(impatient) as opened:
        opened.sendall(head)
        assert read_all(opened) == b""


def test_a_head_that_trickles_is_cut_off(impatient):
    with connection(impatient, timeout=SOON_S / 20) as opened, suppress(ConnectionError):
        for letter in b"GET /health HTTP/1.1\r\n" + b"X" * 1000:
            opened.sendall(bytes([letter]))
            with suppress(TimeoutError):
                assert opened.recv(1) == b""
                return
        pytest.fail("the server read on")


def test_a_body_that_does_not_arrive_is_a_408(impatient):
    with connection(impatient) as opened:
        opened.sendall(request(CHAT, b'{"model":', "Connection: close", length=1000))
        head, _, body = read_all(opened).partition(b"\r\n\r\n")
    assert b" 408 " in head
    assert json.loads(body)["error"]["code"] == "body_timeout"


def test_what_is_not_http_is_a_400_of_the_usual_shape(impatient):
    with connection(impatient) as opened:
        opened.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        head, _, body = read_all(opened).partition(b"\r\n\r\n")
    assert b" 400 " in head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.mark.slow
def test_too_many_connections_are_closed_and_the_others_are_served(impatient):
    opened = []
    try:
        for _ in range(40):
            opened.append(socket.create_connection(("127.0.0.1", int(impatient.rsplit(":", 1)[1]))))
    finally:
        for one in opened:
            one.close()
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        try:
            with http_client(impatient) as http:
                assert http.get("/health").status_code == 200
                return
        except httpx.TransportError:
            time.sleep(0.05)
    pytest.fail("the server did not recover")


@pytest.mark.slow
def test_a_client_that_reads_nothing_frees_its_place():
    # More than the buffers of both ends hold.
    unread = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 1000
    codes = []
    with (
        served(engine()[0], write_s=LATER_S, max_concurrent=1) as address,
        http_client(address) as http,
        connection(address) as opened,
        ThreadPoolExecutor(1) as pool,
    ):
        sent = pool.submit(opened.sendall, unread)
        end = time.monotonic() + PATIENCE_S
        while codes[-1:] != [200] or 429 not in codes:
            assert time.monotonic() < end
            codes.append(http.get("/version").status_code)
        opened.close()
        assert isinstance(sent.exception(), OSError | None)


@pytest.mark.slow
def test_a_deadline_is_a_504_and_frees_the_place():
    one, backbone = engine()
    slow(backbone)
    with served(one, deadline=SOON_S) as address, http_client(address) as http:
        late = http.post(CHAT, json={**VALID, "max_tokens": 200})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert is_idle(http)


@pytest.mark.slow
def test_a_stream_past_its_deadline_ends_with_an_error_and_no_done():
    one, backbone = engine()
    slow(backbone)
    with served(one, deadline=LATER_S) as address, http_client(address) as http:
        body = {**VALID, "max_tokens": 200, "stream": True}
        events = [line for line in http.post(CHAT, json=body).text.splitlines() if line]
        assert is_idle(http)
    assert len(events) > 2
    last = json.loads(events[-1].removeprefix("data: "))
    assert last["error"]["code"] == "deadline_exceeded"
    assert "data: [DONE]" not in events


@pytest.mark.slow
def test_more_requests_at_once_than_allowed_are_a_429_and_operators_are_served():
    one, backbone = engine()
    may_write = threading.Event()
    backbone.model.register_forward_pre_hook(lambda *_: (may_write.wait(PATIENCE_S), None)[1])
    with (
        served(one, max_concurrent=2) as address,
        http_client(address) as http,
        ThreadPoolExecutor(6) as pool,
    ):
        asked = [pool.submit(http.post, CHAT, json=VALID, timeout=PATIENCE_S) for _ in range(6)]
        # Nothing is written until all that are refused have been.
        refused = [answer.result() for answer in islice(as_completed(asked), 4)]
        for path in ("/health", "/ready", "/metrics"):
            assert http.get(path).status_code == 200
        may_write.set()
        codes = sorted(answer.result().status_code for answer in asked)
        assert http.post(CHAT, json=VALID).status_code == 200
    assert codes == [200, 200, 429, 429, 429, 429]
    assert refused[0].json()["error"]["code"] == "too_many_requests"
    assert int(refused[0].headers["retry-after"]) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(stream):
    one, backbone = engine()
    slow(backbone)
    body = json.dumps({**VALID, "max_tokens": 200, "stream": stream}).encode()
    with served(one, max_concurrent=1) as address, http_client(address) as http:
        with connection(address) as opened:
            opened.sendall(request(CHAT, body))
            while one.load.running == 0:
                time.sleep(0.01)
        assert is_idle(http)
        assert http.post(CHAT, json=VALID).status_code == 200


def serve_until_stopped(one, client, **options):
    """Serves while ``client(http, pool)`` runs beside, which has to send SIGTERM; the address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"

    def ask():
        with (
            httpx.Client(base_url=address, timeout=PATIENCE_S) as http,
            ThreadPoolExecutor(2) as pool,
        ):
            wait_until_ready(http)
            client(http, pool)

    thread = threading.Thread(target=ask, daemon=True)
    # uvicorn passes the signal on once it has drained; the test must outlive it.
    previous = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        thread.start()
        serve(lambda: one, ServerConfig(port=port, **options))
        thread.join()
    finally:
        signal.signal(signal.SIGTERM, previous)
    return address


@pytest.mark.slow
def test_sigterm_turns_ready_503_and_running_requests_finish():
    one, backbone = engine()
    slow(backbone)
    seen = {}

    def client(http, pool):
        running = pool.submit(http.post, CHAT, json={**VALID, "max_tokens": 40})
        while one.load.running == 0:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        while seen.get("ready") != 503:
            seen["ready"] = http.get("/ready").status_code
        seen["health"] = http.get("/health").status_code
        # The second signal skips what is left of the notice.
        os.kill(os.getpid(), signal.SIGTERM)
        seen["answer"] = running.result()

    address = serve_until_stopped(one, client, notice_s=PATIENCE_S)
    assert (seen["ready"], seen["health"]) == (503, 200)
    assert seen["answer"].json()["usage"]["completion_tokens"] == 40
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health")


@pytest.mark.slow
def test_requests_that_outlast_the_drain_get_an_error():
    one, backbone = engine()
    slow(backbone)
    long = {**VALID, "max_tokens": 200}
    seen = {}

    def client(http, pool):
        plain = pool.submit(http.post, CHAT, json=long)
        streamed = pool.submit(http.post, CHAT, json={**long, "stream": True})
        while one.load.running < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        seen.update(plain=plain.result(), streamed=streamed.result())

    serve_until_stopped(one, client, notice_s=0.0, drain_s=SOON_S)
    assert seen["plain"].status_code == 503
    assert seen["plain"].json()["error"]["code"] == "shutting_down"
    *chunks, last, end = seen["streamed"].text.split("\n\n")
    assert (len(chunks) > 1, end) == (True, "")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"


def test_the_notice_of_sigterm_ends_by_itself():
    drain = Drain()
    server = DrainingServer(uvicorn.Config(lambda: None), drain=drain, drain_s=0.0, notice_s=SOON_S)
    server.handle_exit(signal.SIGTERM, None)
    assert drain.is_draining
    end = time.monotonic() + PATIENCE_S
    while not server.should_exit:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_no_more_connections_are_accepted_than_the_process_may_open_files(monkeypatch, caplog):
    allowed = {"files": (300, 1000)}
    monkeypatch.setattr(resource, "getrlimit", lambda _which: allowed["files"])
    monkeypatch.setattr(resource, "setrlimit", lambda _which, files: allowed.update(files=files))
    few = ServerConfig(connections=200)
    assert within_system(few) == few
    assert 200 < allowed["files"][0] < 1000
    many = within_system(ServerConfig(connections=4096))
    assert allowed["files"] == (1000, 1000)
    assert 0 < many.connections < 1000
    assert f"at most {many.connections} connections, not 4096" in caplog.text
    allowed["files"] = (20, 20)
    with pytest.raises(SidelightError, match="ulimit -n"):
        within_system(few)
