"""Stops a server without losing a request: first it says so, then it waits, then it ends."""

import asyncio
import signal
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager
from math import ceil
from types import FrameType

import uvicorn

# Connections that the system keeps until they are accepted.
QUEUED = 2048
# For the last words to requests that are given up, before uvicorn cuts what is left.
_LAST_WORDS_S = 2


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
