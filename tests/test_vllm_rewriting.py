"""What a client reads of the answers of vLLM's own server."""

import asyncio
import json

import pytest

from sidelight.vllm.endpoint import ProbeMiddleware, current_report
from sidelight.vllm.requests import StepReport
from sidelight.vllm.settings import KEY

TURN = {"role": "user", "content": "hello"}


def asked(body, *, said=(), texts=1, events=None):
    """The body that vLLM reads, and the status and body that the client does."""
    read, sent = [], []

    async def vllm(scope, receive, send):
        read.append((await receive())["body"])
        report = current_report()
        report.texts = texts
        for each in said:
            report.take(each)
        kind = b"application/json" if events is None else b"text/event-stream"
        headers = [(b"content-type", kind), (b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for event in events or []:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        end = b"{}" if events is None else b""
        await send({"type": "http.response.body", "body": end})

    async def receive():
        return {"type": "http.request", "body": body}

    async def send(event):
        sent.append(event)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    middleware = ProbeMiddleware(vllm, is_served=lambda: True)
    asyncio.run(middleware(scope, receive, send))
    return read, sent[0]["status"], b"".join(event.get("body", b"") for event in sent)


@pytest.mark.parametrize(
    ("method", "path", "is_marked"),
    [
        ("POST", "/v1/completions", True),
        ("POST", "/v1/chat/completions/batch", True),
        ("GET", "/v1/models", False),
    ],
)
def test_what_is_posted_elsewhere_is_marked_as_without_verdicts(method, path, is_marked):
    sent = []

    async def vllm(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data: text"})

    async def send(event):
        sent.append(event)

    scope = {"type": "http", "method": method, "path": path, "headers": []}
    asyncio.run(ProbeMiddleware(vllm, is_served=lambda: True)(scope, None, send))
    assert (b"x-sidelight-error" in dict(sent[0]["headers"])) == is_marked
    assert sent[1]["body"] == b"data: text"


def says(text, **fields):
    return StepReport(text, 1, {KEY: {"verdicts": {"toxicity": fields}}})


def test_a_request_reaches_vllm_as_the_client_has_sent_it():
    for body in (b"{", b"[1]", json.dumps({"messages": [TURN]}).encode()):
        (read,), _, _ = asked(body)
        assert read == body


def test_each_of_several_texts_has_its_verdict():
    body = json.dumps({"messages": [TURN], "n": 3}).encode()
    reports = [says(0, flagged=False), says(1, flagged=False), says(0, flagged=True)]
    _, _, answer = asked(body, said=reports, texts=3)
    assert json.loads(answer)[KEY]["verdicts"] == [
        {"choice": 0, "probe": "toxicity", "flagged": True},
        {"choice": 1, "probe": "toxicity", "flagged": False},
        {"choice": 2, "error": "The request was not judged."},
    ]


def test_one_text_needs_no_number():
    body = json.dumps({"messages": [TURN]}).encode()
    _, _, answer = asked(body, said=[says(0, flagged=True)])
    assert json.loads(answer)[KEY] == {"verdicts": [{"probe": "toxicity", "flagged": True}]}
    _, _, answer = asked(body)
    assert json.loads(answer)[KEY] == {"error": "The request was not judged."}


def test_a_model_may_write_the_words_that_end_a_stream():
    text = b'data: {"content": "data: [DONE]"}\n\n'
    body = json.dumps({"messages": [TURN], "stream": True}).encode()
    events = [text, text + b"data: [DONE]\n\n"]
    _, _, answer = asked(body, said=[says(0, flagged=True)], events=events)
    first, *rest, end = answer.split(b"\n\n")
    assert json.loads(first.removeprefix(b"data: "))[KEY]["verdicts"][0]["flagged"]
    assert rest == [text.strip(), text.strip(), b"data: [DONE]"]
    assert end == b""
