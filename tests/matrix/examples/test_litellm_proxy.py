"""The shipped configuration in LiteLLM's real proxy: ordinary applications pass, attacks do not.

``SIDELIGHT_LITELLM`` names the proxy's program, ``SIDELIGHT_GUARD`` another probe than the guard.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from sidelight.errors import SidelightError
from sidelight.guards import probe_folders
from test_examples import EXAMPLES
from worlds.applications import APPLICATIONS, ATTACK, POISONED_RESULT, TOOL_RESULT
from worlds.servers import free_port, listening

KEY = "sk-proxy"
PROXY = os.environ.get("SIDELIGHT_LITELLM", "")
START_S = 600
pytestmark = [
    pytest.mark.skipif(
        not Path(PROXY or "nowhere").exists(),
        reason="LiteLLM's proxy is not installed: SIDELIGHT_LITELLM names no program",
    ),
    pytest.mark.timeout(2 * START_S),
]


@contextmanager
def started(*command: str, ready: str, **environment: str) -> Iterator[None]:
    """A process, once it answers 200 at an address."""
    process = subprocess.Popen([*command], env={**os.environ, **environment})
    try:
        end = time.monotonic() + START_S
        while True:
            assert process.poll() is None
            assert time.monotonic() < end
            try:
                if httpx.get(ready).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait(30)


Ask = Callable[..., httpx.Response]


@pytest.fixture(scope="module")
def hosted() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server in place of a hosted model, and the bodies that reach it."""
    asked: list[dict[str, Any]] = []
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def answer(request: Request) -> dict[str, Any]:
        asked.append(await request.json())
        message = {"role": "assistant", "content": "Of course."}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        fixed = {"id": "1", "object": "chat.completion", "created": 1, "model": "any"}
        return {**fixed, "choices": [choice], "usage": usage}

    with listening(app) as address:
        yield address, asked


@pytest.fixture(scope="module")
def ask(hosted, tmp_path_factory) -> Iterator[Ask]:
    """Sends a chat through the proxy, whose guardrail is a server with the packaged guard."""
    guard = os.environ.get("SIDELIGHT_GUARD", "guard:injection")
    try:
        probe_folders([guard])
    except SidelightError as error:
        pytest.skip(str(error))
    ports = [free_port(), free_port()]
    sidelight, proxy = (f"http://127.0.0.1:{port}" for port in ports)
    serve = [sys.executable, "-P", "-m", "sidelight", "serve", "--probe", guard]
    serve += ["--policy", str(EXAMPLES / "hosted/policy.toml"), "--port", str(ports[0])]
    litellm = [PROXY, "--config", str(EXAMPLES / "litellm_proxy.yaml")]
    litellm += ["--host", "127.0.0.1", "--port", str(ports[1])]
    environment = {
        "LITELLM_MASTER_KEY": KEY,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "OPENAI_API_KEY": "x",
        "SIDELIGHT_URL": sidelight,
        "MODEL_URL": f"{hosted[0]}/v1",
        # Its own packages, not those of these tests.
        "PYTHONPATH": "",
    }
    with ExitStack() as stack:
        stack.enter_context(started(*serve, ready=f"{sidelight}/ready"))
        stack.enter_context(started(*litellm, ready=f"{proxy}/health/liveliness", **environment))
        headers = {"Authorization": f"Bearer {KEY}"}
        http = stack.enter_context(httpx.Client(base_url=proxy, headers=headers, timeout=START_S))
        yield lambda *messages: http.post(
            "/v1/chat/completions", json={"model": "any", "messages": messages}
        )


def message_of(role: str, content: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def called_tool(result: str) -> list[dict[str, Any]]:
    """The messages of an agent whose tool has answered."""
    app = APPLICATIONS["travel agent"]
    function = {"name": "search_flights", "arguments": '{"origin": "VIE", "destination": "LIS"}'}
    call = {"id": "call_1", "type": "function", "function": function}
    return [
        message_of("system", app.system),
        message_of("user", app.user),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        message_of("tool", result, tool_call_id="call_1"),
    ]


@pytest.mark.parametrize("name", APPLICATIONS)
def test_harmless_application_requests_reach_the_model(ask, hosted, name):
    app = APPLICATIONS[name]
    messages = [message_of("system", app.system), message_of("user", app.user)]
    answer = ask(*messages)
    assert answer.status_code == 200, answer.text
    assert hosted[1][-1]["messages"] == messages
    # A later turn, with what the model has said.
    later = [
        *messages,
        message_of("assistant", "Of course."),
        message_of("user", "Thank you. What next?"),
    ]
    assert ask(*later).status_code == 200


@pytest.mark.parametrize("name", APPLICATIONS)
def test_attacks_on_applications_do_not_reach_the_model(ask, hosted, name):
    before = len(hosted[1])
    answer = ask(message_of("system", APPLICATIONS[name].system), message_of("user", ATTACK))
    assert answer.status_code == 400, answer.text
    assert "Flagged by injection" in answer.text
    assert len(hosted[1]) == before


def test_only_harmless_tool_results_reach_the_model(ask, hosted):
    before = len(hosted[1])
    poisoned = ask(*called_tool(POISONED_RESULT))
    assert poisoned.status_code == 400, poisoned.text
    assert "Flagged by injection" in poisoned.text
    assert len(hosted[1]) == before
    assert ask(*called_tool(TOOL_RESULT)).status_code == 200
    assert len(hosted[1]) == before + 1
