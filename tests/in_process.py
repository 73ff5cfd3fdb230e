"""Our own server without a socket: requests go straight into the application."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

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
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client
