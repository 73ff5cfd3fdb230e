"""How much one client, and all of them together, may take of the server.

API keys: who may ask, and who may administer. Only digests are kept, and nothing prints them.
"""

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sidelight.errors import SidelightError


@dataclass(frozen=True)
class ServerLimits:
    """Bounds of the HTTP layer; the engine has its own.

    Attributes:
        body_bytes: Of one request.
        batch_items: Texts of one request.
        request_tokens: Tokens of one request, all its texts and what it may write together; None:
            as many as the model's context, per text.
        concurrent: Requests being answered; further ones are a 429.
        connections: Open connections; further ones are closed at once.
        deadline_s: Seconds from the end of a request's head to the last byte of the answer.
        header_s: Seconds that a client may take to send a request's head.
        body_s: Seconds that it may take to send the body.
        write_s: Seconds that it may leave what is sent to it unread.
    """

    body_bytes: int = 4 * 2**20
    batch_items: int = 512
    request_tokens: int | None = None
    concurrent: int = 256
    connections: int = 4096
    deadline_s: float = 600.0
    header_s: float = 10.0
    body_s: float = 30.0
    write_s: float = 30.0


# Those at the ends of a header's value. Others are part of a key: in latin-1, as headers are, the
# last byte of "à" in UTF-8 is a blank.
_BLANKS = " \t"
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")


@dataclass(frozen=True)
class Key:
    """One key, by the name under which it is counted and audited.

    Attributes:
        id: The name; no secret.
        digest: SHA-256 of the secret.
    """

    id: str
    digest: bytes = field(repr=False)

    @classmethod
    def of(cls, id: str, secret: str) -> "Key":
        """The key of a secret, or of ``sha256:`` with the secret's digest in hexadecimal.

        Raises:
            SidelightError: The secret is blank, which everybody could send, or it begins like a
                digest and is none, which would make what stands in a file the secret.
        """
        if not secret.strip():
            raise SidelightError(f"Key '{id}' is empty. Set the variable that holds it.")
        hashed = _DIGEST.fullmatch(secret)
        if not hashed and secret.startswith("sha256:"):
            raise SidelightError(
                f"Key '{id}' is no SHA-256 digest. Write 64 hexadecimal digits after 'sha256:'."
            )
        digest = bytes.fromhex(hashed[1]) if hashed else _digest(secret.encode())
        return cls(id, digest)


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        key_id: Of the key that was sent; None: nobody's.
        is_admin: Whether it is an admin key.
    """

    key_id: str | None = None
    is_admin: bool = False


@dataclass(frozen=True)
class Access:
    """Who may do what.

    Attributes:
        keys: Open everything but ``/admin``; none: everybody may do so.
        admin_keys: Open everything; none: nobody reaches ``/admin``.
    """

    keys: tuple[Key, ...] = ()
    admin_keys: tuple[Key, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether requests without a key are served."""
        return not self.keys

    def caller(self, authorization: str) -> Caller | None:
        """Who sends this header; None: nobody who is served."""
        scheme, _, secret = authorization.partition(" ")
        # Headers are latin-1 on the wire; a key in UTF-8 arrives as its bytes.
        given = _digest(secret.strip(_BLANKS).encode("latin-1"))
        admin, user = _match(self.admin_keys, given), _match(self.keys, given)
        found = admin or user
        if found is not None and scheme.lower() == "bearer":
            return Caller(found.id, is_admin=admin is not None)
        return Caller() if self.is_open else None


def numbered_keys(secrets: Sequence[str], *, prefix: str) -> tuple[Key, ...]:
    """Keys named ``prefix-1``, ``prefix-2`` in their order.

    Raises:
        SidelightError: As ``Key.of``.
    """
    return tuple(Key.of(f"{prefix}-{i}", secret) for i, secret in enumerate(secrets, 1))


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file: one ``ID KEY`` a line; blank lines and ``#`` lines do not count.

    Raises:
        SidelightError: Unreadable, a line of another form, or an id that stands twice. The message
            names the line and quotes nothing of it.
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
                f"Line {number} of {path} is not 'ID KEY' with an id of its own. Write one key a "
                "line; KEY is the secret or sha256:DIGEST."
            )
        keys[words[0]] = Key.of(words[0], words[1])
    if not keys:
        raise SidelightError(f"{path} holds no key. Write one 'ID KEY' a line.")
    return tuple(keys.values())


def _match(keys: Sequence[Key], given: bytes) -> Key | None:
    # All are compared, each in constant time: the time taken tells nothing about them.
    matches = [key for key in keys if hmac.compare_digest(key.digest, given)]
    return matches[0] if matches else None


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
