"""The server below HTTP: connections that no client can hold, and an end that loses no request."""

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

# Connections accepted in one turn of the event loop. All of them are open for some turns before
# those that are too many are closed.
ACCEPTED_AT_ONCE = 16
# Connections that the system keeps until they are accepted.
QUEUED = 2048
# File descriptors for these, the listening socket, logs, and probes that are read.
_SPARE = 128
# For the last words to requests that are given up, before uvicorn cuts what is left.
_LAST_WORDS_S = 2
_log = logging.getLogger("sidelight.server")


class BoundedProtocol(H11Protocol):
    """uvicorn's connection, which waits forever for a head and for a reader, with limits."""

    # Of a subclass, since uvicorn makes the instances.
    limits: ServerConfig
    _head_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Starts to wait for a request, unless there are too many connections."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.abort()
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        """Waits on for the rest of a head, however slowly it comes."""
        super().data_received(data)
        if self._is_answering:
            self._stop_head_timer()
        else:
            self._await_head()

    def pause_writing(self) -> None:
        """Starts to wait for the client to read what fills the buffer."""
        super().pause_writing()
        self._read_timer = self.loop.call_later(self.limits.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        self._stop_read_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends all waiting."""
        super().connection_lost(exc)
        self._stop_head_timer()
        self._stop_read_timer()

    def send_400_response(self, msg: str) -> None:
        """Refuses what is not HTTP, in the shape of every other refusal."""
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

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.limits.header_s, self.transport.abort)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None


def bounded_protocol(config: ServerConfig) -> type[BoundedProtocol]:
    """The class of each connection, as uvicorn's ``http`` setting."""
    return type("BoundedProtocol", (BoundedProtocol,), {"limits": config})


def within_system(config: ServerConfig) -> ServerConfig:
    """The configuration with no more connections than this process may open files.

    Raises the process's own limit as far as the system allows. Where that is not enough, fewer
    connections are accepted, and the log says so: running out of files would hit whatever opens
    the next one, a log or a probe among them.

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
            f"This process may open {allowed} files, too few to serve. Raise the limit (ulimit -n) "
            f"to {wanted}."
        )
    if room < config.connections:
        _log.warning(
            "This process may open %d files: at most %d connections, not %d. Raise the limit "
            "(ulimit -n).",
            allowed,
            room,
            config.connections,
        )
    return config.model_copy(update={"connections": room})


class Drain:
    """How far the server's end has come.

    Attributes:
        is_draining: The server is about to stop; ``/ready`` then answers 503.
        is_over: Requests that still run are given up.
    """

    def __init__(self) -> None:
        self.is_draining = False
        self.is_over = False
        self._timeouts: set[asyncio.Timeout] = set()

    @contextmanager
    def ending(self, timeout: asyncio.Timeout) -> Generator[None]:
        """Lets a timeout that has been entered pass at the end of the drain too."""
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

    SIGINT, or a second signal, stops to listen at once. Either way, running requests may finish.

    Args:
        config: uvicorn's settings.
        drain: Told of the signal, and of the end of the wait.
        drain_s: Seconds that running requests may take once nothing listens any more.
        notice_s: Seconds between SIGTERM and the end of listening.
    """

    def __init__(self, config: uvicorn.Config, *, drain: Drain, drain_s: float, notice_s: float):
        super().__init__(config)
        config.timeout_graceful_shutdown = ceil(drain_s) + _LAST_WORDS_S
        self._drain_s = drain_s
        self._drain = drain
        self._notice_s = notice_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens with a long queue; asyncio's is as short as what it accepts in one turn."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(QUEUED)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops to listen and waits for running requests; those that take too long are told so."""
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
