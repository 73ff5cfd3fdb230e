"""The errors that a user can cause, and the sentence that helps with a misspelt name."""

from collections.abc import Iterable
from difflib import get_close_matches


class SidelightError(Exception):
    """Something the user can put right; the message says what was got, wanted, and what to do."""


class FingerprintMismatchError(SidelightError):
    """A probe meets a backbone other than the one it was trained on."""


class ContextLengthError(SidelightError):
    """A text is longer than the backbone or the probe may read; nothing is truncated silently."""


class VerdictError(SidelightError):
    """A verdict that could not be computed; never to be read as a harmless one."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The closest known name and the list of all, as the end of an error message.

    Args:
        name: What the user wrote.
        known: The names that would have been accepted.

    Returns:
        For example ``" Did you mean 'gate'? Known: attention, gate, pooling."``.
    """
    choices = sorted(known)
    close = get_close_matches(name, choices, n=1)
    guess = f" Did you mean '{close[0]}'?" if close else ""
    return f"{guess} Known: {', '.join(choices) or 'none'}."
