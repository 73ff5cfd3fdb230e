"""How long probes take within the steps of an engine."""

import time
from collections.abc import Generator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the wall-clock time of some parts of one step.

    Attributes:
        seconds: So far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self, *, after: torch.device | None = None) -> Generator[None]:
        """Counts what happens meanwhile.

        Args:
            after: Waits first until this device has done what it was told: a GPU works on while
                Python goes ahead, and what it still has to do must not count.
        """
        if after is not None and after.type == "cuda":
            torch.cuda.synchronize(after)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start
