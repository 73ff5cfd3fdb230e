"""Clients that speak raw bytes to a server, for what no HTTP library would send."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit


@contextmanager
def connection(address: str, *, timeout: float = 10) -> Iterator[socket.socket]:
    """An open connection."""
    where = urlsplit(address)
    with socket.create_connection((where.hostname, where.port), timeout=timeout) as opened:
        yield opened


def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as opened:
        return opened.getsockname()[1]


def read_all(opened: socket.socket) -> bytes:
    """All bytes until the server closes; a reset counts as a close."""
    received = b""
    try:
        while chunk := opened.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return received


def request(path: str, body: bytes, *headers: str, length: int | None = None) -> bytes:
    """A POST; ``length`` is what it declares, which need not be true."""
    size = len(body) if length is None else length
    kind = ("Host: localhost", "Content-Type: application/json", f"Content-Length: {size}")
    lines = [f"POST {path} HTTP/1.1", *kind, *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
