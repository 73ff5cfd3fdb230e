"""Progress of long-running work, on standard error."""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar

_EVERY_S = 15.0
_LINE = "{l_bar}{n_fmt} of {total_fmt} [{elapsed}<{remaining}, {rate_fmt}]\n"
_is_quiet = ContextVar("is_quiet", default=False)


Progress = Callable[[int | float], object]
"""Callback that takes the amount of work done since the last call."""


@contextmanager
def quiet() -> Generator[None]:
    """Suppress progress inside the block."""
    token = _is_quiet.set(True)
    try:
        yield
    finally:
        _is_quiet.reset(token)


def say(sentence: str) -> None:
    """Print a line to the progress output."""
    if not _is_quiet.get():
        print(sentence, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int | float, *, unit: str) -> Generator[Progress]:
    """A progress bar on a terminal; elsewhere, as in a log, a line every 15 seconds.

    Args:
        title: Description of the work.
        total: The amount of work, in ``unit``.
        unit: Unit of work, in the plural.
    """
    from tqdm import tqdm

    is_log = not sys.stderr.isatty()
    with tqdm(
        total=total,
        desc=title,
        unit=f" {unit}",
        unit_scale=True,
        disable=_is_quiet.get(),
        mininterval=_EVERY_S if is_log else 0.1,
        maxinterval=_EVERY_S,
        bar_format=_LINE if is_log else None,
    ) as bar:
        yield bar.update
        # Closing would print the last line again.
        if is_log and not bar.disable and bar.last_print_n == bar.n:
            bar.display = _nothing


def _nothing(*_: object, **__: object) -> None:
    """Print no line."""
