"""The audit log: who had which text judged, by which probe, and what followed; without the text."""

import hashlib
import hmac
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastapi import Request

from sidelight.errors import SidelightError
from sidelight.prompts import Conversation, PlainText
from sidelight.server.errors import RequestError
from sidelight.server.keys import Caller


@dataclass(frozen=True)
class Note:
    """What the audit log says of a request.

    Attributes:
        request_id: As in the answer's ``x-request-id``.
        key_id: Of the key that was sent; None: nobody's.
    """

    request_id: str | None = None
    key_id: str | None = None

    @classmethod
    def of(cls, request: Request) -> "Note":
        """From what the middleware has put into the request's state."""
        caller: Caller = getattr(request.state, "caller", Caller())
        return cls(getattr(request.state, "request_id", None), caller.key_id)


class AuditLog:
    """Appends JSON lines to a file.

    A line is handed to the operating system before the request goes on, and not synced to the disk:
    it outlives the process, but not a crash of the machine. Where another file stands at the path,
    or none, as after a rotation, that one is written from then on.

    Args:
        path: The file.
        salt: Secret of the texts' hashes; the same text has the same hash under the same salt.

    Raises:
        SidelightError: It cannot be written.
    """

    def __init__(self, path: Path, *, salt: bytes):
        self._path = path
        self._salt = salt
        self._lock = threading.Lock()
        self._is_torn = False
        try:
            self._file = self._opened()
        except OSError as error:
            raise SidelightError(
                f"Cannot write the audit log {path} ({error.strerror}). Name another file."
            ) from error

    def write(self, lines: Sequence[dict[str, Any]]) -> None:
        """Appends the lines, all at once.

        Raises:
            RequestError: They could not be written, or not wholly.
        """
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        try:
            with self._lock:
                self._follow()
                # After half a line, the next one begins on a line of its own.
                data = b"\n" * self._is_torn + data
                written = os.write(self._file, data)
                self._is_torn = 0 < written < len(data) or (self._is_torn and not written)
        except OSError as error:
            raise _unwritten() from error
        if written < len(data):
            raise _unwritten()

    def hash(self, text: Conversation) -> str:
        """HMAC-SHA256 of the conversation as compact JSON, ``[["user","Hello"]]``."""
        turns = [["text", text.content]] if isinstance(text, PlainText) else _turns(text)
        words = json.dumps(turns, ensure_ascii=False, separators=(",", ":"))
        return hmac.new(self._salt, words.encode(), hashlib.sha256).hexdigest()

    def _opened(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def _follow(self) -> None:
        """Opens the file that stands at the path now, if it is another one."""
        mine = os.fstat(self._file)
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
            # Opened first: where that fails, the old file stays.
            new = self._opened()
            os.close(self._file)
            self._file = new


NOBODY = Note()


def now() -> str:
    """The time as a line has it: UTC, with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _turns(text: Conversation) -> list[list[str]]:
    assert not isinstance(text, PlainText)
    return [[message.role, message.content] for message in text]


def _unwritten() -> RequestError:
    return RequestError(
        "The audit log cannot be written, and the policy answers nothing that is not audited. Ask "
        "the operator to look at the disk.",
        status=500,
        type="server_error",
        code="audit_failed",
    )
