"""How soon and how surely a response is caught while it is written.

To add a detector, give its running scores to `Detector` where `measuring.py` lists them.
"""

from sidelight.bench.streaming.measuring import Settings, compare_streaming
from sidelight.bench.streaming.record import Record
from sidelight.bench.streaming.responses import with_positives

__all__ = ["Record", "Settings", "compare_streaming", "with_positives"]
