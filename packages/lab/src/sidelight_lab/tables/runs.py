"""The runs of a table: each row with each seed, fitted and stored immediately, and tested at the
end.

Before ``score_runs``, only training and validation texts are used. Calibration and thresholds are
fitted to validation logits, for both probes and baselines.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sidelight.errors import SidelightError
from sidelight.probes.artifact import load_probe, save_probe
from sidelight.progress import progress, say
from sidelight.states.extraction import cached_logits
from sidelight.statistics.calibration import fit_calibration, suggested_calibration
from sidelight.statistics.thresholds import choose_thresholds
from sidelight.storage import replacing
from sidelight.training.dataset import Split
from sidelight.training.fit import calibrate_probe
from sidelight.training.loop import train_mechanisms
from sidelight.training.optimisation import validation_score
from sidelight.training.preparing import ProbeDataset
from sidelight.training.settings import FitOptions
from sidelight_lab.baselines.base import FittedBaseline
from sidelight_lab.tables.recipes import BaselineRow, ProbeRow, Recipe, Row


@dataclass
class Run:
    """One row with one seed.

    Attributes:
        folder: Folder of its results; the name contains a hash of everything that determines them.
        fitted: A baseline that was fitted in this process, kept for the test. Baselines have no
            file format, so one from an interrupted process is fitted again for the test.
    """

    row: Row
    seed: int
    dataset: ProbeDataset
    folder: Path
    fitted: FittedBaseline | None = None

    @property
    def is_fitted(self) -> bool:
        return (self.folder / "result.npz").exists()

    @property
    def has_diverged(self) -> bool:
        return (self.folder / "diverged").exists()

    def save(self, name: str, **arrays: Any) -> None:
        """Store arrays atomically."""
        with replacing(self.folder / f"{name}.npz") as partial, partial.open("wb") as file:
            np.savez(file, **arrays)

    def load(self, name: str) -> Mapping[str, np.ndarray]:
        with np.load(self.folder / f"{name}.npz", allow_pickle=False) as stored:
            return dict(stored)


def digest(description: Mapping[str, Any]) -> str:
    """A hash of JSON-ready values that does not depend on the order of keys."""
    text = json.dumps(description, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def plan_runs(
    rows: Sequence[Row], dataset: ProbeDataset, seeds: Sequence[int], folder: Path
) -> list[Run]:
    """Plan every row with its seeds on these texts, each stored in a subfolder of ``folder``."""
    splits = (dataset.training, dataset.validation)
    texts = {
        "sidelight": version("sidelight"),
        "labels": [split.examples.content_hash for split in splits],
        # A cache's name is a hash of texts, backbone, limit and what is read.
        "states": [split.states.key for split in splits],
    }
    runs: list[Run] = []
    for row in rows:
        for seed in seeds[: row.seeds]:
            key = digest({"row": row.name, "seed": seed, **row.describe(), **texts})
            name = f"{plain_name(row)}-seed{seed}-{key[:12]}"
            runs.append(Run(row, seed, dataset, folder / name))
    return runs


def plain_name(row: Row) -> str:
    """The row's name in characters allowed for folders and probes."""
    return re.sub(r"[^a-z0-9.]+", "-", row.name.lower()).strip("-")[:64]


def draw_few(dataset: ProbeDataset, recipe: Recipe) -> list[ProbeDataset]:
    """The few-shot draws of a recipe.

    A draw has the same number of texts of each class, at most ``labels_per_class``, in training and
    also in validation (drawn from the validation split): a few-shot user has no more to choose by.
    """
    if dataset.task.kind == "multilabel":
        raise SidelightError(
            "A few-shot table draws the same number of texts of each class, but a text of a "
            "multi-label task can be in several classes. Choose a data set with one label per "
            "text."
        )
    draws: list[ProbeDataset] = []
    for draw in range(recipe.draws):
        random = np.random.default_rng(draw)
        training, validation = (
            split.select(_balanced(split, recipe.labels_per_class, random))
            for split in (dataset.training, dataset.validation)
        )
        draws.append(ProbeDataset.held_out(dataset.reader, training, validation))
    return draws


def _balanced(split: Split, count: int, random: np.random.Generator) -> Int[np.ndarray, " text"]:
    smallest = int(split.examples.label_counts.min())
    if smallest == 0:
        raise SidelightError("A class has no text to draw. Raise --limit.")
    by_class = (np.flatnonzero(split.labels == label) for label in range(len(split.task.labels)))
    drawn = [random.choice(rows, min(count, smallest), replace=False) for rows in by_class]
    return random.permutation(np.concatenate(drawn))


def fit_runs(runs: Sequence[Run], *, max_tokens: int) -> None:
    """Fit the missing runs on the same texts.

    Probes are trained in one call to share each read of the cache. One that diverges is recorded,
    so that it is not trained again, and the others continue. ``max_tokens`` is the length that
    texts were truncated to, for the probes' records.
    """
    missing = [run for run in runs if not (run.is_fitted or run.has_diverged)]
    probes = [(run, run.row) for run in missing if isinstance(run.row, ProbeRow)]
    if probes:
        _train(probes, max_tokens=max_tokens)
    for run in missing:
        if isinstance(run.row, BaselineRow):
            run.fitted = _fit_baseline(run, run.row)


def _train(runs: Sequence[tuple[Run, ProbeRow]], *, max_tokens: int) -> None:
    dataset = runs[0][0].dataset
    start = perf_counter()
    trained = train_mechanisms(
        [(row.spec(), replace(row.training_settings(), seed=run.seed)) for run, row in runs],
        split=dataset.split,
        left_out=dataset.left_out,
        device=dataset.reader.device,
    )
    # Probes that are trained together share the time evenly.
    seconds = (perf_counter() - start) / len(runs)
    options = FitOptions(reads=dataset.training.states.reads, max_tokens=max_tokens)
    for (run, row), one in zip(runs, trained, strict=True):
        if one is None:
            run.folder.mkdir(parents=True, exist_ok=True)
            (run.folder / "diverged").touch()
            continue
        probe = calibrate_probe([one], dataset, name=plain_name(row), options=options).probe
        # The probe comes first: a run counts as fitted once its result is stored.
        save_probe(probe, run.folder / "probe")
        parameters = probe.card.training.parameters
        run.save("result", logits=one.logits, seconds=seconds, parameters=parameters)


def _fit_baseline(run: Run, row: BaselineRow) -> FittedBaseline:
    """Fit the baseline of a run with its seed, and store the result."""
    say(f"Fitting '{row.name}' with seed {run.seed}.")
    start = perf_counter()
    fitted = row.model().fit(run.dataset, seed=run.seed)
    # The first fit counts: a second one, for the test, has the model's files in memory.
    seconds = run.load("result")["seconds"] if run.is_fitted else perf_counter() - start
    logits = fitted.logits(run.dataset.validation)
    run.save("result", logits=logits, seconds=seconds, parameters=fitted.parameters)
    return fitted


@dataclass(frozen=True)
class ScoredRun:
    """One run on the test texts, calibrated."""

    row: Row
    seed: int
    score: float  # on validation texts, which early stopping maximises
    probabilities: Float[np.ndarray, "text output"]
    thresholds: tuple[float, ...]
    seconds: float
    parameters: int


def score_runs(runs: Sequence[Run], split: Split) -> list[ScoredRun]:
    """All runs on the test texts, calibrated and with thresholds by validation texts.

    Runs that were scored on these texts before are read from their files. The artifact of a probe
    holds the same calibration and thresholds.
    """
    assert all(run.is_fitted for run in runs)
    key = digest({"labels": split.examples.content_hash, "states": split.states.key})
    test, scored = f"test-{key[:12]}", list[ScoredRun]()
    with progress("Testing", len(runs), unit="runs") as advance:
        for run in runs:
            if not (run.folder / f"{test}.npz").exists():
                run.save(test, logits=_test_logits(run, split))
            task, labels = run.dataset.task, run.dataset.validation.labels
            result = run.load("result")
            logits = result["logits"]
            calibration = fit_calibration(suggested_calibration(task), logits, labels, task)
            scored.append(
                ScoredRun(
                    run.row,
                    run.seed,
                    score=validation_score(task, logits, labels),
                    probabilities=calibration.apply(run.load(test)["logits"]),
                    thresholds=choose_thresholds(task, calibration.apply(logits), labels),
                    seconds=float(result["seconds"]),
                    parameters=int(result["parameters"]),
                )
            )
            advance(1)
    return scored


def _test_logits(run: Run, split: Split) -> Float[np.ndarray, "text output"]:
    if isinstance(run.row, ProbeRow):
        return cached_logits(load_probe(run.folder / "probe"), split.states)
    fitted, run.fitted = run.fitted or _fit_baseline(run, run.row), None
    return fitted.logits(split)
