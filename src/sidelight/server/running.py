"""Runs the server until it is told to stop."""

import logging
import socket
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress

import uvicorn

from sidelight.engines.base import Engine
from sidelight.engines.loading import LoadingEngine
from sidelight.errors import SidelightError
from sidelight.server.app import MAX_BODY_BYTES, create_app

_log = logging.getLogger("uvicorn.error")
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


def serve(
    load: Callable[[], Engine],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_keys: Sequence[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    drain_s: int = 30,
    log_level: str = "info",
) -> None:
    """Serves until SIGINT or SIGTERM; requests in flight may finish.

    The port is open at once; until ``load`` returns, every route but ``/health`` answers 503.

    Args:
        load: Gives the engine; runs in a thread of its own.
        host: Address to listen on; the default is reachable from this machine only.
        port: Port to listen on; 0 takes a free one and logs it.
        api_keys: Keys of which requests must carry one; none: everybody is served.
        max_body_bytes: Larger requests are refused.
        drain_s: Seconds that requests in flight may take after a signal.
        log_level: Of uvicorn's log: ``debug``, ``info``, ``warning`` or ``error``.

    Raises:
        SidelightError: The address cannot be listened on, or what ``load`` raised.
    """

    def stop() -> None:
        server.should_exit = True

    engine = LoadingEngine(load, on_failure=stop)
    app = create_app(engine, api_keys=api_keys, max_body_bytes=max_body_bytes)
    config = uvicorn.Config(app, ws="none", timeout_graceful_shutdown=drain_s, log_level=log_level)
    server = uvicorn.Server(config)
    listener = _listen(host, port)
    _log.addFilter(without_message)
    _log.info("Listening on http://%s:%d (Ctrl-C stops)", host, listener.getsockname()[1])
    if host not in _LOOPBACK and not api_keys:
        _log.warning("Everybody who reaches %s is served; set an API key.", host)
    # uvicorn passes a SIGINT on once it has drained.
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    if engine.failure is not None:
        raise engine.failure


def without_message(record: logging.LogRecord) -> bool:
    """A log filter: keeps where an exception happened; its message may quote a prompt."""
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        places = "".join(traceback.format_tb(error.__traceback__))
        record.exc_text = f"{type(error).__name__} at\n{places}"
        record.exc_info = None
    return True


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise SidelightError(
            f"Cannot listen on {host}:{port} ({error.strerror}). Give another --port or --host."
        ) from error
