"""Keys: who may ask what of a server, and the files that say so.

Only the digests of keys are kept, and nothing prints them.
"""

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from pydantic import SecretStr

from sidelight.errors import SidelightError

_log = logging.getLogger("sidelight.server")
# What may surround a key in a header. Other blanks are part of it: headers are latin-1, in which
# the last byte of "à" in UTF-8 is a blank.
_BLANKS = " \t"
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")


@dataclass(frozen=True)
class Quota:
    """How much one key may use; None: as much as the server gives.

    Attributes:
        requests_per_minute: Requests that may begin.
        tokens_per_minute: Tokens read and written; those of a request count once it is over.
        concurrent: Requests at a time.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None

    @classmethod
    def of(cls, words: Sequence[str]) -> "Quota":
        """The quota in words such as ``concurrent=4``.

        Raises:
            ValueError: A word is none of that kind.
        """
        known = {each.name for each in fields(cls)}
        given = dict(word.split("=") for word in words)
        amounts = {name: int(value) for name, value in given.items()}
        is_sound = given.keys() <= known and all(amount > 0 for amount in amounts.values())
        if not is_sound or len(given) < len(words):
            raise ValueError
        return cls(**amounts)


@dataclass(frozen=True)
class Key:
    """One key: the name under which it is audited, the SHA-256 digest of its secret, its quota."""

    id: str
    digest: bytes = field(repr=False)
    quota: Quota = Quota()

    @classmethod
    def of(cls, id: str, secret: str, quota: Quota | None = None) -> "Key":
        """The key with a secret, or with ``sha256:`` and the secret's digest in hexadecimal.

        Raises:
            SidelightError: The secret is blank, or it begins like a digest but is none, so that
                the text in the file would itself be the secret.
        """
        if not secret.strip():
            raise SidelightError(f"Key '{id}' is blank: everybody could send it. Give it a secret.")
        hashed = _DIGEST.fullmatch(secret)
        if not hashed and secret.startswith("sha256:"):
            raise SidelightError(
                f"Key '{id}' is not a SHA-256 digest. Write 64 hexadecimal digits after 'sha256:'."
            )
        if not is_utf8(secret):
            raise SidelightError(f"Key '{id}' is not UTF-8. Give it another secret.")
        digest = bytes.fromhex(hashed[1]) if hashed else _digest(secret.encode())
        return cls(id, digest, quota or Quota())


@dataclass(frozen=True)
class Caller:
    """Who sends a request, by the id of the key; None: without one.

    ``is_scraper``: its key opens ``/metrics`` and nothing else.
    """

    key_id: str | None = None
    is_admin: bool = False
    quota: Quota = Quota()
    is_scraper: bool = False


@dataclass(frozen=True)
class Access:
    """Who may do what.

    Attributes:
        keys: Open everything but ``/admin`` and ``/metrics``; without any, that is open to
            everybody.
        admin_keys: Open everything; without any, nobody reaches ``/admin``.
        metrics_keys: Open ``/metrics``, with all series.
    """

    keys: tuple[Key, ...] = ()
    admin_keys: tuple[Key, ...] = ()
    metrics_keys: tuple[Key, ...] = ()

    def opens_metrics(self, caller: Caller) -> bool:
        """Whether this caller may read ``/metrics``; everybody may if there are no keys."""
        is_open = not self.keys and not self.metrics_keys
        return is_open or caller.is_admin or caller.is_scraper

    def caller(self, authorization: str) -> Caller | None:
        """Who sends this header; None: nobody who may be served."""
        scheme, _, secret = authorization.partition(" ")
        # Headers are latin-1 on the wire; a key in UTF-8 arrives as its bytes.
        given = _digest(secret.strip(_BLANKS).encode("latin-1"))
        admin, user = _match(self.admin_keys, given), _match(self.keys, given)
        scraper = _match(self.metrics_keys, given)
        found = admin or user or scraper
        if found is not None and scheme.lower() == "bearer":
            is_admin, is_scraper = found is admin, found is scraper
            return Caller(found.id, is_admin, found.quota, is_scraper)
        return None if self.keys else Caller()


# Seconds between two looks at the files of keys. A file counts once two looks have found it the
# same, so that none is read while it is being written.
_LOOK_S = 1.0


class WatchedAccess:
    """Who may do what, by the files of keys as they are now.

    While a file is wrong, the keys that were read last hold.

    Args:
        access: By the files as they were at the start.
        files: The files.
        read: Reads them again; it raises ``SidelightError`` if one is wrong.
    """

    def __init__(self, access: Access, files: Sequence[Path], read: Callable[[], Access]):
        self._access = access
        self._files = files
        self._read = read
        self._known = self._seen = self._look()
        self._next_look = 0.0

    def caller(self, authorization: str) -> Caller | None:
        """As that of ``Access``."""
        if self._files and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_S
            self._follow()
        return self._access.caller(authorization)

    def opens_metrics(self, caller: Caller) -> bool:
        """As that of ``Access``."""
        return self._access.opens_metrics(caller)

    def _follow(self) -> None:
        before, self._seen = self._seen, self._look()
        if self._seen == self._known or self._seen != before:
            return
        self._known = self._seen
        try:
            self._access = self._read()
        except SidelightError as error:
            _log.error("The keys stay as they were. %s", error)
        else:
            _log.warning("The keys have been read again.")

    def _look(self) -> list[tuple[int, ...]]:
        """What changes when a file does, also if another one takes its place."""
        found: list[tuple[int, ...]] = []
        for path in self._files:
            try:
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, status.st_ino))
            except OSError:
                found.append(())
        return found


def keys_of(prefix: str, given: Sequence[SecretStr], path: Path | None) -> tuple[Key, ...]:
    """The keys that are given, numbered after a prefix, and those of a file."""
    numbered = (
        Key.of(f"{prefix}-{i}", secret.get_secret_value()) for i, secret in enumerate(given, 1)
    )
    return (*numbered, *(read_keys(path) if path else ()))


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file: one ``ID KEY`` per line, perhaps followed by its quota.

    Blank lines and ``#`` lines do not count.

    Raises:
        SidelightError: It is unreadable, a line has another form, or an id occurs twice. The
            message names the line and quotes nothing of it.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SidelightError(f"Cannot read the keys in {path}: {type(error).__name__}.") from error
    keys: dict[str, Key] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) < 2 or words[0] in keys:
            raise SidelightError(
                f"Line {number} of {path} is not 'ID KEY' with an id of its own. Write one key per "
                "line; KEY is the secret or sha256:DIGEST."
            )
        try:
            quota = Quota.of(words[2:])
        except ValueError:
            names = ", ".join(f"{each.name}=N" for each in fields(Quota))
            raise SidelightError(
                f"Line {number} of {path} has something else than a quota after its key. Write any "
                f"of {names}, each with a whole number above 0."
            ) from None
        keys[words[0]] = Key.of(words[0], words[1], quota)
    if not keys:
        raise SidelightError(f"{path} holds no key. Write one 'ID KEY' per line.")
    return tuple(keys.values())


def _match(keys: Sequence[Key], given: bytes) -> Key | None:
    # All are compared, each in constant time: the time taken reveals nothing about them.
    matches = [key for key in keys if hmac.compare_digest(key.digest, given)]
    return matches[0] if matches else None


def is_utf8(secret: str) -> bool:
    # Bytes of an environment variable that are not UTF-8 become half characters.
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in secret)


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
