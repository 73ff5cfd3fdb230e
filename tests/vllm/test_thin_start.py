"""``sidelight serve --engine vllm``: our options in vLLM's own server."""

import json
import re
import signal
import threading
import time

import httpx
import psutil
import pytest

from live import openai_client
from stock_requests import TOOL, chat, parts_of, post
from stock_server import thin_start

KEY, ADMIN, LISTED = "a-users-key", "an-admins-key", "a-listed-key"
LONG = {"max_tokens": 400, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def server(subjects, tmp_path_factory):
    home = tmp_path_factory.mktemp("server")
    (home / "keys").write_text(f"listed {LISTED}\n")
    policy = f'[input.injection]\nmode = "block"\nthreshold = {subjects.threshold}\n'
    (home / "policy.toml").write_text(policy)
    settings = {"policy": str(home / "policy.toml"), "audit_log": str(home / "audit.jsonl")}
    settings |= {"api_keys_file": str(home / "keys")}
    text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
    (home / "server.toml").write_text(text)
    tools = ("enable_auto_tool_choice=true", "tool_call_parser=hermes")
    with thin_start(
        subjects.path,
        subjects.folders,
        home,
        *("--config", str(home / "server.toml"), "--max-concurrent", "4"),
        *(word for option in tools for word in ("--engine-option", option)),
        SIDELIGHT_API_KEY=KEY,
        SIDELIGHT_ADMIN_KEY=ADMIN,
    ) as server:
        yield server


def bearer(key):
    return {"headers": {"Authorization": f"Bearer {key}"}}


def test_every_route_but_those_of_load_balancers_needs_a_key_and_shows_none(server, subjects):
    paths = httpx.get(f"{server.address}/openapi.json", **bearer(KEY)).json()["paths"]
    tried = [(method.upper(), path) for path, methods in paths.items() for method in methods]
    for method, path in [*tried, ("GET", "/ready"), ("POST", "/classify"), ("GET", "/nowhere")]:
        answer = httpx.request(method, f"{server.address}{path}", json={})
        if path not in ("/health", "/ready"):
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.get(f"{server.address}/health").status_code == 200
    assert httpx.get(f"{server.address}/ready").json() == {"status": "ready"}
    for key in (KEY, ADMIN, LISTED):
        assert httpx.get(f"{server.address}/v1/models", **bearer(key)).status_code == 200
    processes = [psutil.Process(server.process.pid)]
    processes += processes[0].children(recursive=True)
    seen = server.log.read_text() + "".join(word for p in processes for word in p.cmdline())
    assert not [key for key in (KEY, ADMIN, LISTED) if key in seen]


def test_policy_audit_and_disclosure_are_those_of_the_options(server, subjects):
    asked = {"model": subjects.path, "max_tokens": 3}
    for key, name in ((KEY, "api-key-1"), (LISTED, "listed")):
        path, body = chat(subjects.injected, **asked)
        refused = post(server.address, path, body, **bearer(key))
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "content_filter")
        audited = json.loads((server.log.parent / "audit.jsonl").read_text().splitlines()[-1])
        assert (audited["key_id"], audited["action"]) == (name, "block")
    for key, sees in ((KEY, False), (ADMIN, True)):
        with openai_client(server.address, key) as client:
            answer = client.chat.completions.create(
                messages=chat(subjects.benign)[1]["messages"], **asked
            )
        verdicts = answer.model_extra["sidelight"]["verdicts"]
        assert [verdict["probe"] for verdict in verdicts] == ["injection", "leak"]
        assert ("probabilities" in verdicts[0]) == sees


def test_what_vllm_offers_is_there(server, subjects):
    with openai_client(server.address, KEY) as client:
        assert [model.id for model in client.models.list()] == [subjects.path]
        # A server without the two options refuses this.
        answer = client.chat.completions.create(
            model=subjects.path, messages=chat(subjects.benign)[1]["messages"], max_tokens=3,
            tools=[TOOL], tool_choice="auto",
        )  # fmt: skip
    assert answer.choices[0].finish_reason


def test_no_more_requests_than_allowed_are_answered_at_a_time(server, subjects):
    body = {"model": subjects.path, "stream": True, **chat(subjects.benign)[1], **LONG}
    with httpx.Client(base_url=server.address, timeout=60, **bearer(KEY)) as client:
        streams = [client.stream("POST", "/v1/chat/completions", json=body) for _ in range(4)]
        for stream in streams:
            stream.__enter__()
        refused = client.post("/v1/chat/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_requests")
        for stream in streams:
            stream.__exit__(None, None, None)
        assert client.get("/metrics", **bearer(ADMIN)).status_code == 200
        assert client.get("/metrics").json()["error"]["code"] == "metrics_key_required"


def test_a_stream_ends_whole_after_sigterm_and_the_server_with_code_0(subjects, tmp_path):
    with thin_start(subjects.path, subjects.folders, tmp_path) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        body = {"model": subjects.path, "stream": True, **chat(subjects.benign)[1], **LONG}
        with httpx.stream("POST", f"{server.address}/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-4] + rest[-3] + rest[-2]
        assert server.process.wait(60) == 0
        for _ in range(300):
            if not any(map(is_alive, children)):
                return
            time.sleep(0.1)
        pytest.fail("some of its processes have not ended")


def is_alive(process):
    try:
        # Who started it has gone, so nobody may take note of its end.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_killed_worker_is_an_error_and_ends_the_server_with_a_code(subjects, tmp_path):
    with thin_start(subjects.path, subjects.folders, tmp_path) as server:
        body = {"model": subjects.path, "max_tokens": 3, **chat(subjects.benign)[1]}
        assert parts_of(post(server.address, "/v1/chat/completions", body))
        found: list[httpx.Response] = []

        def ask():
            path = "/v1/chat/completions"
            found.append(post(server.address, path, {**body, **LONG, "max_tokens": 900}))

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.5)
        (core,) = psutil.Process(server.process.pid).children()[-1:]
        for process in (*core.children(recursive=True), core):
            process.kill()
        asking.join()
        assert found[0].status_code >= 500
        assert "verdicts" not in found[0].text
        assert server.process.wait(60) != 0


@pytest.mark.parametrize(
    "options",
    [("--probe", "nowhere"), ("--engine-option", "tokenizer=another")],
)
def test_what_cannot_be_served_is_one_line(subjects, tmp_path, options):
    command = thin_start(subjects.path, subjects.folders, tmp_path, *options)
    with pytest.raises(AssertionError), command:
        pass
    lines = (tmp_path / "server.log").read_text().splitlines()
    # Before 0.32 vLLM puts the name of its process before each line.
    assert re.fullmatch(r"(\(.*\) )?Error: .*", lines[-1])
    assert "Traceback" not in lines
