"""vLLM's own server as a process, with nothing of ours but the plugin and environment variables."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx


@dataclass(frozen=True)
class StockServer:
    """One that answers at ``address``."""

    address: str
    process: subprocess.Popen
    log: Path


@contextmanager
def stock_server(
    model: str, folders: Sequence[str], home: Path, *options: str, **environment: str
) -> Iterator[StockServer]:
    """A server of this model with these probes.

    Args:
        model: The folder of the model, which is served as ``tiny``.
        folders: Those of the probes.
        home: Where its log goes.
        options: More words of the command line.
        environment: More variables.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    log = home / "server.log"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", model, "--served-model-name", "tiny", "--dtype", "float32"),
        *("--enforce-eager", "--block-size", "32", "--max-model-len", "1024"),
        *("--max-num-batched-tokens", "64", "--max-num-seqs", "8", "--port", str(port), *options),
    ]
    named = {"SIDELIGHT_PROBES": os.pathsep.join(folders), "VLLM_PLUGINS": "sidelight"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env={**os.environ, **named, **environment}, stdout=file, stderr=file
        )
    server = StockServer(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_until_ready(server)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def _wait_until_ready(server: StockServer) -> None:
    for _ in range(1000):
        assert server.process.poll() is None, server.log.read_text()[-3000:]
        try:
            if httpx.get(f"{server.address}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise AssertionError(server.log.read_text()[-3000:])
