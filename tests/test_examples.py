"""Every example runs against a live server and prints what the server says."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from live import http_client, served
from sidelight.engines import TransformersEngine
from sidelight.server.keys import Access, numbered_keys
from tiny import three_probes, tiny_backbone, untrained_probe

EXAMPLES = Path(__file__).parent.parent / "examples"
KEY = "a-key"
QUESTION = {"input": "Where is my refund?"}
pytestmark = [
    # LiteLLM leaves its event loop and connections to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def address():
    backbone = tiny_backbone()
    engine = TransformersEngine(backbone, three_probes(backbone), model="smollm2")
    with served(engine, access=Access(numbered_keys([KEY], prefix="key"))) as address:
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


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
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


@pytest.mark.parametrize("flags", [True, False])
def test_the_proxy_configuration_blocks_what_a_probe_flags(flags, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    backbone = tiny_backbone()
    probe = untrained_probe(backbone, "toxicity", threshold=0.0 if flags else 1.0)
    with served(TransformersEngine(backbone, [probe])) as address:
        monkeypatch.setenv("SIDELIGHT_URL", address)
        blocked = asyncio.run(ask_proxy_guardrail(QUESTION["input"]))
    assert blocked == flags


def test_the_proxy_configuration_blocks_where_no_server_answers(monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.setenv("SIDELIGHT_URL", "http://127.0.0.1:9")
    with pytest.raises(Exception, match="Generic Guardrail API failed: Cannot connect"):
        asyncio.run(ask_proxy_guardrail(QUESTION["input"]))


async def ask_proxy_guardrail(text: str) -> bool:
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
        await guardrail.apply_guardrail({"texts": [text]}, {}, "request")
    except GuardrailRaisedException:
        return True
    return False
