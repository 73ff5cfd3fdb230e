"""Verdicts on the spans that OpenTelemetry's instrumentation makes of requests."""

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from live import MODEL
from sidelight.engines.transformers import TransformersEngine
from sidelight.policy.rules import Policy, Rule
from sidelight.prompts import Reads
from sidelight.server.app import create_app
from tiny import TOPICS, tiny_backbone, untrained_probe

CHAT = "/v1/chat/completions"
WORD = "canary-prompt-91bc"
MESSAGES = [{"role": "user", "content": WORD}]
# Greedy: a drawn text may end with its first piece.
BODY = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4, "temperature": 0}
POLICY = Policy(
    input={"toxicity": Rule("flag", threshold=0.0), "strict": Rule("block", threshold=1.0)}
)


class Instrumented:
    """An application whose requests are spans, each of which ends with the last message."""

    def __init__(self, app: ASGIApp):
        self.app = app
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._tracer = provider.get_tracer("instrumentation")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        with self._tracer.start_as_current_span("request", end_on_exit=False) as span:

            async def ending(message: Message) -> None:
                await send(message)
                if message["type"] == "http.response.body" and not message.get("more_body"):
                    span.end()

            await self.app(scope, receive, ending)
        if span.is_recording():
            span.end()

    def attributes(self) -> Mapping[str, Any]:
        """Those of the one request since the last call."""
        (span,) = self._exporter.get_finished_spans()
        self._exporter.clear()
        assert span.attributes is not None
        assert WORD not in span.to_json()
        return span.attributes


def instrumented(*probes: str, policy: Policy = POLICY) -> Instrumented:
    backbone = tiny_backbone()
    kinds: dict[str, Any] = {"topics": {"task": TOPICS}, "late": {"reads": Reads("response")}}
    found = [untrained_probe(backbone, name, **kinds.get(name, {})) for name in probes]
    return Instrumented(create_app(TransformersEngine(backbone, found), policy=policy))


@pytest.fixture(scope="module")
def traced() -> Iterator[tuple[TestClient, Instrumented]]:
    app = instrumented("toxicity", "strict", "topics", "late")
    with TestClient(app) as http:
        yield http, app


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_span_has_the_verdicts_of_its_answer(
    traced: tuple[TestClient, Instrumented], stream: bool
):
    http, app = traced
    body = {**BODY, "n": 2}
    verdicts = http.post(CHAT, json=body).json()["sidelight"]["verdicts"]
    app.attributes()
    answer = http.post(CHAT, json={**body, "stream": stream})
    found = app.attributes()
    assert found["sidelight.request_id"] == answer.headers["x-request-id"]
    assert found["sidelight.probe.toxicity.action"] == ("flag",)
    assert found["sidelight.probe.strict.outcome"] == ("passed",)
    late = [v["probabilities"]["toxic"] for v in verdicts if v["probe"] == "late"]
    (topics,) = [v["probabilities"] for v in verdicts if v["probe"] == "topics"]
    assert found["sidelight.probe.late.score.toxic"] == pytest.approx(late, abs=1e-5)
    for label, score in topics.items():
        assert found[f"sidelight.probe.topics.score.{label}"] == pytest.approx([score], abs=1e-5)


def test_checks_and_refusals_are_annotated_too(traced: tuple[TestClient, Instrumented]):
    http, app = traced
    http.post("/v1/moderations", json={"input": [WORD, "two"]})
    assert len(app.attributes()["sidelight.probe.topics.score.violence"]) == 2
    refused = http.post("/v1/moderations", json={})
    assert app.attributes() == {"sidelight.request_id": refused.headers["x-request-id"]}
    blocking = instrumented("toxicity", policy=Policy(input={"toxicity": Rule("block", 0.0)}))
    with TestClient(blocking) as http:
        assert http.post(CHAT, json=BODY).status_code == 400
    assert blocking.attributes()["sidelight.probe.toxicity.action"] == ("block",)


def test_a_text_whose_client_leaves_is_unfinished():
    """It leaves while a piece waits to be sent: nobody is at work on the next one then."""
    app = instrumented("late", policy=Policy())
    body = json.dumps({**BODY, "stream": True, "max_tokens": 200}).encode()

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

        async with app.app.router.lifespan_context(app.app):
            headers = [(b"content-type", b"application/json")]
            scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b""}
            await app({**scope, "headers": headers}, receive, send)

    asyncio.run(main())
    assert app.attributes()["sidelight.probe.late.outcome"] == ("unfinished",)
