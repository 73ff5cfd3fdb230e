"""Spans as OpenTelemetry's own exporter gets them."""

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, ClassVar

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from starlette.types import Message

from live import MODEL, http_client, served
from sidelight.cli.serve import traces_of
from sidelight.engines.transformers import TransformersEngine
from sidelight.errors import SidelightError
from sidelight.policy.rules import Policy, Rule
from sidelight.prompts import Reads
from sidelight.server.app import create_app
from sidelight.server.observe import Trace
from sidelight.server.otel import OtelSink
from tiny import TOPICS, tiny_backbone, untrained_probe

CHAT = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
LATE = Reads("response")
TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
POLICY = Policy(
    input={"toxicity": Rule("flag", threshold=0.0), "strict": Rule("block", threshold=1.0)}
)


class Traced:
    """A server and the spans of its requests."""

    def __init__(self, address: str, exporter: InMemorySpanExporter):
        self.address = address
        self.exporter = exporter

    def span(self, method: str, path: str, **request: Any) -> tuple[ReadableSpan, Any]:
        """The only span of one request, and the answer."""
        self.exporter.clear()
        with http_client(self.address) as http:
            answer = http.request(method, path, **request)
        # The span is made when the answer has been sent.
        while not (spans := self.exporter.get_finished_spans()):
            time.sleep(0.005)
        (span,) = spans
        return span, answer


@pytest.fixture(scope="module")
def traced() -> Iterator[Traced]:
    backbone = tiny_backbone()
    probes = [
        untrained_probe(backbone, "toxicity"),
        untrained_probe(backbone, "strict"),
        untrained_probe(backbone, "topics", task=TOPICS),
        untrained_probe(backbone, "late", reads=Reads("response")),
    ]
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    engine = TransformersEngine(backbone, probes)
    with served(engine, policy=POLICY, traces=OtelSink(provider)) as address:
        yield Traced(address, exporter)


def told(span: ReadableSpan) -> Mapping[str, Any]:
    assert span.attributes is not None
    return span.attributes


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_span_has_the_verdicts_and_tokens_of_its_answer(traced: Traced, stream: bool):
    body = {**BODY, "n": 2, "temperature": 0}
    plain = traced.span("POST", CHAT, json=body)[1].json()
    span, answer = traced.span("POST", CHAT, json={**body, "stream": stream})
    found = told(span)
    assert (span.name, span.kind) == (f"POST {CHAT}", SpanKind.SERVER)
    assert found["http.route"] == CHAT
    assert found["http.response.status_code"] == 200
    assert found["sidelight.request_id"] == answer.headers["x-request-id"]
    assert found["gen_ai.request.model"] == MODEL
    assert found["gen_ai.usage.input_tokens"] == plain["usage"]["prompt_tokens"]
    assert found["gen_ai.usage.output_tokens"] == plain["usage"]["completion_tokens"]
    assert found["sidelight.probes"] == ("toxicity", "strict", "topics", "late")
    assert found["sidelight.probe.toxicity.action"] == ("flag",)
    assert found["sidelight.probe.strict.outcome"] == ("passed",)
    verdicts = plain["sidelight"]["verdicts"]
    late = [v["probabilities"]["toxic"] for v in verdicts if v["probe"] == "late"]
    (topics,) = [v["probabilities"] for v in verdicts if v["probe"] == "topics"]
    assert found["sidelight.probe.late.score.toxic"] == pytest.approx(late, abs=1e-5)
    for label, score in topics.items():
        assert found[f"sidelight.probe.topics.score.{label}"] == pytest.approx([score], abs=1e-5)


def test_a_span_covers_a_text_that_its_client_leaves(traced: Traced):
    traced.exporter.clear()
    body = {**BODY, "stream": True, "max_tokens": 200, "temperature": 0}
    with (
        http_client(traced.address) as http,
        http.stream("POST", CHAT, json=body) as answer,
    ):
        for line in answer.iter_lines():
            if '"content":"' in line and '"content":""' not in line:
                break
    while not (spans := traced.exporter.get_finished_spans()):
        time.sleep(0.005)
    found = told(spans[0])
    assert 0 < found["gen_ai.usage.output_tokens"] < 200
    assert found["sidelight.probe.late.outcome"] == ("unfinished",)


def test_a_text_that_nobody_takes_is_recorded_before_its_request_is_over():
    """The client leaves while a piece waits to be sent: nobody is at work on the next one then."""
    backbone = tiny_backbone()
    engine = TransformersEngine(backbone, [untrained_probe(backbone, "late", reads=LATE)])
    traces: list[Trace] = []
    app = create_app(engine, traces=traces.append)
    # Greedy: a drawn text may end with its first piece.
    body = json.dumps({**BODY, "stream": True, "max_tokens": 200, "temperature": 0}).encode()

    async def main() -> None:
        has_left = asyncio.Event()
        incoming = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if incoming:
                return incoming.pop()
            await has_left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if re.search(rb'"content":"[^"]', message.get("body", b"")):
                has_left.set()
                await asyncio.Event().wait()

        async with app.router.lifespan_context(app):
            headers = [(b"content-type", b"application/json")]
            scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b""}
            await app({**scope, "headers": headers}, receive, send)

    asyncio.run(main())
    (trace,) = traces
    assert trace.completion_tokens > 0
    assert [decision.outcome for decision in trace.decisions] == ["unfinished"]


def test_a_span_is_a_child_of_the_callers(traced: Traced):
    header = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
    span, _ = traced.span("POST", CHAT, json=BODY, headers=header)
    assert span.parent is not None
    assert (f"{span.parent.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, CALLER)
    assert f"{span.get_span_context().trace_id:032x}" == TRACE
    alone, _ = traced.span("POST", CHAT, json=BODY, headers={"traceparent": "nonsense"})
    assert alone.parent is None


def test_a_call_that_is_not_to_be_sampled_is_not(traced: Traced):
    header = {"traceparent": f"00-{TRACE}-{CALLER}-00"}
    with http_client(traced.address) as http:
        http.post(CHAT, json=BODY, headers=header).raise_for_status()
    span, _ = traced.span("GET", "/version")
    assert span.name == "GET /version"


def test_a_span_says_that_a_prompt_was_blocked():
    backbone = tiny_backbone()
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    policy = Policy(input={"toxicity": Rule("block", threshold=0.0)})
    engine = TransformersEngine(backbone, [untrained_probe(backbone, "toxicity")])
    with served(engine, policy=policy, traces=OtelSink(provider)) as address:
        span, _ = Traced(address, exporter).span("POST", CHAT, json=BODY)
    assert told(span)["sidelight.probe.toxicity.action"] == ("block",)
    assert told(span)["http.response.status_code"] == 400


def test_checks_and_refusals_have_a_span_but_health_checks_have_none(traced: Traced):
    checked, _ = traced.span("POST", "/v1/moderations", json={"input": ["one", "two"]})
    assert len(told(checked)["sidelight.probe.topics.score.violence"]) == 2
    assert told(checked)["gen_ai.usage.input_tokens"] > 0
    refused, _ = traced.span("POST", "/v1/moderations", json={})
    assert told(refused)["http.response.status_code"] == 400
    assert "gen_ai.request.model" not in told(refused)
    with http_client(traced.address) as http:
        traced.exporter.clear()
        for path in ("/health", "/ready", "/metrics"):
            http.get(path)
    unknown, _ = traced.span("BREW", "/pot")
    assert unknown.name == "_OTHER other"


def test_traces_are_off_unless_an_endpoint_is_named():
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    assert traces_of({}) is None
    assert traces_of({**endpoint, "OTEL_SDK_DISABLED": "true"}) is None
    assert traces_of({**endpoint, "OTEL_TRACES_EXPORTER": "none"}) is None
    assert isinstance(traces_of(endpoint), OtelSink)


def test_another_protocol_than_ours_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(SidelightError, match="http/protobuf"):
        traces_of({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"})


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "sidelight.server.otel")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(SidelightError, match=r"sidelight\[otel\]"):
        traces_of({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"})


@pytest.mark.slow
def test_nothing_is_imported_while_traces_are_off():
    """What makes and sends spans; the bare interface is imported by other packages too."""
    code = (
        "import sys, sidelight.server.app, sidelight.cli.serve\n"
        "ours = ('opentelemetry.sdk', 'opentelemetry.exporter', 'sidelight.server.otel')\n"
        "print([name for name in sys.modules if name.startswith(ours)])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


class Collector(BaseHTTPRequestHandler):
    """Keeps what is sent to it in ``received``, by path."""

    received: ClassVar[dict[str, bytes]] = {}

    def do_POST(self) -> None:
        self.received[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.mark.slow
def test_spans_reach_the_collector_at_the_latest_when_the_process_ends():
    code = (
        "import os; from sidelight.cli.serve import traces_of; "
        "from sidelight.server.observe import Trace; "
        "traces_of(os.environ)(Trace(start_ns=1, method='POST', route='/v1/moderations'))"
    )
    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        endpoint = f"http://127.0.0.1:{collector.server_port}"
        environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
        collector.shutdown()
        thread.join()
    (body,) = Collector.received.values()
    assert list(Collector.received) == ["/v1/traces"]
    assert b"POST /v1/moderations" in body
