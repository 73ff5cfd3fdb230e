"""Verdicts on the spans that OpenTelemetry's instrumentation makes of requests."""

import asyncio
import json
import re

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.models.conversation import Reads
from sidelight.policy.rules import Policy, Rule
from worlds.data import documented_table
from worlds.models import TOPICS, tiny_backbone, untrained_probe
from worlds.servers import MODEL, app_of

CHAT = "/v1/chat/completions"
WORD = "canary-prompt-91bc"
# Greedy: a drawn text may end with its first piece.
MESSAGES = [{"role": "user", "content": WORD}]
BODY = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4, "temperature": 0}
NAMES = {
    row["part of a verdict"]: row["name"].split("`")[1]
    for row in documented_table("operate.md", "part of a verdict", "name")
}
FLAGGING = Policy(input={"toxicity": Rule("flag", threshold=0.0)})
BLOCKING = Policy(input={"toxicity": Rule("block", threshold=0.0)})


class Instrumented:
    """A server whose requests are spans, each of which ends with the last message."""

    def __init__(self, policy, **settings):
        backbone = tiny_backbone()
        probes = [
            untrained_probe(backbone, "toxicity"),
            untrained_probe(backbone, "topics", task=TOPICS),
            untrained_probe(backbone, "late", reads=Reads("response")),
        ]
        self.engine = TransformersEngine(backbone, probes)
        self.app = app_of(self.engine, policy=policy, **settings)
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._tracer = provider.get_tracer("instrumentation")

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        with self._tracer.start_as_current_span("request", end_on_exit=False) as span:

            async def ending(message):
                await send(message)
                if message["type"] == "http.response.body" and not message.get("more_body"):
                    span.end()

            await self.app(scope, receive, ending)
        if span.is_recording():
            span.end()

    def span(self):
        """That of the one request since the last call, which holds no text of it."""
        (span,) = self._exporter.get_finished_spans()
        self._exporter.clear()
        assert WORD not in span.to_json()
        return span

    def attributes(self):
        return self.span().attributes

    def events(self):
        """Those of the span, which have one name, by what they say of verdicts."""
        events = self.span().events
        assert {event.name for event in events} <= {NAMES["event"]}
        keys = {name: key for key, name in NAMES.items()}
        return [{keys[name]: v for name, v in event.attributes.items()} for event in events]


@pytest.mark.slow
def test_request_span_carries_verdicts_and_request_id():
    server = Instrumented(FLAGGING)
    body = {**BODY, "n": 2}
    with TestClient(server, "http://localhost") as http:
        for stream in (False, True):
            answer = http.post(CHAT, json={**body, "stream": stream})
            found = server.attributes()
            assert found["sidelight.request_id"] == answer.headers["x-request-id"]
            assert found["sidelight.probe.toxicity.action"] == ("flag",)
            assert found["sidelight.probe.toxicity.outcome"] == ("flagged",)
            if not stream:
                verdicts = answer.json()["sidelight"]["verdicts"]
            scores = [v["probabilities"]["toxic"] for v in verdicts if v["probe"] == "late"]
            assert found["sidelight.probe.late.score.toxic"] == pytest.approx(scores, abs=1e-5)
            # Both texts follow one prompt, which was judged once.
            topics, _ = [v["probabilities"] for v in verdicts if v["probe"] == "topics"]
            for label, score in topics.items():
                told = found[f"sidelight.probe.topics.score.{label}"]
                assert told == pytest.approx([score], abs=1e-5)
        http.post("/v1/moderations", json={"input": [WORD, "two"]})
        assert len(server.attributes()["sidelight.probe.topics.score.violence"]) == 2
        refused = http.post("/v1/moderations", json={})
        assert server.attributes() == {"sidelight.request_id": refused.headers["x-request-id"]}
    server = Instrumented(BLOCKING)
    with TestClient(server, "http://localhost") as http:
        assert http.post(CHAT, json=BODY).status_code == 400
    assert server.attributes()["sidelight.probe.toxicity.action"] == ("block",)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_span_has_one_event_per_visible_verdict(stream):
    policy = Policy(
        input={"toxicity": Rule("block", threshold=1.0), "topics": Rule("shadow")},
        output={"late": Rule("flag", threshold=0.0)},
    )
    server = Instrumented(policy, trace_events=True)
    with TestClient(server, "http://localhost") as http:
        answer = http.post(CHAT, json={**BODY, "stream": stream})
        assert answer.status_code == 200
        blocking, response_event = server.events()
        assert blocking == {"probe": "toxicity", "label": "fine"}
        assert (response_event["probe"], response_event["label"]) == ("late", "toxic")
        if not stream:
            _, verdict = answer.json()["sidelight"]["verdicts"]
            assert response_event["score"] == verdict["probabilities"]["toxic"]
        http.post("/v1/moderations", json={"input": [WORD, "two"]})
        assert server.events() == [blocking] * 2
    server = Instrumented(BLOCKING, trace_events=True)
    with TestClient(server, "http://localhost") as http:
        http.post(CHAT, json=BODY)
        first, *_ = server.events()
        assert first == {"probe": "toxicity", "label": "toxic"}
    server = Instrumented(policy)
    with TestClient(server, "http://localhost") as http:
        http.post(CHAT, json=BODY)
        assert not server.events()


@pytest.mark.slow
def test_failed_verdict_becomes_event_with_error():
    server = Instrumented(
        Policy(input={"toxicity": Rule("block", max_tokens=1)}), trace_events=True
    )
    with TestClient(server, "http://localhost") as http:
        assert http.post(CHAT, json=BODY).status_code == 400
        first, *_ = server.events()
    assert first == {"probe": "toxicity", "failure": "verdict_failed"}


@pytest.mark.slow
def test_client_disconnect_during_blocked_send_is_traced_as_unfinished():
    """No work on the next piece is in progress then."""
    server = Instrumented(FLAGGING)
    body = json.dumps({**BODY, "stream": True, "max_tokens": 200}).encode()
    incoming = [{"type": "http.request", "body": body, "more_body": False}]
    has_left = asyncio.Event()

    async def receive():
        if incoming:
            return incoming.pop()
        await has_left.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if re.search(rb'"content":"[^"]', message.get("body", b"")):
            has_left.set()
            await asyncio.Event().wait()

    async def main():
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b""}
        async with server.app.router.lifespan_context(server.app), asyncio.timeout(60):
            await server({**scope, "headers": headers}, receive, send)

    asyncio.run(main())
    assert server.attributes()["sidelight.probe.late.outcome"] == ("unfinished",)
