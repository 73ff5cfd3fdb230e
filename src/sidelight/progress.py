"""Progress of long work, on standard error."""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from time import monotonic

_EVERY_S = 15.0
_is_quiet = ContextVar("is_quiet", default=False)


@dataclass(frozen=True)
class Progress:
    """Receives how much of the work is done.

    Attributes:
        advance: To be called with the amount done since the last call.
    """

    advance: Callable[[int | float], object]


@contextmanager
def quiet() -> Generator[None]:
    """Shows no progress inside the block."""
    token = _is_quiet.set(True)
    try:
        yield
    finally:
        _is_quiet.reset(token)


@contextmanager
def progress(title: str, total: int | float, *, unit: str) -> Generator[Progress]:
    """A progress bar on a terminal; elsewhere, as in a log, a line every 15 seconds.

    Args:
        title: What is being done.
        total: The amount of work, in ``unit``.
        unit: What is counted, in the plural.
    """
    if _is_quiet.get():
        yield Progress(lambda _: None)
        return
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=title, unit=f" {unit}", unit_scale=True) as bar:
            yield Progress(bar.update)
        return
    done, start = 0.0, monotonic()
    printed = start

    def print_line() -> None:
        elapsed = monotonic() - start
        rate = done / max(elapsed, 1e-9)
        # No estimate before the first batch.
        left = f", {(total - done) / rate:.0f} s left" if rate else ""
        shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        print(
            f"{title}: {done:,.0f} of {total:,.0f} {unit}, {shown} {unit}/s, "
            f"{elapsed:.0f} s so far{left}",
            file=sys.stderr,
            flush=True,
        )

    def advance(amount: int | float) -> None:
        nonlocal done, printed
        done += amount
        if monotonic() - printed >= _EVERY_S and done < total:
            printed = monotonic()
            print_line()

    yield Progress(advance)
    print_line()
