"""Measures time and memory, and writes what was found as JSON and as Markdown."""

import ctypes
import gc
import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from urllib.request import urlopen

import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families

from sidelight.backbone import TransformersBackbone
from sidelight.errors import SidelightError
from sidelight.storage import write_text
from sidelight_lab.environment import package_versions
from sidelight_lab.tables.writing import Grid

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


def cpu_seconds(pid: int) -> float:
    """The CPU time of a process.

    Raises:
        SidelightError: It has ended.
    """
    try:
        spent = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess as error:
        raise SidelightError(f"The server (process {pid}) ended during the benchmark.") from error
    return spent.user + spent.system


def read_metrics(url: str) -> str:
    """The server's Prometheus text."""
    with urlopen(f"{url}/metrics", timeout=300) as answer:
        return answer.read().decode()


def total(text: str, series: str, **labels: str) -> float:
    """The sum of a series over all samples that have these labels."""
    found = (
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == series and labels.items() <= sample.labels.items()
    )
    return sum(found, 0.0)


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table under its title."""
    lines = tuple(tuple(map(str, row)) for row in rows)
    return Grid(title, tuple(headings), lines).markdown().strip()


def conditions(backbone: TransformersBackbone, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the figures depend on: the model, the settings, the machine, and package versions."""
    device = backbone.device
    is_gpu = device.type == "cuda"
    versions = package_versions()
    return {
        "model": backbone.name,
        "fingerprint": backbone.fingerprint.digest,
        "dtype": backbone.fingerprint.dtype,
        **settings,
        "device": torch.cuda.get_device_name(device) if is_gpu else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load before": round(os.getloadavg()[0], 2),
        **{name: versions.get(name) for name in ("torch", "transformers", "sidelight")},
    }


@dataclass(frozen=True)
class Record:
    """The outcome of a benchmark, written to ``NAME.json`` and ``NAME.md``.

    ``results`` are the other keys of the JSON; ``sections`` follow the conditions in the Markdown.
    """

    name: str
    conditions: Mapping[str, Any]
    results: Mapping[str, Any]
    sections: Sequence[str]

    def to_json(self) -> str:
        content = {"conditions": dict(self.conditions), **self.results}
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        line = ", ".join(f"{name} {value}" for name, value in self.conditions.items())
        return "\n\n".join([line, *self.sections]) + "\n"

    def save(self, folder: Path) -> None:
        write_text(folder / f"{self.name}.json", self.to_json())
        write_text(folder / f"{self.name}.md", self.to_markdown())
