"""Errors and warnings caused by the user or the network, and the hint for a misspelt name."""

import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from typing import Any

_MOST_CHARACTERS = 200


class SidelightError(Exception):
    """An error that the user can fix; the message says what is wrong and how to fix it."""


class SidelightWarning(UserWarning):
    """Something that the user should know about the data or the result."""


# Every run in a process repeats its warnings; the user's own filters take precedence.
warnings.filterwarnings("always", category=SidelightWarning, append=True)


def warn(sentence: str) -> None:
    """Issue a ``SidelightWarning`` with this message."""
    warnings.warn(sentence, SidelightWarning, stacklevel=2)


@contextmanager
def warnings_ignored() -> Generator[None]:
    """Suppress the warnings of checks that are repeated later."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SidelightWarning)
        yield


class FingerprintMismatchError(SidelightError):
    """A probe was given a backbone that it was not trained on."""


class ContextLengthError(SidelightError):
    """A text is longer than the backbone or the probe may read; nothing is truncated silently."""


class DisguisedTextError(SidelightError):
    """A text has invisible characters or mixed-script words, which the policy refuses.

    Attributes:
        code: ``invisible_characters`` or ``mixed_scripts``.
    """

    def __init__(self, message: str, *, code: str = "invisible_characters"):
        super().__init__(message)
        self.code = code


class VerdictError(SidelightError):
    """A verdict could not be computed; this must never be treated as a negative verdict."""


def checked(kind: Any, value: object, what: str, *, strict: bool = False) -> Any:
    """Validate the value as a pydantic type, such as one with limits.

    Raises:
        SidelightError: The value is not of this type; the message begins with ``what``.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(value, strict=strict)
    except ValidationError as error:
        raise SidelightError(f"{what}: {error.errors()[0]['msg']}.") from error


def transport_errors() -> tuple[type[Exception], ...]:
    """The hub client's errors for a failed connection, from httpx or httpx2 by its version."""
    installed = [name for name in ("httpx", "httpx2") if find_spec(name) is not None]
    return tuple(import_module(name).HTTPError for name in installed)


def how_to_install(package: str) -> str:
    """The sentence that tells how to install a part of Sidelight, which is not on PyPI yet.

    Args:
        package: An extra, such as ``.[serve]``, or a package's folder, such as ``./packages/lab``.
    """
    return f"In a clone of Sidelight, run `pip install '{package}'`."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """End an error message with the closest known name and all known names.

    Args:
        name: The name that the user wrote.
        known: The names that are accepted.

    Returns:
        For example ``" Did you mean 'gate'? Known: attention, gate, pooling."``.
    """
    # difflib takes seconds on very long names.
    choices = sorted(choice[:_MOST_CHARACTERS] for choice in known)
    close = get_close_matches(name[:_MOST_CHARACTERS], choices, n=1)
    guess = f" Did you mean '{close[0]}'?" if close else ""
    return f"{guess} Known: {', '.join(choices) or 'none'}."
