"""What a test runs in process or on loopback: a command, the engine, our server, its clients."""

import asyncio
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from openai import OpenAI
from starlette.testclient import TestClient

from sidelight.cli import main
from sidelight.engines.base import Engine, Finished, PromptClassified, Sampling, TextDelta
from sidelight.engines.transformers.backbone import TransformersBackbone
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.models.conversation import Message
from sidelight.policy.rules import Policy, Rule, side_of
from sidelight.probes.probe import Probe
from sidelight.server.app import create_app, server_settings
from sidelight.server.config import ServerConfig


def cli(*arguments: str) -> int:
    """The exit code of ``sidelight`` with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sidelight", *arguments])
        try:
            main()
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


GREEDY = Sampling(temperature=0.0, max_tokens=16)
# Batches of other shapes add in another order: float32 rounding over three layers.
ENGINE_ROUNDING = 1e-5


@dataclass(frozen=True)
class Answer:
    classified: PromptClassified
    text: str
    finished: Finished


def run_engine(backbone, work, *, probes=(), limits=None):
    """The outcome of ``work(engine)`` with a started engine."""

    async def main():
        engine = TransformersEngine(backbone, probes, limits=limits)
        await engine.start()
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(main())


async def ask(engine, text, sampling=GREEDY, delay_s=0.0):
    """The answer to a text, of which no probe is watched."""
    await asyncio.sleep(delay_s)
    events = await events_of(engine, text, sampling)
    assert isinstance(events[0], PromptClassified)
    assert isinstance(events[-1], Finished)
    assert all(isinstance(event, TextDelta) for event in events[1:-1])
    return Answer(events[0], "".join(event.text for event in events[1:-1]), events[-1])


async def events_of(engine, text, sampling=GREEDY, **options):
    conversation = [Message("user", text)]
    return [event async for event in engine.generate(conversation, sampling, **options)]


async def until_idle(engine):
    async with asyncio.timeout(5):
        while engine.load.running or engine.load.waiting:
            await asyncio.sleep(0.005)


def count_passes(backbone):
    """The shape of the tokens of every forward pass from now on."""
    shapes: list[torch.Size] = []

    def note(_module, _args, kwargs):
        shapes.append(kwargs["input_ids"].shape)

    backbone.model.register_forward_pre_hook(note, with_kwargs=True)
    return shapes


def written_singly(backbone, text, *, max_tokens=GREEDY.max_tokens):
    """The prompt, and the tokens that follow it when the model alone writes."""
    prompt = backbone.encoder.encode([Message("user", text)])
    ids = torch.tensor([prompt.token_ids])
    tokens = backbone.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_tokens,
        pad_token_id=0,
    )[0, len(prompt) :]
    return prompt, tokens.tolist()


def reference(backbone, text):
    """The text that the model alone writes, and how many tokens it has."""
    _, written = written_singly(backbone, text)
    # An unfinished character at the end is not sent.
    text = backbone.tokenizer.decode(written, skip_special_tokens=True).rstrip("\ufffd")
    return text, len(written)


def require_alike(verdicts, wanted):
    """Verdicts of the same probabilities, but for rounding."""
    actual, expected = (
        [p for verdict in side for p in verdict.probabilities.values()]
        for side in (verdicts, wanted)
    )
    np.testing.assert_allclose(actual, expected, rtol=0, atol=ENGINE_ROUNDING)


MODEL = "tiny/llama"


def post_paths(http: httpx.Client) -> set[str]:
    """The paths that the server's document has a POST for."""
    paths = http.get("/openapi.json").raise_for_status().json()["paths"]
    return {path for path, methods in paths.items() if "post" in methods}


def app_of(engine: Engine, *, policy: Policy | None = None, **settings: Any) -> FastAPI:
    """Our own server of ``engine``; the settings are those of ``ServerConfig``."""
    config = ServerConfig(log_level="warning", **settings)
    if policy is not None:
        # As if its file had been read.
        vars(config)["loaded_policy"] = policy
    return create_app(engine, config)


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


@contextmanager
def in_process(engine: Engine, **options: Any) -> Iterator[TestClient]:
    """A client of a server of ``engine``; the options are those of ``app_of``.

    An answer arrives as a whole, a stream too.
    """
    app = app_of(engine, **options)
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
        yield client


def under_rules(
    backbone: TransformersBackbone,
    probes: Sequence[Probe],
    rules: Mapping[str, Rule] | None = None,
    **options: Any,
) -> AbstractContextManager[TestClient]:
    """A client of a server of these probes, whose rules are given by name, with an admin key."""
    sides = {probe.name: side_of(probe) for probe in probes}
    policy = {
        side: {name: rule for name, rule in (rules or {}).items() if sides[name] == side}
        for side in ("input", "output")
    }
    engine = TransformersEngine(backbone, probes)
    return in_process(engine, policy=Policy(**policy), admin_key="admin-key", **options)


@contextmanager
def faults(
    backbone: TransformersBackbone, by_pass: Mapping[int, Callable[[], None]]
) -> Iterator[None]:
    """What happens at the start of the forward passes of these numbers; the first is 1."""
    numbers = count(1)

    def note(*_: object) -> None:
        by_pass.get(next(numbers), lambda: None)()

    hook = backbone.model.register_forward_pre_hook(note)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def raw_connection(address: str, *, timeout: float = 10) -> Iterator[socket.socket]:
    """An open connection."""
    where = urlsplit(address)
    with socket.create_connection((where.hostname, where.port), timeout=timeout) as opened:
        yield opened


def free_port() -> int:
    """A free port on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as opened:
        return opened.getsockname()[1]


def read_all(opened: socket.socket) -> bytes:
    """All bytes until the server closes; a reset counts as a close."""
    received = b""
    try:
        while chunk := opened.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return received


def raw_request(path: str, body: bytes, *headers: str, length: int | None = None) -> bytes:
    """A POST; ``length`` is what it declares, which need not be true."""
    size = len(body) if length is None else length
    kind = ("Host: localhost", "Content-Type: application/json", f"Content-Length: {size}")
    lines = [f"POST {path} HTTP/1.1", *kind, *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
