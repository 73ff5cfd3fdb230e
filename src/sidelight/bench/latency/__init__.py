"""What one new token costs with and without classification: the paper's latency table.

To add a row, say of another engine, write a ``Subject`` and give it to ``compare_latency``.
"""

from sidelight.bench.latency.lineup import default_subjects
from sidelight.bench.latency.loads import Load, prompt_load, synthetic_load
from sidelight.bench.latency.measuring import Range, Row, compare_latency
from sidelight.bench.latency.record import Record, conditions
from sidelight.bench.latency.subjects import Answer, Kind, Subject
from sidelight.bench.latency.tables import Grid, grids

__all__ = [
    "Answer",
    "Grid",
    "Kind",
    "Load",
    "Range",
    "Record",
    "Row",
    "Subject",
    "compare_latency",
    "conditions",
    "default_subjects",
    "grids",
    "prompt_load",
    "synthetic_load",
]
