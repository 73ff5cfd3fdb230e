"""The runs of a table: each row with each seed, fitted once and stored at once.

This module sees training and validation texts only.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sidelight.artifact import save_probe
from sidelight.errors import SidelightError
from sidelight.progress import progress
from sidelight.storage import replacing
from sidelight.training.dataset import ProbeDataset, Split
from sidelight.training.fit import calibrate_probe
from sidelight.training.loop import train_mechanisms
from sidelight.training.settings import FitOptions, Job
from sidelight_lab.baselines.base import FittedBaseline
from sidelight_lab.tables.recipes import Recipe
from sidelight_lab.tables.rows import BaselineConfig, ProbeConfig, Row


@dataclass(frozen=True)
class Result:
    """One row with one seed, before the test.

    Attributes:
        validation_logits: Before calibration.
        seconds: Time of fitting; probes that are trained together share it evenly.
        parameters: How many fitted numbers prediction needs.
    """

    validation_logits: Float[np.ndarray, "text output"]
    seconds: float
    parameters: int


@dataclass
class Run:
    """One row with one seed.

    Attributes:
        dataset: The data it is fitted to.
        folder: Folder of its results; the name has a hash of everything that decides them.
        fitted: A baseline that was fitted in this process, kept for the test. Baselines have no
            file format, so one from an earlier, killed process is fitted again for the test.
    """

    row: Row
    seed: int
    dataset: ProbeDataset
    folder: Path
    fitted: FittedBaseline | None = None

    @property
    def is_fitted(self) -> bool:
        """Whether its validation results are stored."""
        return self._result.exists()

    @property
    def has_diverged(self) -> bool:
        """Whether training ended in numbers that are not finite."""
        return (self.folder / "diverged").exists()

    @property
    def probe_folder(self) -> Path:
        """The artifact of a trained probe."""
        return self.folder / "probe"

    def save(self, result: Result) -> None:
        """Stores the result completely or, if killed, not at all."""
        _save_arrays(self._result, **vars(result))

    def load(self) -> Result:
        """The stored result."""
        with np.load(self._result, allow_pickle=False) as stored:
            return Result(
                stored["validation_logits"], float(stored["seconds"]), int(stored["parameters"])
            )

    def is_tested(self, test: str) -> bool:
        """Whether the logits of the test texts with this hash are stored."""
        return self._test(test).exists()

    def save_test(self, test: str, logits: Float[np.ndarray, "text output"]) -> None:
        """Stores logits of the test texts with this hash."""
        _save_arrays(self._test(test), logits=logits)

    def load_test(self, test: str) -> Float[np.ndarray, "text output"]:
        """The stored logits of the test texts with this hash."""
        with np.load(self._test(test), allow_pickle=False) as stored:
            return stored["logits"]

    @property
    def _result(self) -> Path:
        return self.folder / "result.npz"

    def _test(self, test: str) -> Path:
        return self.folder / f"test-{test[:12]}.npz"


def _save_arrays(path: Path, **arrays: Any) -> None:
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def digest(described: Mapping[str, Any]) -> str:
    """A hash of JSON-ready values that does not depend on their order."""
    text = json.dumps(described, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def plan_runs(
    rows: Sequence[Row], dataset: ProbeDataset, seeds: Sequence[int], folder: Path
) -> list[Run]:
    """Every row with its seeds on these texts, stored in folders of their own in ``folder``."""
    splits = (dataset.training, dataset.validation)
    texts = {
        "sidelight": version("sidelight"),
        "labels": [split.examples.content_hash for split in splits],
        # A cache's name is a hash of texts, backbone, limit and what is read.
        "states": [split.states.directory.name for split in splits],
    }
    runs: list[Run] = []
    for row in rows:
        name = re.sub(r"[^a-z0-9.]+", "-", row.name.lower()).strip("-")
        for seed in seeds[: row.seeds]:
            key = digest({"row": row.name, "seed": seed, **row.describe(), **texts})
            runs.append(Run(row, seed, dataset, folder / f"{name}-seed{seed}-{key[:12]}"))
    return runs


def draw_few(dataset: ProbeDataset, recipe: Recipe) -> list[ProbeDataset]:
    """The few-shot draws of a recipe.

    A draw has the same number of texts of each class, at most ``labels_per_class``, in training and
    also in validation (drawn from the validation split): a few-shot user has no more to choose by.
    """
    if dataset.task.kind == "multilabel":
        raise SidelightError(
            "A few-shot table draws the same number of texts of each class, and the texts of a "
            "multi-label task can be in several. Choose a data set with one label per text."
        )
    draws: list[ProbeDataset] = []
    for draw in range(recipe.draws):
        random = np.random.default_rng(draw)
        training, validation = (
            split.select(_balanced(split, recipe.labels_per_class, random))
            for split in (dataset.training, dataset.validation)
        )
        draws.append(ProbeDataset(dataset.backbone, training, validation))
    return draws


def _balanced(split: Split, count: int, random: np.random.Generator) -> Int[np.ndarray, " text"]:
    by_class = [np.flatnonzero(split.labels == label) for label in range(len(split.task.labels))]
    smallest = min(map(len, by_class))
    if smallest == 0:
        raise SidelightError("A class has no text to draw. Use more rows (--limit).")
    drawn = [random.choice(rows, min(count, smallest), replace=False) for rows in by_class]
    return random.permutation(np.concatenate(drawn))


def fit_runs(runs: Sequence[Run], *, max_tokens: int) -> None:
    """Fits the missing ones of runs on the same texts.

    Probes are trained in one call, to share each read of the cache. One that diverges is marked, so
    that it is not trained again, and the others go on. ``max_tokens`` is the limit that texts were
    cut to, for the probes' records.
    """
    missing = [run for run in runs if not (run.is_fitted or run.has_diverged)]
    _train(
        [(run, run.row) for run in missing if isinstance(run.row, ProbeConfig)],
        max_tokens=max_tokens,
    )
    fits = [run for run in missing if isinstance(run.row, BaselineConfig)]
    if fits:
        with progress("Baselines", len(fits), unit="fits") as shown:
            for run in fits:
                run.fitted = fit_baseline(run)
                shown.advance(1)


def _train(missing: Sequence[tuple[Run, ProbeConfig]], *, max_tokens: int) -> None:
    if not missing:
        return
    dataset = missing[0][0].dataset
    start = perf_counter()
    trained = train_mechanisms(
        [Job(row.spec, run.seed, row.settings) for run, row in missing],
        training=dataset.training,
        validation=dataset.validation,
        device=dataset.backbone.device,
    )
    seconds = (perf_counter() - start) / len(missing)
    options = FitOptions(reads=dataset.training.states.reads, max_tokens=max_tokens)
    for (run, row), one in zip(missing, trained, strict=True):
        if one is None:
            run.folder.mkdir(parents=True, exist_ok=True)
            (run.folder / "diverged").touch()
            continue
        probe = calibrate_probe(one, dataset, name=row.name, options=options).probe
        # The probe comes first: a run counts as fitted once its result is stored.
        save_probe(probe, run.probe_folder)
        run.save(Result(one.logits, seconds, probe.record["parameters"]))


def fit_baseline(run: Run) -> FittedBaseline:
    """Fits the baseline of a run with its seed, and stores the result."""
    assert isinstance(run.row, BaselineConfig)
    start = perf_counter()
    fitted = run.row.baseline.fit(run.dataset, seed=run.seed)
    seconds = perf_counter() - start + fitted.seconds_before
    if run.is_fitted:
        # The first fit counts: a second one may go on from a checkpoint.
        seconds = run.load().seconds
    run.save(Result(fitted.logits(run.dataset.validation), seconds, fitted.parameters))
    return fitted
