"""What a server says of itself while it is asked: its line, its counts, its memory."""

import asyncio
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

_EVERY_S = 0.5
_TIMEOUT_S = 300.0
_MB = 1e6


@dataclass
class Watcher:
    """Keeps the longest line that it sees.

    Attributes:
        url: Of the server.
        waiting: Most requests in line.
        running: Most requests being written.
    """

    url: str
    waiting: int = 0
    running: int = 0

    async def watch(self) -> None:
        """Looks until it is cancelled."""
        while True:
            text = await asyncio.to_thread(read_metrics, self.url)
            self.waiting = max(self.waiting, int(total(text, "sidelight_requests_waiting")))
            self.running = max(self.running, int(total(text, "sidelight_requests_running")))
            await asyncio.sleep(_EVERY_S)


def read_metrics(url: str) -> str:
    """The server's Prometheus text."""
    with urlopen(f"{url}/metrics", timeout=_TIMEOUT_S) as answer:
        return answer.read().decode()


def total(text: str, series: str, *, containing: str = "") -> float:
    """The sum of a series over its labels, or over those that contain some text."""
    lines = re.findall(rf"^{series}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
    return sum(float(value) for labels, value in lines if containing in labels)


def resident_mb(pid: int) -> float | None:
    """Memory of a process, MB; None where the system does not tell."""
    path = Path(f"/proc/{pid}/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", path.read_text()) if path.exists() else None
    return int(found[1]) * 1024 / _MB if found else None
