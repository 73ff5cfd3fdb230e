"""Examples that need LangChain, LiteLLM, scikit-learn's search or Ray, against a live server."""

import asyncio
import copy
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from fastapi import FastAPI, Request

import wordings
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.policy.rules import Policy, Rule, read_policy
from sidelight.probes.artifact import load_probe, save_probe
from sidelight.training.fit import fit
from sidelight.training.settings import FitOptions, TrainingSettings
from test_examples import EXAMPLES, KEY, address, require_verdicts_printed, server
from test_spans import load_spans
from worlds.data import span_rows
from worlds.models import broken, saved, spans_probe, untrained_probe
from worlds.servers import free_port, http_client, listening, openai_client, served

__all__ = ["address", "server"]
# Else the import of LiteLLM asks the internet for prices.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
HEADERS = {"Authorization": f"Bearer {KEY}"}
TEXTS = {"texts": ["Where is my refund?"]}
FUNCTION = {"name": "search", "arguments": '{"query": "refund"}'}
CALLS = {"texts": [], "tool_calls": [{"id": "1", "type": "function", "function": FUNCTION}]}
pytestmark = [
    # LiteLLM leaves its event loop and connections to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.mark.parametrize("name", ["langchain_chat.py", "litellm_chat.py"])
def test_clients_print_verdicts_for_complete_and_streamed_answers(address, name, capsys):
    require_verdicts_printed(name, address, capsys)


@pytest.mark.parametrize("flags", [True, False])
@pytest.mark.parametrize("request", [TEXTS, CALLS], ids=["texts", "tool_calls"])
def test_proxy_config_blocks_only_flagged_requests(tiny, flags, request, monkeypatch):
    probe = untrained_probe(tiny, "toxicity", threshold=0.0 if flags else 1.0)
    with served(TransformersEngine(tiny, [probe])) as address:
        monkeypatch.setenv("SIDELIGHT_URL", address)
        blocked = asyncio.run(ask_proxy_guardrail(request))
    assert blocked == flags


def test_proxy_config_fails_closed_when_server_is_unreachable(monkeypatch):
    monkeypatch.setenv("SIDELIGHT_URL", "http://127.0.0.1:9")
    with pytest.raises(Exception, match=wordings.LITELLM_CANNOT_CONNECT):
        asyncio.run(ask_proxy_guardrail(TEXTS))


def proxy_guardrail(**changes: Any) -> Any:
    """The guardrail that LiteLLM's proxy makes of the configuration."""
    import litellm
    from litellm.proxy.guardrails.guardrail_hooks.generic_guardrail_api import initialize_guardrail
    from litellm.types.guardrails import LitellmParams

    (entry,) = yaml.safe_load((EXAMPLES / "litellm_proxy.yaml").read_text())["guardrails"]
    settings = entry["litellm_params"] | changes
    settings["api_base"] = litellm.get_secret_str(settings["api_base"])
    return initialize_guardrail(LitellmParams(**settings), entry)


async def ask_proxy_guardrail(request: dict[str, Any]) -> bool:
    """Whether it blocks a prompt."""
    from litellm.exceptions import GuardrailRaisedException

    try:
        await proxy_guardrail().apply_guardrail(request, {}, "request")
    except GuardrailRaisedException:
        return True
    return False


@pytest.fixture(scope="module")
def pii(tiny, tmp_path_factory):
    """A probe for which people are words in capitals."""
    tickets = json.loads(json.dumps(span_rows(160)).replace("SHOUT", "PERSON"))
    settings = TrainingSettings(learning_rate=2e-2, epochs=6, batch_size=16)
    options = FitOptions(settings=settings, cache_root=tmp_path_factory.mktemp("cache"))
    return fit(tiny, load_spans(tickets), None, name="pii", options=options).probe


async def ask_through_proxy(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What another model reads of a chat that comes through the proxy's guardrail."""
    import litellm
    from litellm.caching.dual_cache import DualCache
    from litellm.proxy._types import UserAPIKeyAuth
    from litellm.proxy.guardrails.guardrail_hooks.unified_guardrail.unified_guardrail import (
        UnifiedLLMGuardrails,
    )

    asked: list[dict[str, Any]] = []
    upstream = FastAPI()

    @upstream.post("/chat/completions")
    async def answer(request: Request) -> dict[str, Any]:
        asked.append(await request.json())
        message = {"role": "assistant", "content": "Dear [PERSON]"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return {"id": "1", "object": "chat.completion", "created": 1, "choices": [choice]}

    chat = {"messages": copy.deepcopy(messages), "guardrail_to_apply": proxy_guardrail()}
    with listening(upstream) as address:
        try:
            masked: Any = await UnifiedLLMGuardrails().async_pre_call_hook(
                UserAPIKeyAuth(), DualCache(), chat, "acompletion"
            )
            await litellm.acompletion(
                model="openai/any", messages=masked["messages"], api_base=address, api_key="x"
            )
        except Exception:
            assert not asked
            raise
    (body,) = asked
    return body["messages"]


CHAT = [
    {"role": "system", "content": "ab and VWX"},
    {"role": "user", "content": "ce or XYZ, or bd"},
    {"role": "assistant", "content": "ad XYZ, or bc"},
    {"role": "user", "content": [{"type": "text", "text": "bc VWX and 123"}]},
]


def test_proxy_sends_placeholders_upstream_for_redacted_spans(tiny, pii, monkeypatch):
    policy = read_policy(EXAMPLES / "masking_policy.toml")
    with served(TransformersEngine(tiny, [pii]), policy=policy) as address:
        monkeypatch.setenv("SIDELIGHT_URL", address)
        messages = asyncio.run(ask_through_proxy(CHAT))
    assert [message["role"] for message in messages] == [turn["role"] for turn in CHAT]
    *first, last = [message["content"] for message in messages]
    assert first == ["ab and [PERSON]", "ce or [PERSON], or bd", "ad [PERSON], or bc"]
    assert last == [{"type": "text", "text": "bc [PERSON] and [NUMBER]"}]


def test_proxy_sends_nothing_upstream_when_masking_fails(tiny, pii, monkeypatch):
    policy = read_policy(EXAMPLES / "masking_policy.toml")
    with served(TransformersEngine(tiny, [broken(pii)]), policy=policy) as address:
        for url, says in (
            (address, "500 Internal Server Error"),
            ("http://127.0.0.1:9", "connect"),
        ):
            monkeypatch.setenv("SIDELIGHT_URL", url)
            with pytest.raises(Exception, match=says):
                asyncio.run(ask_through_proxy(CHAT))


async def streamed_through_proxy(text: str) -> str:
    """What a client gets of an answer that comes in small pieces, each of which is judged."""
    from litellm.proxy._types import UserAPIKeyAuth
    from litellm.proxy.guardrails.guardrail_hooks.unified_guardrail.unified_guardrail import (
        UnifiedLLMGuardrails,
    )
    from litellm.types.utils import Delta, ModelResponseStream, StreamingChoices

    async def chunks() -> AsyncIterator[ModelResponseStream]:
        for start in range(0, len(text), 3):
            delta = Delta(content=text[start : start + 3], role="assistant")
            yield ModelResponseStream(choices=[StreamingChoices(index=0, delta=delta)])
        end = StreamingChoices(index=0, delta=Delta(), finish_reason="stop")
        yield ModelResponseStream(choices=[end])

    guardrail = proxy_guardrail(
        mode="post_call", streaming_transform_mode="incremental_diff", streaming_sampling_rate=1
    )
    key = UserAPIKeyAuth(request_route="/v1/chat/completions")
    sent = UnifiedLLMGuardrails().async_post_call_streaming_iterator_hook(
        key, chunks(), {"messages": []}, guardrail
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in sent])


@pytest.mark.parametrize("threshold", [0.8, 0.95])
def test_proxy_streams_no_fragments_of_redacted_words(tiny, threshold, monkeypatch):
    text = "Dear Hassan Ali, we wrote to you on Monday and will call. Regards, Olga"
    probe = spans_probe(tiny, "late", side="response", threshold=threshold)
    policy = Policy(output={"late": Rule("redact")})
    with served(TransformersEngine(tiny, [probe]), policy=policy) as address:
        monkeypatch.setenv("SIDELIGHT_URL", address)
        streamed = asyncio.run(streamed_through_proxy(text))
        with http_client(address) as http:
            body = {"input_type": "response", "texts": [text]}
            full = http.post("/beta/litellm_basic_guardrail_api", json=body).json()
    assert [streamed] == full["texts"]
    assert streamed.count("[") > 1


def test_example_tickets_are_labelled_and_share_no_people(tmp_path, monkeypatch):
    files = [tmp_path / "tickets.jsonl", tmp_path / "unseen.jsonl"]
    monkeypatch.setattr(sys, "argv", ["support_tickets.py", *map(str, files)])
    runpy.run_path(str(EXAMPLES / "support_tickets.py"), run_name="__main__")
    tickets, unseen = (load_spans(str(path)) for path in files)
    assert len(tickets) == 240
    assert tickets.task.output_labels == unseen.task.output_labels
    assert any(not spans for spans in tickets.spans)
    people = [
        {
            row["text"][span["start"] : span["end"]]
            for row in map(json.loads, path.read_text().splitlines())
            for span in row["spans"]
            if span["label"] == "PERSON"
        }
        for path in files
    ]
    assert not people[0] & people[1]


# A model of random weights learns little of real texts, and training says so in many ways.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_scikit_learn_example_saves_loadable_probe(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SIDELIGHT_MODEL", saved(tiny, tmp_path / "model"))
    monkeypatch.setenv("SIDELIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    runpy.run_path(str(EXAMPLES / "scikit_learn.py"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:2]] == ["Accuracy by fold", "Best"]
    folder = lines[-1].removeprefix("Next: sidelight serve --probe ")
    probe = load_probe(folder)
    assert (probe.name, probe.task.labels) == ("urgency", ("routine", "urgent"))


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="Ray is not installed (pip install 'ray[serve]')",
)
def test_ray_replicas_return_identical_verdicts_and_require_api_key(tiny, tmp_path):
    probes = [untrained_probe(tiny, "toxicity"), untrained_probe(tiny, "urgency")]
    settings = {
        "probes": os.pathsep.join(str(save_probe(p, tmp_path / p.name)) for p in probes),
        "model": saved(tiny, tmp_path / "model"),
        "replicas": 2,
        "cpus": 0.1,
    }
    with ray_serve(settings, tmp_path) as url, openai_client(url, KEY) as client:
        body = {"model": client.models.list().data[0].id, "max_tokens": 8, "temperature": 0}
        body["messages"] = [{"role": "user", "content": TEXTS["texts"][0]}]
        told = []
        for _ in range(5):
            verdicts = client.chat.completions.create(**body).model_extra["sidelight"]["verdicts"]
            told.append([(v["probe"], v["probabilities"]) for v in verdicts])
        assert [probe for probe, _ in told[0]] == ["toxicity", "urgency"]
        assert told == told[:1] * 5
        chunks = list(client.chat.completions.create(**body, stream=True))
        assert len(chunks[0].choices[0].delta.sidelight["verdicts"]) == 2
        with http_client(url) as http:
            assert http.get("/v1/models").status_code == 401


@contextmanager
def ray_serve(settings: dict[str, object], folder: Path) -> Iterator[str]:
    """The address of a Ray cluster on this machine that runs the example."""
    port = free_port()
    application = {"name": "example", "import_path": "ray_serve:app", "args": settings}
    config = {"http_options": {"port": port}, "applications": [application]}
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *filter(None, sys.path)]),
        "SIDELIGHT_API_KEY": KEY,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    program = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "run"]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([*program, str(folder / "serve.yaml")], env=environment)
    try:
        # Ray keeps requests waiting until a replica runs.
        while True:
            assert process.poll() is None
            try:
                if httpx.get(f"{url}/ready", headers=HEADERS).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
