"""vLLM's own server as a process, and every way to have a text written by it.

Our command starts it too. What is in its answers is here as well.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from policy_contract import ADMIN, Asked, Subjects, chat, chunks_of
from sidelight.probes.card import read_card
from sidelight_vllm.settings import revision_of
from worlds.servers import free_port
from worlds.vllm import IS_INTERPRETED


@dataclass(frozen=True)
class StockServer:
    """One that answers at ``address``."""

    address: str
    process: subprocess.Popen
    log: Path


_SIZES = {
    "block_size": 32,
    "max_model_len": 1024,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 8,
    "enforce_eager": True,
    # Of the memory that must be free at the start, which the machine shares with other tests.
    "gpu_memory_utilization": 0.1,
}


def stock_server(
    model: str, folders: Sequence[str], home: Path, *options: str, **environment: str
) -> AbstractContextManager[StockServer]:
    """A server of the model in a folder, which it calls ``tiny``; its log goes to ``home``.

    ``options`` are more words of the command line, ``environment`` more variables.
    """
    sizes = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in _SIZES.items()
    ]
    words = [
        *("-m", "vllm.entrypoints.openai.api_server"),
        *("--model", model, "--served-model-name", "tiny", "--dtype", "float32"),
        *(*sizes, *options),
    ]
    named = {"SIDELIGHT_PROBES": os.pathsep.join(folders), "VLLM_PLUGINS": "sidelight"}
    return _running(words, {**named, **environment}, home)


def under_policy(subjects: Subjects, home: Path) -> AbstractContextManager[StockServer]:
    """A server under the policy of the subjects, with an audit log and a key of an admin."""
    policy = home / "policy.toml"
    policy.write_text(subjects.policy)
    return stock_server(
        subjects.path,
        subjects.folders,
        home,
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-scale-out"),
        SIDELIGHT_POLICY=str(policy),
        SIDELIGHT_AUDIT_LOG=str(home / "audit.jsonl"),
        SIDELIGHT_ADMIN_KEY=ADMIN,
        VLLM_ENABLE_RESPONSES_API_STORE="1",
        VLLM_SERVER_DEV_MODE="1",
    )


def thin_start(
    model: str,
    folders: Sequence[str],
    home: Path,
    *options: str,
    until: str | None = None,
    **environment: str,
) -> AbstractContextManager[StockServer]:
    """The same by ``sidelight serve --engine vllm``; the model's name is its folder.

    ``until`` is in its log while it still starts; None: it is given once it answers.
    """
    sizes = [f"{name}={json.dumps(value)}" for name, value in _SIZES.items()]
    words = [
        *("-m", "sidelight", "serve", "--engine", "vllm", "--dtype", "float32"),
        *("--model", model),
        *(word for folder in folders for word in ("--probe", folder)),
        *(word for size in sizes for word in ("--engine-option", size)),
        *options,
    ]
    return _running(words, environment, home, until=until)


@contextmanager
def _running(
    words: Sequence[str], environment: Mapping[str, str], home: Path, *, until: str | None = None
) -> Iterator[Any]:
    port, log = free_port(), home / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *words, "--port", str(port)],
            env={**os.environ, **environment},
            stdout=file,
            stderr=file,
        )
    server = StockServer(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_for(server, until)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def _wait_for(server: StockServer, until: str | None) -> None:
    stop = time.monotonic() + 500
    while time.monotonic() < stop:
        assert server.process.poll() is None, server.log.read_text()[-3000:]
        if until is None:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{server.address}/health", timeout=5).status_code == 200:
                    return
        elif until in server.log.read_text():
            return
        time.sleep(0.5 if until is None else 0.05)
    raise AssertionError(server.log.read_text()[-3000:])


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NAMED_SCHEMA = {"name": "x", "schema": SCHEMA}
# An empty answer, which a tiny model samples at times, has an end token and nothing to cut.
_NOT_EMPTY = {"min_tokens": 1}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}


def completion(text: str | list, **options: Any) -> Asked:
    return "/v1/completions", {"prompt": text, **options}


def tokens_in(subjects: Subjects | None, text: str, **options: Any) -> Asked:
    ids = [] if subjects is None else list(subjects.chat(text).token_ids)
    sampling = {"max_tokens": 8, "logprobs": 2, **_NOT_EMPTY, **options}
    return "/inference/v1/generate", {"token_ids": ids, "sampling_params": sampling}


def posts(address: str, **options: Any) -> set[str]:
    """The paths of this server that take a post."""
    paths = httpx.get(f"{address}/openapi.json", timeout=120, **options).json()["paths"]
    return {path for path, methods in paths.items() if "post" in methods}


def requests_of(subjects: Subjects | None, text: str, *, streamed: bool) -> list[Asked]:
    """Every way of vLLM's server to have a text written, and what clients may add to each."""
    schema = {"type": "json_schema", **NAMED_SCHEMA}
    claim = {"sidelight": {"parts": [[0, 9]]}}
    usage = {"include_usage": True, "continuous_usage_stats": True} if streamed else None
    ways = [
        chat(text),
        chat(text, n=2),
        chat(text, logprobs=True, top_logprobs=3, return_token_ids=True, **_NOT_EMPTY),
        chat(text, response_format={"type": "json_schema", "json_schema": NAMED_SCHEMA}),
        chat(text, tools=[TOOL]),
        chat(text, tools=[TOOL], tool_choice="required"),
        chat(text, tools=[TOOL], tool_choice={"type": "function", "function": {"name": "look"}}),
        chat(text, stop=["e", "a"], include_stop_str_in_output=True),
        chat(text, stop_token_ids=[*range(5, 300)], include_stop_str_in_output=True),
        chat(text, ignore_eos=True, min_tokens=8, skip_special_tokens=False),
        chat(text, max_tokens=1, logprobs=True, top_logprobs=3, **_NOT_EMPTY),
        chat(text, echo=True, return_tokens_as_token_ids=True, logprobs=True, **_NOT_EMPTY),
        chat(text, kv_transfer_params={**claim, "do_remote_prefill": True}),
        chat(text, vllm_xargs={"kv_transfer_params": "x", "sidelight": "y"}),
        chat(text, include_reasoning=False, stream_options=usage),
        completion(text),
        completion(text, n=2, logprobs=3, return_token_ids=True, **_NOT_EMPTY),
        completion([text, text]),
        completion(text, stop=["e"], min_tokens=2),
        ("/v1/responses", {"input": text}),
        ("/v1/responses", {"input": text, "text": {"format": schema}}),
        ("/v1/messages", {"messages": [{"role": "user", "content": text}], "max_tokens": 8}),
        tokens_in(subjects, text),
        tokens_in(subjects, text, n=2, detokenize=False),
        ("/invocations", chat(text)[1]),
        ("/invocations", completion(text)[1]),
    ]
    if not streamed:
        batch = [[{"role": "user", "content": each}] for each in (text, text)]
        questions = {"q": {"type": "boolean", "prompt": "Is it?"}}
        ways += [
            ("/v1/chat/completions/batch", {"messages": batch}),
            completion(text, echo=True, prompt_logprobs=1),
            ("/v1/systemone", {"state": text, "questions": questions}),
            ("/generative_scoring", {"query": text, "items": ["a"], "label_token_ids": [30, 31]}),
        ]
    # Its kernels of structured output cannot be interpreted.
    if IS_INTERPRETED:
        ways = [
            way for way in ways if not {"response_format", "tool_choice", "text"} & way[1].keys()
        ]
    return [(path, {"model": "tiny", "stream": streamed, **body}) for path, body in ways]


def post(address: str, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
    limits = {"max_output_tokens" if path == "/v1/responses" else "max_tokens": 8}
    if path in ("/v1/systemone", "/generative_scoring"):
        limits, body = {}, {key: value for key, value in body.items() if key != "stream"}
    return httpx.post(f"{address}{path}", json={**limits, **body}, timeout=120, **options)


def admin(address: str, body: dict[str, Any] | None = None) -> httpx.Response:
    """What the route of probes answers an admin: a list, or a change."""
    method, headers = "GET" if body is None else "PUT", {"Authorization": f"Bearer {ADMIN}"}
    url = f"{address}/admin/probes"
    return httpx.request(method, url, json=body, headers=headers, timeout=120)


def replace_probe(address: str, name: str, folder: str) -> httpx.Response:
    """Serves one probe from another folder, and the others as they are."""
    served = admin(address).json()["probes"]
    return admin(address, {"probe": [folder if p["name"] == name else p["path"] for p in served]})


@contextmanager
def unjudged(address: str, folders: Sequence[str]) -> Iterator[None]:
    """Has other probes in the workers; the server takes no verdict of theirs."""
    reversed_folders = folders[::-1]
    revision = revision_of(read_card(folder).version for folder in reversed_folders)
    for method, argument in (("check", reversed_folders), ("load", revision)):
        body = {"method": f"sidelight_{method}", "args": [argument]}
        answer = httpx.post(f"{address}/collective_rpc", json=body, timeout=60)
        assert answer.json()["results"] == [None]
    try:
        yield
    finally:
        # A reload loads all probes.
        assert admin(address, {}).status_code == 200


# Fields that hold what a model has written.
_WRITTEN = {
    *("text", "content", "arguments", "delta", "token_ids", "tokens", "token", "top_logprobs"),
    *("token_logprobs", "output", "partial_json", "reasoning", "probability"),
}
_ASKED = {"sidelight", "moderation", "usage", "format", "tools", "tool_choice", "stop_reason"}


def written_in(item: Any, *, name: str = ""):
    """Every text and token id in fields of the model's text, but for what the request says."""
    if isinstance(item, dict):
        for key, value in item.items():
            if not key.startswith("prompt") and key not in _ASKED:
                yield from written_in(value, name=key if key in _WRITTEN else name)
    elif isinstance(item, list):
        for value in item:
            yield from written_in(value, name=name)
    elif name and item not in ("", None, "text", "output_text", "assistant", "message"):
        yield item


def token_ids(response: httpx.Response) -> tuple[list[int], str]:
    """Those of the only choice, and why it ends."""
    ids, reason = [], ""
    for chunk in chunks_of(response):
        for choice in chunk.get("choices", ()):
            ids += choice.get("token_ids") or []
            reason = choice.get("finish_reason") or reason
    return ids, reason
