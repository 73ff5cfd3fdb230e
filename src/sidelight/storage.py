"""Files that are written whole or not at all, and locks on folders that processes share."""

import errno
import fcntl
import json
import os
import tempfile
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sidelight.errors import SidelightError

_LOCK = "lock"
_NOT_SUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """A path to write to, whose file becomes ``path`` when the block ends without an error.

    The folder is made if absent.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    yield partial
    os.replace(partial, path)


def check_folder(directory: Path) -> None:
    """Checks that a folder can be written, before hours of work go into it. Makes none.

    Raises:
        SidelightError: It cannot be written.
    """
    new = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
        for folder in new:
            folder.rmdir()
    except OSError as error:
        raise SidelightError(
            f"Cannot write to {directory}: {error.strerror}. Name another folder with --out."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, "utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sync(path: Path) -> None:
    """Returns once a file, or the list of files in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FolderLock:
    """A lock on an existing folder, shared by readers or held by a single writer.

    It ends with ``release``, with the object, or with the process, however that ends. The object
    holds it: a second one in the same process is locked out like one of another process.

    Args:
        folder: The folder, which gets a file for the lock.
    """

    def __init__(self, folder: Path):
        self._path = folder / _LOCK
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        self.release = weakref.finalize(self, os.close, self._file)

    @property
    def is_current(self) -> bool:
        """Whether this still is the folder that was locked: its writer may have removed it."""
        try:
            return os.path.samestat(os.fstat(self._file), self._path.stat())
        except FileNotFoundError:
            return False

    def take(self, *, alone: bool) -> bool:
        """Takes the lock, or changes how it is held, without waiting.

        Args:
            alone: Whether to hold it alone (to write) or to share it (to read).

        Returns:
            Whether it is held now.

        Raises:
            SidelightError: The disk has no file locks.
        """
        kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            raise SidelightError(
                f"The disk of {self._path.parent} has no file locks, so two runs there could "
                "destroy each other's hidden states. Name a folder on another disk with --cache."
            ) from error
        return True
