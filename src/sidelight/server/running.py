"""Runs the server until it is told to stop."""

import logging
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress

import uvicorn

from sidelight.engines.base import Engine
from sidelight.engines.loading import LoadingEngine
from sidelight.server.app import MAX_BODY_BYTES, create_app

_DRAIN_S = 30


def serve(
    load: Callable[[], Engine],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_keys: Sequence[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    drain_s: int = _DRAIN_S,
) -> None:
    """Serves until SIGINT or SIGTERM; requests in flight may finish.

    The port is open at once; until ``load`` returns, every route but ``/health`` answers 503.

    Args:
        load: Gives the engine; runs in a thread of its own.
        host: Address to listen on; the default is reachable from this machine only.
        port: Port to listen on.
        api_keys: Keys of which requests must carry one; none: everybody is served.
        max_body_bytes: Larger requests are refused.
        drain_s: Seconds that requests in flight may take after a signal.

    Raises:
        SidelightError: What ``load`` raised; the server has stopped.
    """

    def stop() -> None:
        server.should_exit = True

    engine = LoadingEngine(load, on_failure=stop)
    app = create_app(engine, api_keys=api_keys, max_body_bytes=max_body_bytes)
    config = uvicorn.Config(app, host=host, port=port, timeout_graceful_shutdown=drain_s)
    logging.getLogger("uvicorn.error").addFilter(_without_messages)
    server = uvicorn.Server(config)
    # uvicorn passes a SIGINT on once it has drained.
    with suppress(KeyboardInterrupt):
        server.run()
    if engine.failure is not None:
        raise engine.failure


def _without_messages(record: logging.LogRecord) -> bool:
    """Logs where an exception happened, not what it says: that may quote a prompt."""
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        places = "".join(traceback.format_tb(error.__traceback__))
        record.exc_text = f"{type(error).__name__} at\n{places}"
        record.exc_info = None
    return True
