"""What a server process holds while it is asked: memory and open files."""

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from sidelight.bench.load.watching import read_metrics, resident_mb, total
from sidelight.errors import SidelightError


@dataclass(frozen=True)
class Sample:
    """A look at the process.

    Attributes:
        visits: Done so far, of the phase.
        seconds: Since the sampler was made.
        resident_mb: Memory, MB.
        descriptors: Open files, connections among them.
    """

    visits: int
    seconds: float
    resident_mb: float
    descriptors: int


class Sampler:
    """Looks at a process.

    Args:
        pid: Of the process.

    Attributes:
        samples: In order.
    """

    def __init__(self, pid: int):
        self._pid = pid
        self._start = perf_counter()
        self.samples: list[Sample] = []

    def look(self, visits: int) -> Sample:
        """Adds a sample.

        Raises:
            SidelightError: The process has ended, or the system does not tell (it is not Linux).
        """
        resident = resident_mb(self._pid)
        if resident is None:
            raise SidelightError(
                f"Nothing is told of process {self._pid}: it has ended, or this is not Linux."
            )
        descriptors = sum(1 for _ in Path(f"/proc/{self._pid}/fd").iterdir())
        sample = Sample(visits, perf_counter() - self._start, resident, descriptors)
        self.samples.append(sample)
        return sample


def requests_held(url: str) -> int:
    """Requests that the server's engine runs or keeps in line."""
    text = read_metrics(url)
    series = ("sidelight_requests_running", "sidelight_requests_waiting")
    return int(sum(total(text, name) for name in series))
