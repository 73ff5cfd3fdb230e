"""Progress of long work, on standard error."""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from rich.progress import ProgressColumn


@runtime_checkable
class Progress(Protocol):
    """Receives how much of the work is done."""

    @property
    def advance(self) -> Callable[[int | float], None]:
        """Called with the amount done since the last call."""
        ...


class _Lines:
    """A line every few seconds, for logs."""

    _EVERY_S = 15.0

    def __init__(self, title: str, total: int | float, unit: str):
        self._title, self._total, self._unit = title, total, unit
        self._done, self._start, self._said = 0.0, monotonic(), monotonic()

    def advance(self, amount: int | float) -> None:
        self._done += amount
        if monotonic() - self._said >= self._EVERY_S and self._done < self._total:
            self._said = monotonic()
            self.say()

    def say(self) -> None:
        elapsed = monotonic() - self._start
        rate = self._done / max(elapsed, 1e-9)
        # Of what has not begun nobody knows.
        left = f", {(self._total - self._done) / rate:.0f} s left" if rate else ""
        print(
            f"{self._title}: {self._done:,.0f} of {self._total:,.0f} {self._unit}, "
            f"{_rate(rate)} {self._unit}/s, {elapsed:.0f} s so far{left}",
            file=sys.stderr,
            flush=True,
        )


def _rate(amount: float) -> str:
    """Whole numbers, but of what is slow two digits."""
    return f"{amount:,.0f}" if amount >= 10 else f"{amount:.2g}"


@contextmanager
def progress(title: str, total: int | float, *, unit: str) -> Generator[Progress]:
    """A progress bar with rate and time left on a terminal, a line now and then elsewhere.

    Args:
        title: What is being done.
        total: The amount of work, in ``unit``.
        unit: Plural name of what is counted.
    """
    if not sys.stderr.isatty():
        lines = _Lines(title, total, unit)
        yield lines
        lines.say()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Bar(*columns, _rate_column(unit), console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield _Amounts(partial(bar.advance, task))


@dataclass(frozen=True)
class _Amounts:
    """Hands amounts on."""

    advance: Callable[[int | float], None]


def _rate_column(unit: str) -> "ProgressColumn":
    from rich.progress import ProgressColumn, Task
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{_rate(task.speed or 0)} {unit}/s")

    return Rate()
