"""From start to a clean end, under a real signal."""

import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from live import MODEL, wait_until_ready
from sidelight.engines.transformers import TransformersEngine
from sidelight.errors import SidelightError
from sidelight.server.app import serve
from sidelight.server.config import ServerConfig
from sockets import free_port
from tiny import three_probes, tiny_backbone


@pytest.mark.slow
def test_a_signal_ends_the_server_once_the_running_text_is_complete():
    backbone = tiny_backbone()
    port = free_port()
    message = {"role": "user", "content": "hello"}
    request = {"model": MODEL, "messages": [message], "max_tokens": 200, "temperature": 0}

    def interrupt(_module, _args):
        hook.remove()
        os.kill(os.getpid(), signal.SIGINT)

    # The first forward pass tells that the request is running.
    hook = backbone.model.register_forward_pre_hook(interrupt)

    def ask():
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            wait_until_ready(http)
            return http.post("/v1/chat/completions", json=request)

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask)
        serve(lambda: TransformersEngine(backbone, three_probes(backbone)), ServerConfig(port=port))
        assert answer.result().json()["usage"]["completion_tokens"] == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health")


def test_a_failure_to_load_ends_the_server_with_its_error():
    def load():
        raise SidelightError("no such model")

    with pytest.raises(SidelightError, match="no such model"):
        serve(load, ServerConfig(port=free_port()))


def test_a_taken_port_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SidelightError, match=f"Cannot listen on 127.0.0.1:{port}"):
            serve(lambda: pytest.fail("must not load"), ServerConfig(port=port))
