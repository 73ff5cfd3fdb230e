"""Atomic writes, and locks of folders."""

import fcntl
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from sidelight.errors import SidelightError

# Processes on other machines may write too, so only the age of a file shows that its writer died.
_STALE_S = 3600
_IN_USE = "in-use.lock"


@contextmanager
def replacing(path: Path, *, is_one_of_many: bool = False) -> Generator[Path]:
    """Yield a temporary path, whose file replaces ``path`` when the block ends without an error.

    The folder is created if necessary.

    Args:
        path: The file to replace.
        is_one_of_many: Whether the folder has thousands of such files. Leftovers of killed
            processes are then not removed, because finding them would read the whole folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_one_of_many:
        remove_stale(path.parent, f"{escape(path.name)}.*.partial")
    # Two processes may write the same file, even from containers with equal process ids.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_stale(folder: Path, pattern: str) -> None:
    """Remove leftovers of killed processes: files that have not been written to for an hour."""
    for path in folder.glob(pattern):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_S:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_folder(directory: Path) -> None:
    """Check that a folder can be written, before hours of work. Creates no folder.

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
            f"Cannot write to {directory}: {error.strerror}. Name another folder."
        ) from error


@contextmanager
def only_writer(directory: Path) -> Generator[None]:
    """Lock a folder, created if necessary, against other runs, which raise an error."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        # Some file systems have no locks.
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SidelightError(
                    f"Another run is writing to {directory}. Wait until it has finished, or name "
                    "another folder."
                ) from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def holding(folder: Path) -> Generator[None]:
    """Protect a folder, created if necessary, from ``remove_unused`` in any process."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = (folder / _IN_USE).open("a+b")
        except FileNotFoundError:
            continue
        with file:
            # Some file systems have no locks.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_SH)
            # Otherwise it was removed while this waited.
            if _is_at(file.fileno(), folder / _IN_USE):
                yield
                return


def has_files(folder: Path) -> bool:
    """Whether a folder protected by ``holding`` has any contents."""
    return folder.is_dir() and any(path.name != _IN_USE for path in folder.iterdir())


def remove_unused(folder: Path, *, idle_s: float = 0) -> bool:
    """Remove a folder unless a process is holding it; return whether it was removed.

    Args:
        folder: A folder that may be protected by ``holding``.
        idle_s: Only remove it if it has not been written to for this many seconds, and its file
            system has locks.
    """
    with suppress(OSError):
        written = max(path.stat().st_mtime for path in (folder, *folder.glob("*/")))
        if time.time() - written < idle_s:
            return False
        with (folder / _IN_USE).open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                if idle_s:
                    return False
            if not _is_at(file.fileno(), folder / _IN_USE):
                return False
            # Renamed first, so that the next process to hold the folder creates a new one.
            removed = folder.rename(f"{folder}-{secrets.token_hex(8)}")
            shutil.rmtree(removed, ignore_errors=True)
            return True
    return False


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as partial:
        partial.write_text(text, "utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sync(path: Path) -> None:
    """Flush a file, or the directory entries of a folder, so that it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
