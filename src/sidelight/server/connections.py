"""HTTP connections that cannot be held by a client that neither sends nor reads."""

import asyncio
import json

from uvicorn.protocols.http.h11_impl import H11Protocol

from sidelight.server.errors import error_body
from sidelight.server.limits import ServerLimits


class BoundedProtocol(H11Protocol):
    """uvicorn's connection with limits: uvicorn itself waits forever for a head, and for a reader.

    Attributes:
        limits: ``header_s``, ``write_s`` and ``connections`` are used here. Of the class, since
            uvicorn makes the instances.
    """

    limits = ServerLimits()
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
        body = json.dumps(error_body(msg, type="invalid_request_error")).encode()
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


def bounded_protocol(limits: ServerLimits) -> type[BoundedProtocol]:
    """The class of each connection, as uvicorn's ``http`` setting."""
    return type("BoundedProtocol", (BoundedProtocol,), {"limits": limits})
