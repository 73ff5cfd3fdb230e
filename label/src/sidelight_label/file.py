"""The file of labels: rows as ``sidelight train`` reads them, each on disk before it counts."""

import fcntl
import json
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sidelight.errors import SidelightError
from sidelight.storage import sync


class LabelFile:
    """JSON lines that one process appends to.

    A row is synced to disk before ``append`` returns. ``take_back`` removes rows that this object
    has appended, the newest first. The file is locked until ``close``, or until the object ends.

    Args:
        path: The file. If it is absent, it is made with its folder, and only its owner can read it.

    Raises:
        SidelightError: It is no file of JSON lines, another process appends to it, or it cannot be
            written.
    """

    def __init__(self, path: Path):
        if path.suffix != ".jsonl":
            raise SidelightError(
                f"Labels are appended as JSON lines, but the file is '{path.name}'. Name one that "
                "ends in .jsonl with --out."
            )
        self.path = path.resolve()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self.close = weakref.finalize(self, os.close, self._file)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise SidelightError(
                f"Cannot lock {path} ({error.strerror}): another 'sidelight label' appends to it. "
                "Stop that one, or name another file with --out."
            ) from error
        sync(self.path.parent)
        self._ends: list[int] = []
        self.has_lost_end = self._mend()
        self._seen = os.fstat(self._file)

    @property
    def is_empty(self) -> bool:
        return os.fstat(self._file).st_size == 0

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row.

        Raises:
            SidelightError: It is not on disk: the disk is full, or another program has changed the
                file.
        """
        self._require_unchanged()
        end = self._seen.st_size
        # Half a character in another cell is written as JSON's escape of it.
        text = json.dumps(row, ensure_ascii=False, default=str)
        line = text.encode("utf-8", "backslashreplace") + b"\n"
        try:
            written = os.write(self._file, line)
            if written != len(line):
                raise OSError(f"{written} of {len(line)} bytes were written")
            os.fsync(self._file)
        except OSError as error:
            self._cut(end)
            raise SidelightError(
                f"The label was not saved to {self.path} ({error.strerror or error}). Free some "
                "space, and label the text again."
            ) from error
        self._ends.append(end)
        self._seen = os.fstat(self._file)

    def take_back(self) -> None:
        """Removes the row that was appended last.

        Raises:
            SidelightError: Another program has changed the file.
        """
        self._require_unchanged()
        self._cut(self._ends.pop())

    def _cut(self, size: int) -> None:
        os.ftruncate(self._file, size)
        os.fsync(self._file)
        self._seen = os.fstat(self._file)

    def _mend(self) -> bool:
        """Ends the last line; whether it was the beginning of one, which is removed.

        A power cut or a full disk can leave such a beginning. It was never reported as saved.
        """
        content = self.path.read_bytes()
        if not content or content.endswith(b"\n"):
            return False
        whole, _, last = content.rpartition(b"\n")
        try:
            json.loads(last)
        except ValueError:
            self._cut(len(whole) + 1 if whole else 0)
            return True
        os.write(self._file, b"\n")
        return False

    def _require_unchanged(self) -> None:
        try:
            now = self.path.stat()
        except FileNotFoundError:
            now = None
        if now is None or _identity(now) != _identity(self._seen):
            raise SidelightError(
                f"Another program has changed {self.path}, so nothing is written to it. Stop "
                "'sidelight label' and start it again: it reads the file as it is now."
            )


def _identity(state: os.stat_result) -> tuple[int, int, int]:
    return state.st_ino, state.st_size, state.st_mtime_ns
