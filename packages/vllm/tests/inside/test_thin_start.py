"""``sidelight serve --engine vllm``: our options in vLLM's own server."""

import json
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import httpx
import psutil
import pytest

from policy_contract import chat
from worlds.servers import openai_client
from worlds.stock import TOOL, post, posts, requests_of, thin_start
from worlds.vllm import TOGETHER

pytestmark = pytest.mark.xdist_group("thin")
KEY, ADMIN, LISTED = "a-users-key", "an-admins-key", "a-listed-key"
CHATS = "/v1/chat/completions"
TURNS = [{"role": "user", "content": "a quagga"}]
CHECKS = {
    "/v1/moderations": {"input": "a quagga"},
    "/classify": {"model": "injection", "input": "a quagga"},
    "/v1/classify": {"model": "injection", "messages": TURNS},
    "/api/v1/text/contents": {"contents": ["a quagga"]},
    "/api/v1/text/chat": {"messages": TURNS},
    "/api/v1/text/generation": {"prompt": "a quagga", "generated_text": "a quagga"},
    "/beta/litellm_basic_guardrail_api": {"input_type": "request", "texts": ["a quagga"]},
}


@pytest.fixture(scope="module")
def start(subjects, tmp_path_factory):
    """A function that gives the running server, and starts another if a test has ended it."""
    home = tmp_path_factory.mktemp("server")
    (home / "keys").write_text(f"listed {LISTED}\n")
    policy = f'[input.injection]\nmode = "block"\nthreshold = {subjects.threshold}\n'
    (home / "policy.toml").write_text(policy)
    files = {"policy": "policy.toml", "audit_log": "audit.jsonl", "api_keys_file": "keys"}
    text = "".join(f"{name} = '{home / file}'\n" for name, file in files.items())
    (home / "server.toml").write_text(text)
    more = ("enable_auto_tool_choice=true", "tool_call_parser=hermes", "enable_scale_out=true")
    options = ["--config", str(home / "server.toml")]
    options += [word for option in more for word in ("--engine-option", option)]
    keys = {"SIDELIGHT_API_KEY": KEY, "SIDELIGHT_ADMIN_KEY": ADMIN, **TOGETHER}
    with ExitStack() as stack:
        running = []

        def started():
            if not running or running[-1].process.poll() is not None:
                command = thin_start(subjects.path, subjects.folders, home, *options, **keys)
                running.append(stack.enter_context(command))
            return running[-1]

        yield started


@pytest.fixture
def server(start):
    return start()


@pytest.fixture
def endless(subjects):
    """A long answer."""
    written = {"max_tokens": 400, "ignore_eos": True, "temperature": 0, "stream": True}
    return {"model": subjects.path, **chat(subjects.benign)[1], **written}


def bearer(key):
    return {"headers": {"Authorization": f"Bearer {key}"}}


def get(server, path, key):
    return httpx.get(f"{server.address}{path}", timeout=60, **bearer(key))


def test_routes_except_health_checks_require_a_key_and_leak_none(server, subjects):
    paths = get(server, "/openapi.json", KEY).json()["paths"]
    tried = [(method.upper(), path) for path, methods in paths.items() for method in methods]
    for method, path in [
        *tried,
        ("GET", "/ready"),
        ("POST", "/v1/moderations"),
        ("GET", "/nowhere"),
    ]:
        answer = httpx.request(method, f"{server.address}{path}", json={}, timeout=60)
        if path not in ("/health", "/ready"):
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.get(f"{server.address}/health", timeout=60).status_code == 200
    assert httpx.get(f"{server.address}/ready", timeout=60).json() == {"status": "ready"}
    for key in (KEY, ADMIN, LISTED):
        models = get(server, "/v1/models", key).json()["data"]
        assert [model["id"] for model in models] == [subjects.path]
    assert get(server, "/metrics", ADMIN).status_code == 200
    for path, code in (("/metrics", "metrics_key"), ("/admin/probes", "admin_key")):
        assert get(server, path, KEY).json()["error"]["code"] == f"{code}_required"
    processes = [psutil.Process(server.process.pid)]
    processes += processes[0].children(recursive=True)
    seen = server.log.read_text() + "".join(word for p in processes for word in p.cmdline())
    assert not [key for key in (KEY, ADMIN, LISTED) if key in seen]


def test_every_post_route_is_covered_by_tests(server):
    """A route that a version of vLLM adds has to be looked at, and tried as the others are."""
    tried = {path for path, _ in requests_of(None, "x", streamed=False)}
    writes_nothing = {
        *("/tokenize", "/detokenize", "/ping", "/v1/messages/count_tokens"),
        *("/scale_elastic_ep", "/is_scaling_elastic_ep", "/inference/v1/abort_requests"),
        "/v1/responses/{response_id}/cancel",
        # By the same reads as /v1/systemone, from vLLM 0.33 on.
        "/v1/decisions",
        *(f"/v1/{kind}/{step}" for kind in ("chat/completions", "completions", "responses",
          "messages") for step in ("render", "derender")),
    }  # fmt: skip
    known = posts(server.address, **bearer(KEY))
    assert "/inference/v1/generate" in known
    assert known - tried <= writes_nothing


def test_server_applies_policy_audit_disclosure_and_tool_options(server, subjects):
    asked = {"model": subjects.path, "max_tokens": 3}
    for key, name in ((KEY, "api-key-1"), (LISTED, "listed")):
        path, body = chat(subjects.injected, **asked)
        refused = post(server.address, path, body, **bearer(key))
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "content_filter")
        lines = (server.log.parent / "audit.jsonl").read_text().splitlines()
        last = {line["probe"]: line for line in map(json.loads, lines)}["injection"]
        assert (last["key_id"], last["action"]) == (name, "block")
    for key, is_admin in ((KEY, False), (ADMIN, True)):
        with openai_client(server.address, key) as client:
            # A server without the two options refuses the tools.
            turns = chat(subjects.benign)[1]["messages"]
            answer = client.chat.completions.create(
                messages=turns, tools=[TOOL], tool_choice="auto", **asked
            )
        verdicts = {v["probe"]: v for v in answer.model_extra["sidelight"]["verdicts"]}
        assert ("probabilities" in verdicts["injection"]) == is_admin
        assert answer.choices[0].finish_reason


@pytest.mark.parametrize("path", CHECKS)
def test_classification_routes_audit_and_count_their_verdicts(server, path):
    """As in our own server (test_server_routes.py)."""
    audit = server.log.parent / "audit.jsonl"
    before, lines = counted(server), len(audit.read_text().splitlines())
    url = f"{server.address}{path}"
    answer = httpx.post(url, json=CHECKS[path], timeout=60, **bearer(KEY))
    assert answer.status_code == 200, answer.text
    new = [json.loads(line) for line in audit.read_text().splitlines()[lines:]]
    assert new
    assert {line["request_id"] for line in new} == {answer.headers["x-request-id"]}
    assert {line["key_id"] for line in new} == {"api-key-1"}
    assert "quagga" not in audit.read_text()
    assert counted(server) - before == len(new)


def counted(server):
    """Verdicts of all probes so far."""
    lines = get(server, "/metrics", ADMIN).text.splitlines()
    counts = [line for line in lines if line.startswith("sidelight_verdicts_total")]
    return sum(float(line.split()[-1]) for line in counts)


def test_killed_worker_sends_no_more_text_and_server_exits_nonzero(start, endless):
    server, body, sent = start(), {**endless, "max_tokens": 900}, b""
    url = f"{server.address}{CHATS}"
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(post, server.address, CHATS, {**body, "stream": False}, **bearer(KEY))
        with (
            suppress(httpx.HTTPError),
            httpx.stream("POST", url, json=body, timeout=120, **bearer(KEY)) as response,
        ):
            for chunk in response.iter_bytes():
                if not sent:
                    (core,) = psutil.Process(server.process.pid).children()[-1:]
                    for process in (*core.children(recursive=True), core):
                        process.kill()
                sent += chunk
    assert sent
    assert b'"finish_reason":"length"' not in sent
    assert asking.result().status_code >= 500
    assert "verdicts" not in asking.result().text
    assert server.process.wait(60) != 0


def test_sigterm_lets_streams_finish_and_exits_with_code_0(start, endless):
    server = start()
    children = psutil.Process(server.process.pid).children(recursive=True)
    url = f"{server.address}{CHATS}"
    with httpx.stream("POST", url, json=endless, timeout=120, **bearer(KEY)) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-4] + rest[-3] + rest[-2]
    assert server.process.wait(60) == 0, server.log.read_text()
    await_end(children)


def test_ctrl_c_exits_with_the_documented_code(start):
    server = start()
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 130, server.log.read_text()


@pytest.mark.parametrize(
    ("moment", "number", "code"),
    [
        # In the process of the server, and in that of a worker.
        ("Resolved architecture", signal.SIGINT, 130),
        ("Starting to load model", signal.SIGTERM, 0),
    ],
)
def test_signal_during_model_loading_ends_all_processes(moment, number, code, subjects, tmp_path):
    level = {"VLLM_LOGGING_LEVEL": "INFO"}
    with thin_start(subjects.path, subjects.folders, tmp_path, until=moment, **level) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        server.process.send_signal(number)
        assert server.process.wait(60) == code, server.log.read_text()
    await_end(children)
    assert "Traceback" not in server.log.read_text()


def await_end(processes):
    for _ in range(300):
        if not any(map(is_alive, processes)):
            return
        time.sleep(0.1)
    pytest.fail("some of its processes have not ended")


def is_alive(process):
    try:
        # Who started it has gone, so its end may go unnoticed.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_vllm_configuration_errors_print_one_line(subjects, tmp_path):
    option = ("--engine-option", "tokenizer=another")
    start = thin_start(subjects.path, subjects.folders, tmp_path, *option)
    with pytest.raises(AssertionError), start:
        pass
    lines = (tmp_path / "server.log").read_text().splitlines()
    assert re.fullmatch(r"Error: .*", lines[-1])
    assert "Traceback" not in lines
