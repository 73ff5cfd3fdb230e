"""The figures with what they were measured on, as files."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from sidelight.backbones import TransformersBackbone
from sidelight.bench.latency.measuring import Row
from sidelight.bench.latency.tables import grids
from sidelight.storage import write_text

Condition = str | int | float


@dataclass(frozen=True)
class Record:
    """What was measured, and on what.

    Attributes:
        conditions: Of the run.
        rows: The figures; the first row of a load is what the others are compared with.
    """

    conditions: Mapping[str, Condition]
    rows: tuple[Row, ...]

    def to_json(self) -> str:
        """Everything, for programs."""
        rows = [asdict(row) for row in self.rows]
        return json.dumps({"conditions": dict(self.conditions), "rows": rows}, indent=2) + "\n"

    def to_markdown(self) -> str:
        """The conditions in a line, then the tables."""
        line = ", ".join(f"{name} {value}" for name, value in self.conditions.items())
        return "\n\n".join([line, *(grid.markdown() for grid in grids(self.rows))]) + "\n"

    def save(self, directory: Path) -> None:
        """Writes ``latency.json`` and ``latency.md``; the folder is made if absent."""
        write_text(directory / "latency.json", self.to_json())
        write_text(directory / "latency.md", self.to_markdown())


def conditions(backbone: TransformersBackbone, *, repeats: int) -> dict[str, Condition]:
    """What the figures depend on.

    Args:
        backbone: The LLM.
        repeats: Rounds.
    """
    device = backbone.device
    is_gpu = device.type == "cuda"
    return {
        "model": backbone.name,
        "fingerprint": backbone.fingerprint.digest,
        "dtype": backbone.fingerprint.dtype,
        "device": torch.cuda.get_device_name(device) if is_gpu else platform.machine(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "load before": round(os.getloadavg()[0], 2),
        "rounds": repeats,
        **{package: version(package) for package in ("torch", "transformers", "sidelight")},
    }
