"""The guardrail of examples/litellm_mcp.yaml, on tools of a real MCP server behind LiteLLM's proxy.

``SIDELIGHT_LITELLM`` names the proxy's program; its interpreter runs the MCP server.
"""

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml
from test_litellm_guardrails import KEY, PROXY, START_S, URL, proxy

from test_examples import EXAMPLES
from worlds.applications import ATTACK, POISONED_RESULT, TOOL_RESULT
from worlds.servers import free_port

pytestmark = [
    pytest.mark.skipif(
        not Path(PROXY or "nowhere").exists(),
        reason="LiteLLM's proxy is not installed: SIDELIGHT_LITELLM names no program",
    ),
    pytest.mark.timeout(2 * START_S),
]
Read = Callable[[str], httpx.Response]


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Returns once something listens on the port."""
    end = time.monotonic() + START_S
    while True:
        assert process.poll() is None
        assert time.monotonic() < end
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.2)


@contextmanager
def gateway(sidelight: str, folder: Path) -> Iterator[tuple[list[str], Read]]:
    """The tools that the proxy lists, and what reads a file of the folder by the tool."""
    port = free_port()
    command = [Path(PROXY).parent / "python", Path(__file__).parent / "mcp_files.py"]
    files = subprocess.Popen([*command, str(port), folder], stderr=subprocess.DEVNULL)
    config = yaml.safe_load(
        (EXAMPLES / "litellm_mcp.yaml")
        .read_text()
        .replace(URL, sidelight)
        .replace("http://127.0.0.1:9000", f"http://127.0.0.1:{port}")
    )
    shutil.copy(EXAMPLES / "litellm_mcp.py", folder)
    headers = {"Authorization": f"Bearer {KEY}"}
    try:
        with (
            proxy(config, "", folder) as (url, _),
            httpx.Client(base_url=url, headers=headers, timeout=START_S) as http,
        ):
            wait_for(port, files)
            (server,) = http.get("/v1/mcp/server").json()
            listed = [tool["name"] for tool in http.get("/mcp-rest/tools/list").json()["tools"]]
            body = {"server_id": server["server_id"], "name": "read_file"}
            yield (
                listed,
                lambda name: http.post(
                    "/mcp-rest/tools/call", json={**body, "arguments": {"name": name}}
                ),
            )
    finally:
        files.terminate()
        files.wait(30)


def calls(folder: Path) -> list[str]:
    """The arguments that have reached the tool."""
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_only_harmless_tool_calls_and_results_pass(guard, tmp_path):
    (tmp_path / "harmless").write_text(TOOL_RESULT)
    (tmp_path / "poisoned").write_text(POISONED_RESULT)
    with gateway(guard, tmp_path) as (listed, read):
        passed, poisoned = read("harmless"), read("poisoned")
        call = read(ATTACK)
    assert listed == ["read_file"]
    assert passed.json()["content"][0]["text"] == TOOL_RESULT, passed.text
    for refused in (poisoned, call):
        assert "Flagged by injection" in refused.text
        assert "attacker@example.com" not in refused.text
    # An order in a call does not reach the tool.
    assert calls(tmp_path) == ["harmless", "poisoned"]


def test_tools_are_neither_listed_nor_called_while_server_is_down(down, tmp_path):
    (tmp_path / "harmless").write_text(TOOL_RESULT)
    with gateway(down, tmp_path) as (listed, read):
        refused = read("harmless")
    # Descriptions of tools are checked too.
    assert not listed
    assert not refused.is_success
    assert TOOL_RESULT not in refused.text
    assert not calls(tmp_path)
