"""What one run of a row gave, stored as soon as it is there. Knows files, not how they came.

Fits the runs of a table that are missing, and stores each as soon as it is there.

Sees training and validation texts only.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from jaxtyping import Float

from sidelight.artifact import save_probe
from sidelight.progress import progress
from sidelight.storage import replacing
from sidelight.training.dataset import ProbeDataset
from sidelight.training.fit import make_run
from sidelight.training.loop import train_mechanisms
from sidelight.training.settings import FitOptions, Job
from sidelight_lab.baselines.base import FittedBaseline
from sidelight_lab.tables.rounds import Round
from sidelight_lab.tables.rows import BaselineConfig, ProbeConfig, Rows

RESULT = "result.npz"
DIVERGED = "diverged"
PROBE = "probe"


@dataclass(frozen=True)
class Result:
    """One row with one seed, before the test.

    Attributes:
        validation_logits: Before calibration.
        seconds: That fitting took; of probes that were trained together, each one's share.
        parameters: Numbers that were fitted and are kept.
    """

    validation_logits: Float[np.ndarray, "text output"]
    seconds: float
    parameters: int


@dataclass(frozen=True)
class Unit:
    """One row with one seed, and where what it gave is kept.

    Attributes:
        row: Name of the row.
        seed: Of everything random.
        folder: Its own; the name holds a hash of all that decides the result.
    """

    row: str
    seed: int
    folder: Path

    @property
    def is_fitted(self) -> bool:
        """Whether its validation results are there."""
        return (self.folder / RESULT).exists()

    @property
    def has_diverged(self) -> bool:
        """Whether training it ended in numbers that are not finite."""
        return (self.folder / DIVERGED).exists()

    def save_divergence(self) -> None:
        """Notes that it diverged, so that it is not trained again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / DIVERGED).touch()

    def save(self, result: Result) -> None:
        """Stores the result whole or, if killed, not at all."""
        _save_arrays(
            self.folder / RESULT,
            validation_logits=result.validation_logits,
            seconds=np.array(result.seconds),
            parameters=np.array(result.parameters),
        )

    def load(self) -> Result:
        """What ``save`` stored."""
        with np.load(self.folder / RESULT, allow_pickle=False) as stored:
            return Result(
                stored["validation_logits"], float(stored["seconds"]), int(stored["parameters"])
            )

    def is_tested(self, test: str) -> bool:
        """Whether the logits of the test texts with this hash are there."""
        return self._test_path(test).exists()

    def save_test(self, test: str, logits: Float[np.ndarray, "text output"]) -> None:
        """Stores logits of test texts."""
        _save_arrays(self._test_path(test), logits=logits)

    def load_test(self, test: str) -> Float[np.ndarray, "text output"]:
        """What ``save_test`` stored."""
        with np.load(self._test_path(test), allow_pickle=False) as stored:
            return stored["logits"]

    def _test_path(self, test: str) -> Path:
        return self.folder / f"test-{test[:12]}.npz"


def digest(described: Mapping[str, Any]) -> str:
    """A hash of JSON-ready values that does not depend on their order."""
    text = json.dumps(described, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def unit_at(runs: Path, row: str, seed: int, described: Mapping[str, Any]) -> Unit:
    """The unit of a row and seed.

    Args:
        runs: Folder of all units.
        row: Name of the row.
        seed: Of the run.
        described: All that decides the result.
    """
    plain = re.sub(r"[^a-z0-9.]+", "-", row.lower()).strip("-")
    key = digest({"row": row, "seed": seed, **described})
    return Unit(row, seed, runs / f"{plain}-seed{seed}-{key[:12]}")


def _save_arrays(path: Path, **arrays: np.ndarray) -> None:
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Run:
    """A row to be fitted with one seed.

    Attributes:
        unit: Where what it gives is kept.
        study: The texts.
    """

    unit: Unit
    dataset: ProbeDataset


@dataclass(frozen=True)
class ProbeRun(Run):
    """A probe to train with one seed."""

    config: ProbeConfig


@dataclass(frozen=True)
class BaselineRun(Run):
    """A baseline to fit with one seed."""

    config: BaselineConfig


@dataclass(frozen=True)
class Runs:
    """All runs of a table.

    Attributes:
        probes: Those that are fitted.
        baselines: All of them, fitted.
        diverged: Probes whose training ended in numbers that are not finite.
    """

    probes: tuple[ProbeRun, ...]
    baselines: tuple[BaselineRun, ...]
    diverged: tuple[ProbeRun, ...]

    @property
    def all(self) -> tuple[Run, ...]:
        """Probes, then baselines; all fitted."""
        return (*self.probes, *self.baselines)


@dataclass(frozen=True)
class Bench:
    """Where the runs of one table are fitted.

    Attributes:
        folder: Of all runs.
        max_tokens: As texts were cut; goes into the probes' records.
        rivals: Baselines that were fitted here, kept for the test. They have no file format, so
            one of an earlier, killed run is fitted once more when the test comes.
    """

    folder: Path
    max_tokens: int
    rivals: dict[Path, FittedBaseline] = field(default_factory=dict)

    def fit_rounds(self, rows: Rows, rounds: Sequence[Round]) -> Runs:
        """Fits what is missing; all probes of a round in one call."""
        probes = [self.probe_runs(rows, at) for at in rounds]
        baselines = [self.baseline_runs(rows, at) for at in rounds]
        for probe_runs, baseline_runs in zip(probes, baselines, strict=True):
            self.train(probe_runs)
            self.fit(baseline_runs)
        tried = [run for runs in probes for run in runs]
        return Runs(
            probes=tuple(run for run in tried if run.unit.is_fitted),
            baselines=tuple(run for runs in baselines for run in runs),
            diverged=tuple(run for run in tried if run.unit.has_diverged),
        )

    def probe_runs(self, rows: Rows, at: Round) -> list[ProbeRun]:
        """Every probe with every seed of a round."""
        return [
            ProbeRun(self._unit(row.name, seed, at.dataset, _describe_probe(row)), at.dataset, row)
            for row in rows.probes
            for seed in at.seeds
        ]

    def baseline_runs(self, rows: Rows, at: Round) -> list[BaselineRun]:
        """Every baseline with its seeds of a round."""
        return [
            BaselineRun(
                self._unit(row.name, seed, at.dataset, _describe_baseline(row)), at.dataset, row
            )
            for row in rows.baselines
            for seed in at.seeds[: row.seeds]
        ]

    def train(self, runs: Sequence[ProbeRun]) -> None:
        """Trains those that are missing in one call, since they share each read of the cache.

        One that diverges is noted, and the others go on.
        """
        missing = [run for run in runs if not (run.unit.is_fitted or run.unit.has_diverged)]
        if not missing:
            return
        dataset = missing[0].dataset
        start = perf_counter()
        trained = train_mechanisms(
            [Job(run.config.spec, run.unit.seed, run.config.settings) for run in missing],
            task=dataset.task,
            training=dataset.training.training_set(),
            validation=dataset.validation.training_set(),
            device=dataset.backbone.device,
        )
        seconds = (perf_counter() - start) / len(missing)
        options = FitOptions(reads=dataset.training.states.reads, max_tokens=self.max_tokens)
        for run, one in zip(missing, trained, strict=True):
            if one is None:
                run.unit.save_divergence()
                continue
            made = make_run(one, dataset, name=run.unit.row, options=options)
            # The probe first: a unit counts as fitted once its result is there.
            save_probe(made.probe, run.unit.folder / PROBE)
            parameters = made.probe.record["parameters"]
            run.unit.save(Result(one.logits, seconds, parameters))

    def fit(self, runs: Sequence[BaselineRun]) -> None:
        """Fits those that are missing, one after the other."""
        missing = [run for run in runs if not run.unit.is_fitted]
        if not missing:
            return
        with progress("Baselines", len(missing), unit="fits") as shown:
            for run in missing:
                self.rivals[run.unit.folder] = self._fit(run)
                shown.advance(1)

    def rival(self, run: BaselineRun) -> FittedBaseline:
        """The fitted baseline, out of memory or fitted anew with the same seed."""
        kept = self.rivals.pop(run.unit.folder, None)
        return self._fit(run) if kept is None else kept

    def _fit(self, run: BaselineRun) -> FittedBaseline:
        start = perf_counter()
        rival = run.config.baseline.fit(run.dataset, seed=run.unit.seed)
        seconds = perf_counter() - start + rival.seconds_before
        if run.unit.is_fitted:
            # Of the first fit: one that is done again ends at its checkpoint.
            seconds = run.unit.load().seconds
        logits = rival.logits(run.dataset.validation)
        run.unit.save(Result(logits, seconds, rival.parameters))
        return rival

    def _unit(self, row: str, seed: int, dataset: ProbeDataset, config: Mapping[str, Any]) -> Unit:
        return unit_at(self.folder, row, seed, {**config, **_describe_study(dataset)})


def _describe_probe(row: ProbeConfig) -> dict[str, Any]:
    return {"spec": asdict(row.spec), "settings": asdict(row.settings)}


def _describe_baseline(row: BaselineConfig) -> dict[str, Any]:
    return {"baseline": type(row.baseline).__name__, "options": repr(row.baseline)}


def _describe_study(dataset: ProbeDataset) -> dict[str, Any]:
    """Data, backbone, limits and reading: a cache's folder is named by a hash of the last four."""
    splits = (dataset.training, dataset.validation)
    return {
        "sidelight": version("sidelight"),
        "labels": [split.examples.content_hash for split in splits],
        "states": [split.states.directory.name for split in splits],
    }
