"""Whatever bytes come, the server refuses them in OpenAI's shape, and serves the next client."""

import json
import socket
import time
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from live import MODEL, http_client, served
from sidelight.engines.transformers import TransformersEngine
from sidelight.prompts import Reads
from sockets import answers, connection, read_all, request
from tiny import three_probes, tiny_backbone, untrained_probe

# The server's thread shares this process's random numbers, which hypothesis watches.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
WRITING = {
    "model": MODEL,
    "max_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.5,
    "n": 2,
    "seed": 1,
    "stop": ["x"],
    "stream": False,
    "stream_options": {"include_usage": True},
    "probes": ["toxicity", "refusal"],
    "policies": {"toxicity": {"threshold": 0.1}},
    "moderation": {"model": "probes", "policy": {"input": {"mode": "score"}}},
}
VALID = {
    "/v1/chat/completions": {**WRITING, "messages": MESSAGES},
    "/v1/completions": {**WRITING, "prompt": ["hello", "you"]},
    "/v1/moderations": {"input": ["hello", "you"], "probes": ["toxicity"]},
    "/v1/decisions": {
        "model": MODEL,
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}],
        "questions": [{"name": "toxicity", "type": "predicate", "instructions": "?"}],
    },
    "/v1/systemone": {"state": {"a": 1}, "questions": {"toxicity": {"type": "noul"}}},
    "/classify": {"input": ["hello"], "model": "intent"},
    "/beta/litellm_basic_guardrail_api": {
        "input_type": "request",
        "texts": ["hello"],
        "additional_provider_specific_params": {"probes": ["toxicity"]},
    },
    "/tokenize": {"prompt": "hello", "return_token_strs": True},
}
PATHS = st.sampled_from(sorted(VALID))
BODY_BYTES = 20_000
# Fewer places than examples: one that is lost by each would soon be missed.
PLACES = 4
LIMITS = {
    "max_body_bytes": BODY_BYTES,
    "max_concurrent": PLACES,
}
SOME = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def running():
    backbone = tiny_backbone()
    late = untrained_probe(backbone, "refusal", reads=Reads("response"))
    engine = TransformersEngine(backbone, [*three_probes(backbone), late])
    with served(engine, **LIMITS) as address:
        yield address, engine


@pytest.fixture
def address(running):
    """The server, which has to be as good as new afterwards."""
    url, engine = running
    yield url
    end = time.monotonic() + 20
    while engine.load.running or engine.load.waiting:
        assert time.monotonic() < end
        time.sleep(0.01)
    with http_client(url) as http:
        for path, body in VALID.items():
            answer = http.post(path, json=body)
            assert answer.status_code == 200, answer.text


def deep(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


TEXTS = st.sampled_from(
    ["", "\ud800", "\udc00\ud800", "\x00", "é" * 50, "x" * 3000, MODEL, "\u202e"]
)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 10**400, 1e308, -0.0, float("nan"), float("inf"), -float("inf")]),
    TEXTS,
    st.sampled_from([[], {}, [[]], [{}], {"": {}}, [None], [""], deep(60), deep(300)]),
    st.lists(TEXTS, max_size=3),
    st.dictionaries(TEXTS, st.integers(), max_size=2),
)


def places(value, path=()):
    """The paths to all parts of a JSON value, but for those far down."""
    found = [path]
    if isinstance(value, dict | list) and len(path) < 6:
        for key in value if isinstance(value, dict) else range(len(value)):
            found += places(value[key], (*path, key))
    return found


def replaced(value, path, new):
    """A copy with one part replaced."""
    if not path:
        return new
    first, *rest = path
    copy = value.copy()
    copy[first] = replaced(value[first], rest, new)
    return copy


@st.composite
def mutated(draw, path):
    """A valid body with one to three of its parts replaced by something odd."""
    value = VALID[path]
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places(value)))
        value = replaced(value, place, draw(ODD))
    return value


@st.composite
def damaged(draw, path):
    """The bytes of a valid body, damaged where no JSON library would."""
    body = json.dumps(VALID[path]).encode()
    at = draw(st.integers(0, len(body)))
    harm = draw(st.binary(max_size=8) | st.sampled_from([b"\xff\xfe", b"\xed\xa0\x80", b'"', b"{"]))
    twice = b'{"model": 1, ' + body[1:-1] + b', "model": null, "input": {}}'
    return draw(
        st.sampled_from(
            [
                body[:at],
                body[:at] + harm + body[at:],
                body[:at] + harm + body[at + len(harm) :],
                b"\xef\xbb\xbf" + body,
                body.decode().encode("utf-16"),
                body + body,
                twice,
                body + b" " * BODY_BYTES,
            ]
        )
    )


def talk(address, sent, *, half_closes=False):
    """What the server answers; it is given no reason to wait for more."""
    with connection(address) as opened:
        # The server may refuse and close before it has taken everything.
        with suppress(ConnectionError):
            opened.sendall(sent)
            if half_closes:
                opened.shutdown(socket.SHUT_WR)
        return answers(read_all(opened))


def require_sound(answer):
    """Nothing failed; a refusal is in OpenAI's shape."""
    assert answer.status < 500, answer
    if answer.status >= 400:
        (error,) = json.loads(answer.body).values()
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"]


def require_one_answer(found):
    (answer,) = found
    require_sound(answer)
    # Lost places would turn up as refusals for being busy.
    assert answer.status != 429


@pytest.mark.slow
@SOME
@given(data=st.data(), path=PATHS)
def test_a_body_with_odd_parts_is_answered_or_refused(address, data, path):
    # Escapes keep half surrogates and NaN as a careless client would send them.
    body = json.dumps(data.draw(mutated(path))).encode()
    require_one_answer(talk(address, request(path, body, "Connection: close")))


@pytest.mark.slow
@SOME
@given(data=st.data(), path=PATHS)
def test_a_damaged_body_is_answered_or_refused(address, data, path):
    body = data.draw(damaged(path))
    require_one_answer(talk(address, request(path, body, "Connection: close")))


@SOME
@given(body=st.binary(max_size=200), path=PATHS)
def test_bytes_that_are_no_body_are_refused(address, body, path):
    (answer,) = talk(address, request(path, body, "Connection: close"))
    require_sound(answer)
    assert 400 <= answer.status < 429


TYPES = [
    "text/plain",
    "application/json; charset=utf-16",
    "application/json; charset=x\xe9",
    "multipart/form-data; boundary=x",
    "application/xml",
    "",
    "/",
    "application/json, text/x",
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_a_body_of_any_type_is_answered_or_refused(address, kind):
    for path, value in VALID.items():
        sent = request(path, json.dumps(value).encode(), "Connection: close")
        require_one_answer(
            talk(address, sent.replace(b"application/json", kind.encode("latin-1"), 1))
        )


CHUNKED = b"POST /v1/moderations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKED += b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
MODERATION = b'{"input": "hello"}'


@pytest.mark.slow
@SOME
@given(
    size=st.sampled_from([b"12", b"0012", b"12;x=y", b"0x12", b"-1", b"", b"ffffffffffffffffffff"]),
    rest=st.binary(max_size=20) | st.just(b"\r\n0\r\n\r\n"),
)
def test_any_chunks_are_read_or_refused(address, size, rest):
    sent = CHUNKED + size + b"\r\n" + MODERATION + rest
    for answer in talk(address, sent, half_closes=True):
        # What is no HTTP is refused by uvicorn, in its own shape.
        assert answer.status < 500


@pytest.mark.slow
@SOME
@given(cuts=st.lists(st.integers(0, 200), max_size=12), copies=st.integers(1, 3))
def test_a_request_in_any_pieces_is_answered_as_often_as_it_is_sent(address, cuts, copies):
    one = request("/v1/moderations", MODERATION)
    sent = one * (copies - 1) + request("/v1/moderations", MODERATION, "Connection: close")
    ends = sorted({min(cut, len(sent)) for cut in cuts} | {len(sent)})
    with connection(address) as opened:
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start, end in zip([0, *ends], ends, strict=False):
            opened.sendall(sent[start:end])
        found = answers(read_all(opened))
    assert [answer.status for answer in found] == [200] * copies


@pytest.mark.slow
@SOME
@given(data=st.data(), path=PATHS, half_closes=st.booleans())
def test_a_client_may_leave_at_any_byte(address, data, path, half_closes):
    sent = request(path, json.dumps(VALID[path]).encode())
    at = data.draw(st.integers(0, len(sent)))
    with connection(address) as opened, suppress(ConnectionError):
        opened.sendall(sent[:at])
        if half_closes:
            opened.shutdown(socket.SHUT_WR)
            assert all(answer.status < 500 for answer in answers(read_all(opened)))
