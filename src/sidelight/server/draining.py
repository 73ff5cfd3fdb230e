"""Stops a server without losing a request: first it says so, then it waits, then it ends."""

import signal
import socket
import threading
from types import FrameType

import uvicorn

# Connections that the system keeps until they are accepted.
QUEUED = 2048


class Drain:
    """Whether the server is about to stop; ``/ready`` then answers 503."""

    def __init__(self) -> None:
        self.is_draining = False


class DrainingServer(uvicorn.Server):
    """Serves on for a while after SIGTERM, so that a load balancer can see ``/ready`` turn 503.

    SIGINT, or a second signal, stops to listen at once. Either way, running requests may finish.

    Args:
        config: uvicorn's settings; their graceful timeout bounds the wait for running requests.
        drain: Told of the signal.
        notice_s: Seconds between SIGTERM and the end of listening.
    """

    def __init__(self, config: uvicorn.Config, *, drain: Drain, notice_s: float):
        super().__init__(config)
        self._drain = drain
        self._notice_s = notice_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens with a long queue; asyncio's is as short as what it accepts in one turn."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(QUEUED)

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
