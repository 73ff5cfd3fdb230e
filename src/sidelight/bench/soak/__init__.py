"""Many connections and requests of every kind: whether a server loses, leaks or breaks anything."""

from collections.abc import Sequence

from sidelight.bench.soak.measuring import Settings, run_soak
from sidelight.bench.soak.record import Record

__all__: Sequence[str] = ["Record", "Settings", "run_soak"]
