"""vLLM's own server as a process, started by its own command or by ours."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from policy_contract import ADMIN, Subjects


@dataclass(frozen=True)
class StockServer:
    """One that answers at ``address``."""

    address: str
    process: subprocess.Popen
    log: Path


SIZES = {
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
        for name, value in SIZES.items()
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
    sizes = [f"{name}={json.dumps(value)}" for name, value in SIZES.items()]
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
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    log = home / "server.log"
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
