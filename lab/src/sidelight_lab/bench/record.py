"""The results and conditions of a benchmark, as JSON and as Markdown."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sidelight.backbone import TransformersBackbone
from sidelight.storage import write_text
from sidelight_lab.tables.context import package_versions
from sidelight_lab.tables.writing import Grid


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
    """The outcome of a benchmark.

    Attributes:
        name: Name of the files, without their endings.
        conditions: See ``conditions``.
        results: The other keys in the JSON.
        sections: Tables and sentences that follow the conditions in the Markdown.
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
        """Writes ``NAME.json`` and ``NAME.md``; the folder is made if absent."""
        write_text(folder / f"{self.name}.json", self.to_json())
        write_text(folder / f"{self.name}.md", self.to_markdown())
