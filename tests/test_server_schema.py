"""The API is what its OpenAPI document says, for requests drawn from it and for broken ones."""

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

from live import MODEL, served
from sidelight.engines.transformers import TransformersEngine
from sidelight.prompts import Reads
from tiny import three_probes, untrained_probe

# The server's thread shares this process's random numbers, which hypothesis watches.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Do not use the `random` module"),
]

KEY = "key"
HEADERS = {"Authorization": f"Bearer {KEY}"}
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
]
POSTS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/moderations",
    "/v1/decisions",
    "/classify",
    "/beta/litellm_basic_guardrail_api",
    "/tokenize",
]
GETS = ["/v1/models", "/v1/models/{name}", "/v1/probes", "/health", "/ready", "/metrics"]
GETS += ["/version"]
FEW = settings(
    max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def address(tiny):
    late = untrained_probe(tiny, "refusal", reads=Reads("response"))
    engine = TransformersEngine(tiny, [*three_probes(tiny), late])
    with served(engine, api_key=KEY) as address:
        yield address


@pytest.fixture(scope="module")
def schema(address):
    return schemathesis.openapi.from_url(f"{address}/openapi.json", headers=HEADERS)


def test_every_operation_of_the_document_is_tried(schema):
    documented = {
        (method, path)
        for path, methods in schema.raw_schema["paths"].items()
        for method in methods
        if not path.startswith("/admin")
    }
    assert documented == {("post", path) for path in POSTS} | {("get", path) for path in GETS}


@pytest.mark.parametrize("path", GETS)
@FEW
@given(data=st.data())
def test_what_is_shown_is_as_the_document_says(schema, path, data):
    case = data.draw(schema[path]["GET"].as_strategy())
    case.call_and_validate(checks=CHECKS, headers=HEADERS)


def fields_of(schema, path):
    content = schema.raw_schema["paths"][path]["post"]["requestBody"]["content"]
    name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
    return schema.raw_schema["components"]["schemas"][name]["properties"]


@pytest.mark.parametrize("path", POSTS)
@FEW
@given(data=st.data())
def test_a_request_to_the_served_model_is_answered_as_the_document_says(schema, path, data):
    case = data.draw(schema[path]["POST"].as_strategy())
    # Drawn names are never right: these requests would all end at the first check.
    known = {"model": MODEL, "probes": None, "max_tokens": 3, "max_completion_tokens": None}
    case.body |= {name: value for name, value in known.items() if name in fields_of(schema, path)}
    if path == "/classify":
        case.body["probes"] = ["intent"]
    case.call_and_validate(checks=CHECKS, headers=HEADERS)


@pytest.mark.parametrize("path", POSTS)
@FEW
@given(data=st.data())
def test_a_body_that_the_document_forbids_is_a_refusal_that_it_describes(schema, path, data):
    strategy = schema[path]["POST"].as_strategy(generation_mode=GenerationMode.NEGATIVE)
    case = data.draw(strategy)
    response = case.call_and_validate(checks=CHECKS[:-1], headers=HEADERS)
    assert 400 <= response.status_code < 500, case.as_curl_command()
