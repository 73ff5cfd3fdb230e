"""Clients that speak raw bytes to a server, for what no HTTP library would send."""

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {size}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@dataclass(frozen=True)
class Answer:
    """One HTTP answer."""

    status: int
    body: bytes


def answers(received: bytes) -> list[Answer]:
    """All answers of a connection, in order; an interim one (100) is none."""
    found: list[Answer] = []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        length = re.search(rb"content-length: (\d+)", head.lower())
        if length:
            body, received = received[: int(length[1])], received[int(length[1]) :]
        elif status >= 200:
            body, _, received = received.partition(b"0\r\n\r\n")
        else:
            continue
        found.append(Answer(status, body))
    return found
