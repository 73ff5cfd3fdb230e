"""Files that are written whole or not at all."""

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

# Processes of other machines may write too, so that only time tells who was killed.
_STALE_S = 3600
_IN_USE = "in-use.lock"


@contextmanager
def replacing(path: Path, *, is_one_of_many: bool = False) -> Generator[Path]:
    """A path to write to, whose file becomes ``path`` when the block ends without an error.

    The folder is made if absent.

    Args:
        path: The file.
        is_one_of_many: Whether its folder has thousands of such files. What killed processes left
            of it stays then: to look for it, the whole folder is read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_one_of_many:
        remove_stale(path.parent, f"{escape(path.name)}.*.partial")
    # Two may write the same file, also from containers with equal numbers of processes.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_stale(folder: Path, pattern: str) -> None:
    """Removes what killed processes left: it was not written to for an hour."""
    for path in folder.glob(pattern):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_S:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


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
            f"Cannot write to {directory}: {error.strerror}. Name another folder."
        ) from error


@contextmanager
def only_writer(directory: Path) -> Generator[None]:
    """Keeps other runs from a folder, which is made if absent; they are told by an error."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        # Some disks have no locks.
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
    """Keeps a folder, which is made if absent, from ``remove_unused`` of any process."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = (folder / _IN_USE).open("a+b")
        except FileNotFoundError:
            continue
        with file:
            # Some disks have no locks.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_SH)
            # Else it was removed while this waited.
            if _is_at(file.fileno(), folder / _IN_USE):
                yield
                return


def has_files(folder: Path) -> bool:
    """Whether a folder that ``holding`` keeps has anything in it."""
    return folder.is_dir() and any(path.name != _IN_USE for path in folder.iterdir())


def remove_unused(folder: Path, *, idle_s: float = 0) -> bool:
    """Removes a folder unless a process is holding it. Returns whether it did.

    Args:
        folder: One that ``holding`` keeps.
        idle_s: Only if nothing has been written to it for so many seconds, and its disk has locks.
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
            # Under another name first: the next to hold the folder makes a new one.
            removed = folder.rename(f"{folder}-{secrets.token_hex(8)}")
            shutil.rmtree(removed, ignore_errors=True)
            return True
    return False


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


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
