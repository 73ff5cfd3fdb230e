"""Times of things measured in turn, so that the machine's drift hits all of them."""

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter


def interleaved(
    actions: Mapping[str, Callable[[], object]], *, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each repeat of each action, taken in turn: A B, A B, ...

    Args:
        actions: What to time, by name.
        repeats: Timed rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            start = perf_counter()
            action()
            seconds[name].append(perf_counter() - start)
    return seconds


def spread(values: list[float], *, digits: int = 3) -> str:
    """Median, and smallest to largest."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
