"""A secret key and prompt, sent everywhere, are found in no log, metric or audit line."""

import io
import json
import logging
from unittest.mock import Mock

import httpx
import pytest

from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.models.conversation import Reads
from sidelight.policy.rules import Policy, Rule
from sidelight.server.observe import LogFormatter
from worlds.models import spans_probe, three_probes, tiny_backbone, untrained_probe
from worlds.servers import MODEL, post_paths, raw_connection, raw_request, read_all, served

KEY = "sk-canary-key-7f3a"
WORD = "canary-prompt-91bc"
MESSAGES = [{"role": "user", "content": WORD}]
CHAT = {"model": MODEL, "messages": MESSAGES, "max_tokens": 3}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": MODEL, "prompt": WORD, "max_tokens": 3},
    "/v1/moderations": {"input": WORD},
    "/v1/decisions": {
        "model": MODEL,
        "input": WORD,
        "questions": [{"type": "predicate", "name": WORD}, {"type": "predicate", "name": "topics"}],
    },
    "/v1/redact": {"input": WORD},
    "/classify": {"model": "topics", "input": WORD},
    "/api/v1/text/contents": {"contents": [WORD]},
    "/api/v1/text/chat": {"messages": MESSAGES},
    "/api/v1/text/generation": {"prompt": WORD, "generated_text": WORD},
    "/v1/classify": {"model": "topics", "messages": MESSAGES},
    "/beta/litellm_basic_guardrail_api": {
        "input_type": "request",
        "texts": [WORD],
        "structured_messages": MESSAGES,
    },
}
LISTS = ["messages", "prompt", "input", "questions", "texts", "tool_calls", "structured_messages"]
CHANGES = [{}, {"stream": True, "n": 2}, {"model": WORD}, {"probes": [WORD]}, {"messages": WORD}]
CHANGES += [{"input": WORD * 50, "prompt": WORD * 50}, {"filler": WORD * 1000}, {WORD: WORD}]
# Every list of a body, with many wrong items, and with one wrong item of much text.
CHANGES += [{name: wrong} for name in LISTS for wrong in ([[WORD]] * 50, [{WORD: WORD * 50}])]
HEADERS = [{"Authorization": f"Bearer {KEY}{WORD}"}, {"Authorization": f"Basic {KEY}"}]
HEADERS += [{"X-Request-Id": WORD, "User-Agent": WORD, "Traceparent": WORD}]
HEADERS += [{"Detector-Id": WORD}]


@pytest.fixture
def logged(monkeypatch):
    """All that is logged at any level, by the handlers' own formatter."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LogFormatter(as_json=True))
    for client in ("httpx", "httpcore"):
        # What the client in this process asks for is not the server's log.
        monkeypatch.setattr(logging.getLogger(client), "disabled", True)
        monkeypatch.setattr(logging.getLogger(client), "level", logging.CRITICAL)
    loggers = [logging.getLogger(name) for name in (None, "uvicorn", "sidelight")]
    levels = [logger.level for logger in loggers]
    yield stream, handler, loggers
    loggers[0].removeHandler(handler)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def send_all(http, address):
    """Every endpoint, and every way to be refused; the statuses that came back."""
    answers = []
    for path, body in BODIES.items():
        answers += [http.post(path, json={**body, **changed}) for changed in CHANGES]
        answers += [http.post(path, json=body, headers=headers) for headers in HEADERS]
        for kind in ("application/json", "text/plain"):
            answers.append(http.post(path, content=WORD, headers={"Content-Type": kind}))
        answers.append(http.get(path, params={"q": WORD}))
        answers.append(http.post(f"{path}/{WORD}", json=body))
        answers.append(http.request(WORD, path, json=body))
    for path in ("/v1/models", f"/v1/models/{WORD}", "/version", "/ready", f"/admin/{WORD}"):
        answers.append(http.get(path, params={"key": KEY}))
    answers.append(http.put("/admin/probes", json={"probe": [WORD], "policy": WORD}))
    head = f"Authorization: Bearer {KEY}"
    for raw in (
        f"{WORD} {KEY}\r\n\r\n".encode(),
        raw_request("/v1/moderations", WORD.encode(), head, length=10_000),
        raw_request("/v1/moderations", b"\xff" + WORD.encode(), head, "Connection: close"),
        f"GET /{WORD} HTTP/1.1\r\nHost: {WORD}\r\n{head}\r\nUpgrade: {WORD}\r\n\r\n".encode(),
    ):
        with raw_connection(address) as opened:
            opened.sendall(raw)
            opened.shutdown(1)
            read_all(opened)
    return {answer.status_code for answer in answers}


@pytest.mark.slow
def test_secrets_and_prompts_never_reach_logs_metrics_or_audit(logged, capfd, tmp_path):
    stream, handler, loggers = logged
    backbone = tiny_backbone()
    probes = [
        *three_probes(backbone),
        untrained_probe(backbone, "refusal", reads=Reads("response")),
        untrained_probe(backbone, "always", threshold=0.0),
        spans_probe(backbone, "words", threshold=0.5),
    ]
    path = tmp_path / "audit.jsonl"
    options = {
        "api_key": KEY,
        "metrics_key": "scraper",
        "max_body_bytes": 5000,
        "audit_log": path,
        "audit_salt": "salt",
        "policy": Policy(input={"topics": Rule("block"), "always": Rule("flag")}),
    }
    with served(TransformersEngine(backbone, probes), **options) as address:
        # The server has set up its own handlers when it started.
        loggers[0].addHandler(handler)
        for logger in loggers:
            logger.setLevel(1)
        with httpx.Client(base_url=address, timeout=20) as http:
            http.headers["Authorization"] = f"Bearer {KEY}"
            assert post_paths(http) == BODIES.keys()
            statuses = send_all(http, address)
            # Every forward pass fails with the prompt in its message.
            failing = Mock(side_effect=RuntimeError(f"while reading {WORD} for {KEY}"))
            hook = backbone.model.register_forward_pre_hook(failing)
            statuses |= {
                http.post(p, json={**b, "stream": s}).status_code
                for p, b in BODIES.items()
                for s in (False, True)
            }
            hook.remove()
            series = http.get("/metrics", headers={"Authorization": "Bearer scraper"}).text
    # All kinds of answers have been provoked, and all places hold something.
    assert {200, 400, 401, 403, 404, 405, 413, 500} <= statuses
    log, audit = stream.getvalue(), path.read_text()
    assert "/v1/moderations" in log
    assert "RuntimeError" in log
    assert '"always"' in audit
    assert [json.loads(line) for line in audit.splitlines()]
    captured = capfd.readouterr()
    for place in (log, audit, series, captured.out, captured.err):
        assert KEY not in place
        assert WORD not in place.lower()
