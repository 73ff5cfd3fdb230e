"""The server below HTTP: no client can hold a connection, and no request is lost at the end."""

import asyncio
import json
import logging
import resource
import signal
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager
from math import ceil
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from sidelight.errors import SidelightError
from sidelight.server.config import ServerConfig
from sidelight.server.errors import RequestError

# Connections accepted in one turn of the event loop. All are open for some turns before those
# beyond the limit are closed.
ACCEPTED_AT_ONCE = 16
# Connections that the system queues until they are accepted.
QUEUED = 2048
# File descriptors for these, the listening socket, logs, and probes being loaded.
_SPARE = 128
# For the answers to requests that are cancelled, before uvicorn cuts what is left.
_LAST_WORDS_S = 2
_log = logging.getLogger("sidelight.server")


class BoundedProtocol(H11Protocol):
    """uvicorn's connection with limits: on its own it waits forever for a head and for a reader."""

    limits: ServerConfig

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        if len(self.connections) > self.limits.connections:
            transport.abort()
        else:
            self._start("head", self.limits.header_s)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_answering:
            self._stop("head")
        else:
            # One timer for the whole head, however slowly it comes.
            self._start("head", self.limits.header_s)

    def pause_writing(self) -> None:
        """The buffer is full: the client has to read."""
        super().pause_writing()
        self._start("reader", self.limits.write_s)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("reader")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop("head")
        self._stop("reader")

    def send_400_response(self, msg: str) -> None:
        """Refuses what is not HTTP, in the shape of every other error."""
        body = json.dumps(RequestError(msg).body).encode()
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        # An answer that has begun must not get a second head.
        if not self._is_answering or not self.cycle.response_started:
            self.transport.write(head.encode() + body)
        self.transport.close()

    @property
    def _is_answering(self) -> bool:
        # uvicorn types the cycle as never None; before the first request it is.
        return bool(self.cycle) and not self.cycle.response_complete

    def _start(self, name: str, seconds: float) -> None:
        if name not in self._timers:
            self._timers[name] = self.loop.call_later(seconds, self.transport.abort)

    def _stop(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()


def within_system(config: ServerConfig) -> ServerConfig:
    """The configuration with no more connections than this process may open files.

    Raises the process's own limit as far as the system allows. If that is not enough, fewer
    connections are accepted, and the log says so: running out of files would hit whatever opens
    the next one, such as a log or a probe.

    Raises:
        SidelightError: Not even one connection would be left.
    """
    wanted = config.connections + _SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return config
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    room = allowed - _SPARE
    if room < 1:
        raise SidelightError(
            f"This process may open {allowed} files, which is too few to serve. Raise the limit "
            f"(ulimit -n) to {wanted}."
        )
    if room < config.connections:
        _log.warning(
            "This process may open %d files, so it takes at most %d connections, not %d. Raise the "
            "limit (ulimit -n).",
            allowed,
            room,
            config.connections,
        )
    return config.model_copy(update={"connections": room})


class Drain:
    """How far the server has stopped.

    Attributes:
        is_draining: Whether it is about to stop; ``/ready`` then answers 503.
        is_over: Whether requests that still run are cancelled.
    """

    def __init__(self) -> None:
        self.is_draining = False
        self.is_over = False
        self._timeouts: set[asyncio.Timeout] = set()

    @contextmanager
    def ending(self, timeout: asyncio.Timeout) -> Generator[None]:
        """Makes a timeout that has been entered pass at the end of the drain too."""
        self._timeouts.add(timeout)
        try:
            yield
        finally:
            self._timeouts.discard(timeout)

    def end(self) -> None:
        """Gives up what still runs."""
        self.is_over = True
        for timeout in self._timeouts:
            if not timeout.expired():
                timeout.reschedule(asyncio.get_running_loop().time())


class DrainingServer(uvicorn.Server):
    """Serves on for a while after SIGTERM, so that a load balancer can see ``/ready`` turn 503.

    After SIGINT, or a second signal, it stops listening at once. Either way, running requests may
    finish.

    Args:
        config: uvicorn's settings.
        drain: Notes the signal, and the end of the wait.
        drain_s: Seconds that running requests have once the server has stopped listening.
        notice_s: Seconds from SIGTERM to the end of listening.
    """

    def __init__(self, config: uvicorn.Config, *, drain: Drain, drain_s: float, notice_s: float):
        super().__init__(config)
        config.timeout_graceful_shutdown = ceil(drain_s) + _LAST_WORDS_S
        self._drain_s = drain_s
        self._drain = drain
        self._notice_s = notice_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens with a long queue; asyncio's holds only what it accepts in one turn."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(QUEUED)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops listening and waits for running requests; those that take too long get an error."""
        asyncio.get_running_loop().call_later(self._drain_s, self._drain.end)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Uvicorn's signal handler."""
        is_first = not self._drain.is_draining
        self._drain.is_draining = True
        if is_first and sig == signal.SIGTERM and self._notice_s > 0:
            timer = threading.Timer(self._notice_s, super().handle_exit, (sig, frame))
            timer.daemon = True
            timer.start()
        else:
            super().handle_exit(sig, frame)
