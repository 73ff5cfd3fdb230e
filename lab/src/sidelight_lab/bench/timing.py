"""Measures time and memory of work in this process, and memory and metrics of a server process."""

import ctypes
import gc
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from urllib.request import urlopen

import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families

from sidelight.errors import SidelightError

MB = 1e6


@dataclass(frozen=True)
class Range:
    """Median, smallest and largest of some values."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Range":
        return Range(median(values), min(values), max(values))

    def text(self, digits: int = 3) -> str:
        """For example ``1.02 (0.99 to 1.20)``."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Each value over the base's in the same round."""
    return [own / other for own, other in zip(values, base, strict=True)]


def interleaved(
    actions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    advance: Callable[[int], object] = lambda _: None,
) -> dict[str, list[float]]:
    """Seconds of each action in each round; calls ``advance`` after each timing.

    A round runs all actions one after the other, and each round begins with another one, so neither
    a drift of the machine nor the order favours any.
    """
    names = list(actions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeats):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = perf_counter()
            actions[name]()
            seconds[name].append(perf_counter() - start)
            advance(1)
    return seconds


def peak_bytes(work: Callable[[], object], *, device: torch.device) -> int | None:
    """How far memory rose during the work: tensors on a GPU, else resident pages of this process.

    Run the work once before, so that one-time allocations do not count. None where the system
    cannot tell (any but Linux).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    # Give freed pages back to the system, or the work would reuse them unnoticed.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        # Sets the peak to what is resident now (proc(5), clear_refs).
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = psutil.Process().memory_info().rss
    work()
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return max(0, int(peak[1]) * 1024 - before) if peak else None


# What a process holds after some visits; keys: visits, seconds, resident_mb, descriptors.
Sample = dict[str, float]


def look_at(pid: int, *, visits: int = 0, seconds: float = 0.0) -> Sample:
    """The memory and the open files (with connections) of a process.

    Raises:
        SidelightError: The process has ended.
    """
    process = psutil.Process(pid)
    try:
        held = {"resident_mb": process.memory_info().rss / MB, "descriptors": process.num_fds()}
    except psutil.NoSuchProcess as error:
        raise SidelightError(f"The server (process {pid}) ended during the benchmark.") from error
    return {"visits": visits, "seconds": seconds, **held}


def read_metrics(url: str) -> str:
    """The server's Prometheus text."""
    with urlopen(f"{url}/metrics", timeout=300) as answer:
        return answer.read().decode()


def total(text: str, series: str, **labels: str) -> float:
    """The sum of a series over all samples that have these labels."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == series and labels.items() <= sample.labels.items()
    )
