"""The text of a file, plain or gzip. Knows no format."""

import gzip
import zlib
from pathlib import Path

from sidelight.errors import SidelightError


def read_text(path: Path) -> str:
    """The file's UTF-8 text, without a byte order mark.

    Raises:
        SidelightError: The gzip stream is damaged, or a byte is not UTF-8; the message names its
            line.
    """
    content = path.read_bytes()
    if path.suffix.lower() == ".gz":
        content = _decompress(content, path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SidelightError(
            f"{path.name}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8. "
            "Save the file as UTF-8 text."
        ) from error


def _decompress(content: bytes, path: Path) -> bytes:
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise SidelightError(
            f"{path.name} is not a whole gzip file ({error}). Copy or compress it again."
        ) from error
