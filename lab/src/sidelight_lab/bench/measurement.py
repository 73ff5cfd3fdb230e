"""What benches share: untrained probes, conditions, and records as JSON and as Markdown."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import urlopen

import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families

from sidelight.backbone import TransformersBackbone
from sidelight.calibration import Calibration
from sidelight.errors import SidelightError
from sidelight.fingerprint import Fingerprint
from sidelight.mechanisms.base import Geometry, build_mechanism, mechanism_spec
from sidelight.probe import Probe
from sidelight.prompts import PromptFormat, Reads
from sidelight.standardisation import Standardisation
from sidelight.storage import write_text
from sidelight.types import MechanismSpec, Task
from sidelight_lab.environment import package_versions
from sidelight_lab.tables.writing import markdown_table


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
    return markdown_table(title, headings, rows).strip()


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


def untrained_probe(
    who: Fingerprint,
    name: str,
    *,
    prompt_format: PromptFormat = "chat",
    spec: MechanismSpec | None = None,
    reads: Reads | None = None,
    seed: int = 0,
) -> Probe:
    """A binary probe with random weights, which costs as much as a trained one."""
    task = Task("binary", ("no", "yes"))
    geometry = Geometry(layers=who.layers, width=who.width, outputs=task.outputs)
    spec = spec or mechanism_spec("readout")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mechanism = build_mechanism(spec, geometry).eval().requires_grad_(False)
        for parameter in mechanism.parameters():
            # Parameters that start at zero would hide a wrong verdict.
            parameter.normal_(std=who.width**-0.5)
    return Probe(
        name=name,
        task=task,
        reads=reads or Reads(),
        prompt_format=prompt_format,
        spec=spec,
        mechanism=mechanism,
        standardisation=Standardisation.identity(geometry),
        calibration=Calibration("none", task.kind, (1.0,), (0.0,)),
        thresholds=(0.5,),
        fingerprint=who,
    )


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
