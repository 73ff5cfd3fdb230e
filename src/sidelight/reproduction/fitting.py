"""Fits the runs of a table that are missing, and stores each as soon as it is there.

Sees training and validation texts only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from sidelight.artifact import save_probe
from sidelight.baselines import Rival
from sidelight.fitting import FitOptions
from sidelight.fitting.making import make_run
from sidelight.progress import progress
from sidelight.reproduction.results import PROBE, Result, Unit, unit_at
from sidelight.reproduction.rounds import Round
from sidelight.reproduction.rows import BaselineConfig, ProbeConfig, Rows
from sidelight.study import Study
from sidelight.training import Job, train_mechanisms


@dataclass(frozen=True)
class Run:
    """A row to be fitted with one seed.

    Attributes:
        unit: Where what it gives is kept.
        study: The texts.
    """

    unit: Unit
    study: Study


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
    rivals: dict[Path, Rival] = field(default_factory=dict)

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
            ProbeRun(self._unit(row.name, seed, at.study, _describe_probe(row)), at.study, row)
            for row in rows.probes
            for seed in at.seeds
        ]

    def baseline_runs(self, rows: Rows, at: Round) -> list[BaselineRun]:
        """Every baseline with its seeds of a round."""
        return [
            BaselineRun(
                self._unit(row.name, seed, at.study, _describe_baseline(row)), at.study, row
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
        study = missing[0].study
        start = perf_counter()
        trained = train_mechanisms(
            [Job(run.config.spec, run.unit.seed, run.config.settings) for run in missing],
            task=study.task,
            training=study.training.training_set(),
            validation=study.validation.training_set(),
            device=study.backbone.device,
        )
        seconds = (perf_counter() - start) / len(missing)
        options = FitOptions(reads=study.training.states.reads, max_tokens=self.max_tokens)
        for run, one in zip(missing, trained, strict=True):
            if one is None:
                run.unit.save_divergence()
                continue
            made = make_run(one, study, name=run.unit.row, options=options)
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

    def rival(self, run: BaselineRun) -> Rival:
        """The fitted baseline, out of memory or fitted anew with the same seed."""
        kept = self.rivals.pop(run.unit.folder, None)
        return self._fit(run) if kept is None else kept

    def _fit(self, run: BaselineRun) -> Rival:
        start = perf_counter()
        rival = run.config.baseline.fit(run.study, seed=run.unit.seed)
        seconds = perf_counter() - start + rival.seconds_before
        if run.unit.is_fitted:
            # Of the first fit: one that is done again ends at its checkpoint.
            seconds = run.unit.load().seconds
        logits = rival.logits(run.study.validation)
        run.unit.save(Result(logits, seconds, rival.parameters))
        return rival

    def _unit(self, row: str, seed: int, study: Study, config: Mapping[str, Any]) -> Unit:
        return unit_at(self.folder, row, seed, {**config, **_describe_study(study)})


def _describe_probe(row: ProbeConfig) -> dict[str, Any]:
    return {"spec": asdict(row.spec), "settings": asdict(row.settings)}


def _describe_baseline(row: BaselineConfig) -> dict[str, Any]:
    return {"baseline": type(row.baseline).__name__, "options": repr(row.baseline)}


def _describe_study(study: Study) -> dict[str, Any]:
    """Data, backbone, limits and reading: a cache's folder is named by a hash of the last four."""
    splits = (study.training, study.validation)
    return {
        "sidelight": version("sidelight"),
        "labels": [split.examples.content_hash for split in splits],
        "states": [split.states.directory.name for split in splits],
    }
