"""Bodies and heads that two readers could take differently, or that hold up others."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from live import MODEL, http_client, served
from sidelight.engines.transformers import TransformersEngine
from sockets import answers, connection, read_all, request
from tiny import three_probes, tiny_backbone

CHAT = "/v1/chat/completions"
VALID = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
KEY = "sk-user"
# As in requests.py: larger bodies are parsed elsewhere.
LARGE = 2**16


@pytest.fixture(scope="module")
def address():
    backbone = tiny_backbone()
    with served(TransformersEngine(backbone, three_probes(backbone))) as address:
        yield address


@pytest.fixture(scope="module")
def guarded():
    backbone = tiny_backbone()
    engine = TransformersEngine(backbone, three_probes(backbone))
    with served(engine, api_key=KEY, max_concurrent=2, max_messages=100_000) as address:
        yield address


def sent(address, *parts):
    """The one answer to these bytes."""
    with connection(address, timeout=60) as opened:
        opened.sendall(b"".join(parts))
        (answer,) = answers(read_all(opened))
    return answer


def error_of(answer):
    return answer.status, json.loads(answer.body)["error"]["code"]


@pytest.mark.parametrize(
    "twice",
    [
        '"probes": ["toxicity"], "probes": []',
        '"probes": ["toxicity"], "prob\\u0065s": []',
        '"stream_options": {"include_usage": true, "include_usage": false}',
        '"metadata": {"a": [{"b": 1, "b": 2}]}',
    ],
)
@pytest.mark.parametrize("padding", [0, LARGE])
def test_a_name_twice_in_an_object_is_refused(address, twice, padding):
    body = f'{json.dumps(VALID)[:-1]}, "user": "{"x" * padding}", {twice}}}'
    with http_client(address) as http:
        response = http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert "uplicate key" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body", [b'{"a": NaN}', b'{"a": "\\ud800"}', b'{"a": "\xff"}', b"[" * 100_000]
)
@pytest.mark.parametrize("padding", [b"", b" " * LARGE])
def test_what_other_parsers_let_pass_is_refused(address, body, padding):
    answer = sent(address, request(CHAT, padding + body, "Connection: close"))
    assert answer.status == 400
    assert b"not valid JSON" in answer.body


@pytest.mark.parametrize(
    "headers",
    [
        ["Content-Encoding: gzip"],
        ["content-encoding: GZIP"],
        ["Content-Encoding: identity, gzip"],
        ["Content-Encoding: identity", "CONTENT-ENCODING: br"],
    ],
)
def test_a_compressed_body_is_a_415(address, headers):
    answer = sent(address, request(CHAT, b"{}", *headers, "Connection: close"))
    assert error_of(answer) == (415, "unsupported_encoding")


def test_an_encoding_that_changes_nothing_is_none(address):
    body = json.dumps(VALID).encode()
    head = "Content-Encoding: Identity", "Connection: close"
    assert sent(address, request(CHAT, body, *head)).status == 200


@pytest.mark.parametrize("names", [("Authorization",) * 2, ("authorization", "AUTHORIZATION")])
@pytest.mark.parametrize("keys", [(KEY, KEY), ("wrong", KEY), (KEY, "wrong")])
def test_two_keys_in_one_request_are_refused(guarded, names, keys):
    headers = [f"{name}: Bearer {key}" for name, key in zip(names, keys, strict=True)]
    body = json.dumps(VALID).encode()
    answer = sent(guarded, request(CHAT, body, *headers, "Connection: close"))
    assert error_of(answer) == (400, "duplicate_header")


def test_health_answers_a_head(address):
    with http_client(address) as http:
        response = http.head("/health")
    assert (response.status_code, response.content) == (200, b"")


def test_no_redirect_leads_to_the_host_that_a_client_names(address):
    with http_client(address) as http:
        for method, path in (("GET", "/v1/models/x/"), ("POST", f"{CHAT}/"), ("GET", "/health/")):
            response = http.request(method, path, headers={"Host": "evil.example"}, json={})
            assert response.status_code == 404
            assert "location" not in response.headers


def test_a_route_that_is_not_served_has_a_code_and_responses_a_hint(address):
    with http_client(address) as http:
        for method, path in (("POST", "/v1/responses"), ("GET", "/v1/responses/r1")):
            error = http.request(method, path).json()["error"]
            assert error["code"] == "route_not_found"
            assert CHAT in error["message"]
        assert http.post("/v1/embeddings").json()["error"]["code"] == "route_not_found"


FLOODS = {
    "messages": '{"messages": [' + '{"role": "user", "content": "a"},' * 100_000 + "0]}",
    "objects": '{"messages": [' + "{}," * 1_000_000 + "0]}",
    "lists": '{"input": [' + "[]," * 1_000_000 + "0]}",
    "texts": '{"input": [' + '"a",' * 800_000 + '"a"]}',
    "names": "{" + "".join(f'"{i}": 0,' for i in range(300_000)) + '"a": 0}',
}


@pytest.mark.slow
@pytest.mark.unchecked
@pytest.mark.parametrize("kind", FLOODS)
def test_a_flood_of_values_is_refused_at_the_first_too_many(guarded, kind):
    """Also where more messages are allowed; and others are answered meanwhile."""
    path = "/v1/moderations" if "input" in FLOODS[kind][:9] else CHAT
    head = f"Authorization: Bearer {KEY}", "Connection: close"
    body = request(path, FLOODS[kind].encode(), *head)
    with ThreadPoolExecutor(2) as pool, http_client(guarded) as http:
        # Another process may hold up one burst, and not all.
        for _ in range(4):
            waited = [0.0]
            burst = [pool.submit(sent, guarded, body) for _ in range(8)]
            while not all(answer.done() for answer in burst):
                start = time.perf_counter()
                assert http.get("/health").status_code == 200
                waited.append(time.perf_counter() - start)
            assert {error_of(answer.result()) for answer in burst} == {(400, "too_many_values")}
            if max(waited) < 0.5:
                return
    pytest.fail(f"/health took {max(waited):.2f} s")


def test_bodies_that_trickle_do_not_hold_the_places_of_others():
    backbone = tiny_backbone()
    engine = TransformersEngine(backbone, three_probes(backbone))
    body = json.dumps(VALID).encode()
    with (
        served(engine, max_concurrent=2, body_s=60) as address,
        http_client(address) as http,
        connection(address, timeout=60) as declared,
        connection(address, timeout=60) as chunked,
    ):
        declared.sendall(request(CHAT, body[:5], length=len(body)))
        chunked.sendall(
            request(CHAT, b"", "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
        )
        end, codes = time.monotonic() + 60, []
        while codes.count(200) < 2:
            assert time.monotonic() < end
            chunked.sendall(b"1\r\n \r\n")
            codes.append(http.post(CHAT, json=VALID).status_code)
            time.sleep(0.05)
        (answer,) = answers(read_all(declared))
    # Both were waited for, for a while.
    assert codes[0] == 429
    assert error_of(answer) == (408, "body_timeout")
