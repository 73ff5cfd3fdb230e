"""A server on loopback in a thread, and a client that speaks to it."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from openai import OpenAI

from sidelight.engines.base import Engine
from sidelight.policy.rules import Policy
from sidelight.server.app import create_app, server_settings
from sidelight.server.config import ServerConfig

MODEL = "tiny/llama"


def app_of(
    engine: Engine,
    *,
    policy: Policy | None = None,
    sources: Mapping[str, Path] | None = None,
    **settings: Any,
) -> FastAPI:
    """Our own server of ``engine``; the settings are those of ``ServerConfig``."""
    config = ServerConfig(log_level="warning", **settings)
    if policy is not None:
        # As if its file had been read.
        vars(config)["loaded_policy"] = policy
    return create_app(engine, config, sources=sources)


@contextmanager
def served(engine: Engine, **options: Any) -> Iterator[str]:
    """The address of a live server of ``engine``; the options are those of ``app_of``."""
    app = app_of(engine, **options)
    with listening(app, app.state.context.config) as address:
        yield address


@contextmanager
def listening(app: FastAPI, config: ServerConfig | None = None) -> Iterator[str]:
    """The address of a live server of ``app``, on a free port."""
    settings = server_settings(app, config or ServerConfig(log_level="warning"))
    settings.port = 0
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def openai_client(address: str, api_key: str = "none") -> Iterator[OpenAI]:
    """The real client, without retries."""
    with OpenAI(base_url=f"{address}/v1", api_key=api_key, max_retries=0) as client:
        yield client


@contextmanager
def http_client(address: str) -> Iterator[httpx.Client]:
    """A client that says exactly what a test tells it to."""
    with httpx.Client(base_url=address, timeout=10) as client:
        yield client


def wait_until_ready(client: httpx.Client) -> None:
    """Returns once the server answers requests; it need not listen yet."""
    while True:
        try:
            if client.get("/ready").status_code == 200:
                return
        except httpx.ConnectError:
            pass
        time.sleep(0.01)
