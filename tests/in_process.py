"""Our own server without a socket, and faults in the passes of its model.

Requests go straight into the application.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from sidelight.backbone import TransformersBackbone
from sidelight.engines.base import Engine
from sidelight.policy.rules import Policy
from sidelight.server.app import create_app
from sidelight.server.config import ServerConfig


@contextmanager
def in_process(
    engine: Engine,
    *,
    policy: Policy | None = None,
    sources: Mapping[str, Path] | None = None,
    **settings: Any,
) -> Iterator[TestClient]:
    """A client of a server of ``engine``; the settings are those of ``ServerConfig``.

    An answer arrives as a whole, a stream too.
    """
    config = ServerConfig(log_level="warning", **settings)
    app = create_app(engine, config, policy=policy, sources=sources)
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
        yield client


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
