"""API keys: access rights, and the key files that are read at startup.

Only digests of keys are stored, and they are never printed.
"""

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import SecretStr

from sidelight.errors import SidelightError

# Whitespace that may surround a key in a header. Other whitespace belongs to the key: headers are
# latin-1, in which the last byte of "à" in UTF-8 is a space.
_BLANKS = " \t"
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")


@dataclass(frozen=True)
class Key:
    """A key: its id in the audit log, and the SHA-256 digest of its secret."""

    id: str
    digest: bytes = field(repr=False)

    @classmethod
    def of(cls, id: str, secret: str) -> "Key":
        """Create a key from its secret, or from ``sha256:`` and the secret's digest in hexadecimal.

        Raises:
            SidelightError: It begins like a digest but is not valid, so the text itself would
                become the secret.
        """
        hashed = _DIGEST.fullmatch(secret)
        if not hashed and secret.startswith("sha256:"):
            raise SidelightError(
                f"The digest of key '{id}' is not valid. Write 64 hexadecimal digits after "
                "'sha256:'."
            )
        digest = bytes.fromhex(hashed[1]) if hashed else _digest(secret.encode())
        return cls(id, digest)


@dataclass(frozen=True)
class Caller:
    """The sender of a request, identified by the id of the key; None without a key.

    ``is_scraper`` is True if the key opens only ``/metrics``.
    """

    key_id: str | None = None
    is_admin: bool = False
    is_scraper: bool = False


@dataclass(frozen=True)
class Access:
    """The access rights of callers.

    Attributes:
        keys: Keys for everything except ``/admin`` and ``/metrics``, which is open to all without
            any key.
        admin_keys: Keys for everything; without any, ``/admin`` is closed.
        metrics_keys: Keys for ``/metrics``.
        foreign_keys: Keys checked by another component. Here they open nothing, but identify
            callers.
    """

    keys: tuple[Key, ...] = ()
    admin_keys: tuple[Key, ...] = ()
    metrics_keys: tuple[Key, ...] = ()
    foreign_keys: tuple[Key, ...] = ()

    def opens_metrics(self, caller: Caller, *, hides_scores: bool) -> bool:
        """Whether this caller may read ``/metrics``.

        Every caller may if there are no keys and the policy withholds nothing.
        """
        is_open = not self.keys and not self.metrics_keys and not hides_scores
        return is_open or caller.is_admin or caller.is_scraper

    def caller(self, authorization: str) -> Caller | None:
        """The sender of this header; None if not authorised."""
        scheme, _, secret = authorization.partition(" ")
        # Headers are latin-1 on the wire; a key in UTF-8 arrives as its bytes.
        digest = _digest(secret.strip(_BLANKS).encode("latin-1"))
        admin = _match(self.admin_keys, digest)
        user = _match((*self.keys, *self.foreign_keys), digest)
        scraper = _match(self.metrics_keys, digest)
        found = admin or user or scraper
        if found is not None and scheme.lower() == "bearer":
            return Caller(found.id, is_admin=found is admin, is_scraper=found is scraper)
        return None if self.keys else Caller()


def keys_of(prefix: str, secrets: Sequence[SecretStr], path: Path | None) -> tuple[Key, ...]:
    """The given keys, numbered after a prefix, and the keys of a file."""
    numbered = (
        Key.of(f"{prefix}-{i}", secret.get_secret_value()) for i, secret in enumerate(secrets, 1)
    )
    return (*numbered, *(read_keys(path) if path else ()))


def read_keys(path: Path) -> tuple[Key, ...]:
    """Read the keys of a file: one ``ID KEY`` per line.

    Blank lines and lines starting with ``#`` are ignored.

    Raises:
        SidelightError: The file is unreadable, a line is malformed, or an id is repeated. The
            message names the line without quoting it.
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
        if len(words) != 2 or words[0] in keys:
            raise SidelightError(
                f"Line {number} of {path} is not 'ID KEY' with a unique id. Write one key per "
                "line; KEY is the secret or sha256:DIGEST."
            )
        keys[words[0]] = Key.of(words[0], words[1])
    if not keys:
        raise SidelightError(f"{path} contains no keys. Write one 'ID KEY' per line.")
    return tuple(keys.values())


def _match(keys: Sequence[Key], digest: bytes) -> Key | None:
    # All are compared, each in constant time, so that timing reveals nothing about them.
    matches = [key for key in keys if hmac.compare_digest(key.digest, digest)]
    return matches[0] if matches else None


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
