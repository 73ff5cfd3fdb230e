"""Whatever body comes, the server answers as its document says, and serves the next client."""

import copy
import json
import re
import socket
import time
from contextlib import suppress
from functools import cache, reduce
from operator import getitem

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.models.conversation import Reads
from sidelight.policy.rules import Policy, Rule
from sidelight.server.errors import DETECTORS
from worlds.models import spans_probe, three_probes, untrained_probe
from worlds.servers import MODEL, http_client, raw_connection, raw_request, read_all, served

# The server's thread shares this process's random numbers, which hypothesis watches.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Do not use the `random` module"),
]

WRITING = {"model": MODEL, "max_tokens": 2, "temperature": 0.5, "top_p": 0.5, "n": 2, "seed": 1}
WRITING |= {"stop": ["x"], "stream": False, "stream_options": {"include_usage": True}, "tools": []}
WRITING |= {"probes": ["toxicity", "refusal"], "moderation": {"model": "probes"}}
BLOCKS = [{"type": "text", "text": "hello"}]
VALID = {
    "/v1/chat/completions": {**WRITING, "messages": [{"role": "user", "content": BLOCKS}]},
    "/v1/completions": {**WRITING, "prompt": ["hello", "you"]},
    "/v1/moderations": {"input": ["hello", "you"], "probes": ["toxicity"]},
    "/v1/decisions": {
        "model": MODEL,
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}],
        "questions": [{"name": "toxicity", "type": "predicate", "instructions": "?"}],
        "explain": True,
    },
    "/v1/redact": {"input": ["hello", "you"], "probes": ["words"]},
    "/classify": {"model": "toxicity", "input": ["hello", "you"], "use_activation": True},
    "/api/v1/text/contents": {"contents": ["hello", "you"], "detector_params": {"threshold": 0.5}},
    "/api/v1/text/chat": {
        "messages": [{"role": "user", "content": BLOCKS}],
        "tools": [],
        "detector_params": {},
    },
    "/api/v1/text/generation": {"prompt": "hello", "generated_text": "you", "detector_params": {}},
    "/v1/classify": {"model": "toxicity", "messages": [{"role": "user", "content": BLOCKS}]},
    "/beta/litellm_basic_guardrail_api": {
        "input_type": "request",
        "texts": ["hello"],
        "tool_calls": [{"function": {"name": "search", "arguments": "hello"}}],
        "structured_messages": [
            {"role": "system", "content": "hello"},
            {"role": "user", "content": BLOCKS},
        ],
        "additional_provider_specific_params": {"probes": ["toxicity"]},
    },
}
PATHS = st.sampled_from(sorted(VALID))
BODY_BYTES = 20_000
KEY = {"Authorization": "Bearer key"}
SOME = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
FEW = settings(SOME, max_examples=6)


@pytest.fixture(scope="module")
def running(tiny):
    response_probe = untrained_probe(tiny, "refusal", reads=Reads("response"))
    engine = TransformersEngine(
        tiny, [*three_probes(tiny), response_probe, spans_probe(tiny, "words")]
    )
    options = {"max_body_bytes": BODY_BYTES, "api_key": "key"}
    with served(engine, **options) as address, http_client(address) as http:
        http.headers.update(KEY)
        yield address, engine, http


@pytest.fixture
def address(running):
    """The server, which has to be as good as new afterwards."""
    url, engine, http = running
    yield url
    end = time.monotonic() + 20
    while engine.load.running or engine.load.waiting:
        assert time.monotonic() < end
        time.sleep(0.01)
    for path, body in VALID.items():
        answer = http.post(path, json=body)
        assert answer.status_code == 200, answer.text


DEEP = json.loads("[" * 300 + "]" * 300)
TEXTS = st.sampled_from(["", "\ud800", "\udc00\ud800", "\x00", "é" * 50, "x" * 3000, "\u202e"])
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 10**400, 1e308, -0.0, float("nan"), float("inf"), -float("inf")]),
    TEXTS,
    st.sampled_from([[], {}, [[]], [{}], {"": {}}, [None], [""], DEEP, [DEEP] * 2]),
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


@st.composite
def mutated(draw, path):
    """A valid body with one to three of its parts replaced by something odd."""
    body = {"": copy.deepcopy(VALID[path])}
    for _ in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from(places(body)[1:]))
        # A copy: later parts may be replaced within it.
        reduce(getitem, above, body)[last] = copy.deepcopy(draw(ODD))
    # Escapes keep half surrogates and NaN as a careless client would send them.
    return json.dumps(body[""]).encode()


@st.composite
def damaged(draw, path):
    """The bytes of a valid body, damaged where no JSON library would, or others."""
    body = json.dumps(VALID[path]).encode()
    at = draw(st.integers(0, len(body)))
    harm = draw(st.binary(max_size=8) | st.sampled_from([b"\xff\xfe", b"\xed\xa0\x80", b'"', b"{"]))
    ways = [
        harm,
        body[:at],
        body[:at] + harm + body[at:],
        b"\xef\xbb\xbf" + body,
        body.decode().encode("utf-16"),
        body + body,
        body + b" " * BODY_BYTES,
    ]
    return draw(st.sampled_from(ways))


KINDS = ["text/plain", "application/json; charset=utf-16", "application/json; charset=x\xe9"]
KINDS += ["multipart/form-data; boundary=x", "", "/", *["application/json"] * 20]


@settings(SOME, max_examples=50)
@given(data=st.data(), path=PATHS, kind=st.sampled_from(KINDS))
def test_malformed_bodies_cause_no_server_errors_or_lost_slots(address, running, data, path, kind):
    """It takes an answer or a refusal, but no failure and no lost places (429)."""
    body = data.draw(mutated(path) | damaged(path))
    answer = running[2].post(path, content=body, headers={"Content-Type": kind.encode("latin-1")})
    assert answer.status_code < 500, answer.text
    assert answer.status_code != 429
    if answer.status_code >= 400:
        error = answer.json()
        if path.startswith(DETECTORS):
            assert error.keys() == {"code", "message"}
        else:
            (error,) = error.values()
            assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"]


JSON = {"Content-Type": "application/json"}
CPU_S = 3.0
# Bytes of a body, less what is beside its longest part.
ROOM = 4 * 2**20 - 2000


@pytest.fixture(scope="module")
def roomy(tiny):
    """A server with the largest body by default, and a rule that redacts."""
    response_probe = untrained_probe(tiny, "refusal", reads=Reads("response"))
    engine = TransformersEngine(
        tiny, [*three_probes(tiny), response_probe, spans_probe(tiny, "words")]
    )
    policy = Policy(input={"words": Rule("redact")})
    with served(engine, policy=policy) as address, http_client(address) as http:
        yield http


@pytest.mark.parametrize("path", VALID)
def test_body_filling_values_are_handled_quickly_with_short_errors(roomy, path):
    """While one request is read, no other is served."""
    for place in places(VALID[path])[1:]:
        body = {"": copy.deepcopy(VALID[path])}
        *above, last = ("", *place)
        holder = reduce(getitem, above, body)
        fillings = []
        if isinstance(holder[last], str):
            # Unicode's normal form of this letter has 18.
            fillings = ["\ufdfa" * (ROOM // 3)]
        elif isinstance(holder[last], list):
            fillings = [[1] * (ROOM // 2), [{}] * (ROOM // 3)]
        for holder[last] in fillings:
            sent = json.dumps(body[""], ensure_ascii=False, separators=(",", ":")).encode()
            begin = time.process_time()
            answer = roomy.post(path, content=sent, headers=JSON, timeout=60)
            assert time.process_time() - begin < CPU_S, place
            assert answer.status_code < 500, answer.text
            if answer.status_code >= 400:
                error = answer.json() if path.startswith(DETECTORS) else answer.json()["error"]
                assert len(error["message"]) < 5000, place


def test_million_empty_lists_are_parsed_within_a_second(roomy):
    """The garbage collector would visit them again and again."""
    sent = b'{"input":[' + b"[]," * (ROOM // 3) + b"[]]}"
    begin = time.process_time()
    answer = roomy.post("/v1/moderations", content=sent, headers=JSON, timeout=60)
    assert time.process_time() - begin < 1.0
    assert answer.status_code == 400


@SOME
@given(data=st.data(), path=PATHS, half_closes=st.booleans())
def test_client_may_disconnect_at_any_byte(address, data, path, half_closes):
    headers = [f"{name}: {value}" for name, value in KEY.items()]
    sent = raw_request(path, json.dumps(VALID[path]).encode(), *headers)
    at = data.draw(st.integers(0, len(sent)))
    with raw_connection(address) as opened, suppress(ConnectionError):
        opened.sendall(sent[:at])
        if half_closes:
            opened.shutdown(socket.SHUT_WR)
            statuses = re.findall(rb"^HTTP/1.1 (\d+)", read_all(opened), re.MULTILINE)
            assert all(int(status) < 500 for status in statuses)


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
]
GETS = ["/v1/models", "/v1/models/{name}", "/v1/probes", "/health", "/ready", "/version"]
GETS += ["/metrics"]


@pytest.fixture(scope="module")
def schema(running):
    return schemathesis.openapi.from_url(f"{running[0]}/openapi.json", headers=KEY)


@pytest.fixture(scope="module")
def cases(schema):
    """The requests to draw for an operation, which take seconds to derive from the document."""
    return cache(lambda path, method, **options: schema[path][method].as_strategy(**options))


def test_fuzzing_covers_every_documented_operation(schema):
    documented = {
        (method, path)
        for path, methods in schema.raw_schema["paths"].items()
        for method in methods
        if not path.startswith("/admin")
    }
    assert documented == {("post", path) for path in VALID} | {("get", path) for path in GETS}


@pytest.mark.parametrize("path", GETS)
@FEW
@given(data=st.data())
def test_get_routes_conform_to_schema(cases, path, data):
    case = data.draw(cases(path, "GET"))
    case.call_and_validate(checks=CHECKS, headers=KEY)


def fields_of(schema, path):
    content = schema.raw_schema["paths"][path]["post"]["requestBody"]["content"]
    name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
    return schema.raw_schema["components"]["schemas"][name]["properties"]


@pytest.mark.parametrize("path", VALID)
@FEW
@given(data=st.data())
def test_valid_post_requests_conform_to_schema(schema, cases, path, data):
    case = data.draw(cases(path, "POST"))
    # Drawn names are never right: these requests would all end at the first check.
    known = {"model": MODEL, "probes": None, "max_tokens": 3, "max_completion_tokens": None}
    case.body |= {name: value for name, value in known.items() if name in fields_of(schema, path)}
    case.call_and_validate(checks=CHECKS, headers=KEY)


@pytest.mark.parametrize("path", VALID)
@FEW
@given(data=st.data())
def test_invalid_requests_return_documented_client_errors(cases, path, data):
    case = data.draw(cases(path, "POST", generation_mode=GenerationMode.NEGATIVE))
    response = case.call_and_validate(checks=CHECKS[:-1], headers=KEY)
    assert 400 <= response.status_code < 500, case.as_curl_command()
