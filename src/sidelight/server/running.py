"""Runs the server until it is told to stop."""

import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import uvicorn
from fastapi import FastAPI

from sidelight.engines.base import Engine
from sidelight.engines.loading import LoadingEngine
from sidelight.errors import SidelightError
from sidelight.server.app import create_app
from sidelight.server.connections import bounded_protocol
from sidelight.server.descriptors import ACCEPTED_AT_ONCE, within_system
from sidelight.server.draining import QUEUED, DrainingServer
from sidelight.server.limits import ServerLimits
from sidelight.server.logs import log_settings
from sidelight.server.policy import require_fitting
from sidelight.server.service import Service

_log = logging.getLogger("sidelight.server")
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


def serve(
    load: Callable[[], Engine],
    service: Service | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    allow_anonymous: bool = False,
    notice_s: float = 5.0,
    drain_s: float = 30.0,
    log_level: str = "info",
    json_logs: bool = False,
) -> None:
    """Serves until SIGINT or SIGTERM; requests in flight may finish.

    The port is open at once; until ``load`` returns, what needs the model answers 503.

    Args:
        load: Gives the engine; runs in a thread of its own.
        service: How requests are served; None: as ``Service`` has it by default.
        host: Address to listen on; the default is reachable from this machine only.
        port: Port to listen on; 0 takes a free one and logs it.
        allow_anonymous: Listens beyond this machine even where no key is needed.
        notice_s: Seconds that the server listens on after SIGTERM, with ``/ready`` at 503.
        drain_s: Seconds that requests in flight may then take.
        log_level: Of the server's log: ``debug``, ``info``, ``warning`` or ``error``.
        json_logs: One JSON object a line, in place of text.

    Raises:
        SidelightError: The address cannot be listened on, everybody would be served beyond this
            machine, or what ``load`` raised.
    """
    given = service or Service()
    chosen = replace(given, limits=within_system(given.limits))
    if host not in _LOOPBACK and chosen.access.is_open and not allow_anonymous:
        raise SidelightError(
            f"Everybody who reaches {host} would be served. Set SIDELIGHT_API_KEY or "
            "--api-keys-file, or say --allow-anonymous if something else keeps strangers out."
        )

    def stop() -> None:
        server.should_exit = True

    def load_fitting() -> Engine:
        loaded = load()
        require_fitting(chosen.policy, loaded.probes)
        return loaded

    engine = LoadingEngine(load_fitting, on_failure=stop)
    app = create_app(engine, chosen)
    config = server_settings(app, chosen.limits, log_level=log_level, json_logs=json_logs)
    server = DrainingServer(
        config, drain=app.state.context.drain, drain_s=drain_s, notice_s=notice_s
    )
    listener = _listen(host, port)
    _log.info("Listening on http://%s:%d (Ctrl-C stops)", host, listener.getsockname()[1])
    # uvicorn passes a SIGINT on once it has drained.
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    if engine.failure is not None:
        raise engine.failure


def server_settings(
    app: FastAPI,
    limits: ServerLimits,
    *,
    log_level: str = "info",
    json_logs: bool = False,
) -> uvicorn.Config:
    """Uvicorn's settings for ``app``."""
    return uvicorn.Config(
        app,
        http=bounded_protocol(limits),
        ws="none",
        lifespan="on",
        backlog=ACCEPTED_AT_ONCE,
        access_log=False,
        log_config=log_settings(log_level, as_json=json_logs),
        log_level=log_level,
    )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=QUEUED)
    except OSError as error:
        raise SidelightError(
            f"Cannot listen on {host}:{port} ({error.strerror}). Give another --port or --host."
        ) from error
