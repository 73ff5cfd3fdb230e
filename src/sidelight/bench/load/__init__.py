"""Many chat clients at once: whether each gets its own verdicts, and how long answers take."""

from collections.abc import Sequence

from sidelight.bench.load.measuring import Settings, run_load
from sidelight.bench.load.record import Record

__all__: Sequence[str] = ["Record", "Settings", "run_load"]
