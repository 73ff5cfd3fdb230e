"""The runs of a table: each row with each seed, fitted and stored at once, and judged at the end.

Up to ``judge_runs``, only training and validation texts are seen. Calibration and thresholds are
fitted to validation logits, for probes and baselines alike.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sidelight.artifact import load_probe, save_probe
from sidelight.calibration import fit_calibration, suggested_calibration
from sidelight.errors import SidelightError
from sidelight.probe import Probe
from sidelight.progress import progress
from sidelight.states.extraction import shard_logits
from sidelight.storage import replacing
from sidelight.thresholds import choose_thresholds
from sidelight.training.dataset import ProbeDataset, Split
from sidelight.training.fit import calibrate_probe
from sidelight.training.loop import train_mechanisms
from sidelight.training.optimisation import validation_score
from sidelight.training.settings import FitOptions, Job
from sidelight.types import Task
from sidelight_lab.baselines.base import FittedBaseline
from sidelight_lab.tables.recipes import BaselineConfig, ProbeConfig, Recipe, Row


@dataclass
class Run:
    """One row with one seed.

    Attributes:
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
        return self._result.exists()

    @property
    def has_diverged(self) -> bool:
        return (self.folder / "diverged").exists()

    @property
    def probe_folder(self) -> Path:
        return self.folder / "probe"

    def save(
        self, validation_logits: Float[np.ndarray, "text output"], seconds: float, parameters: int
    ) -> None:
        """Stores the result completely or, if killed, not at all.

        Args:
            validation_logits: Before calibration.
            seconds: Of fitting; probes that are trained together share it evenly.
            parameters: Fitted numbers that prediction needs.
        """
        _save_arrays(self._result, logits=validation_logits, seconds=seconds, parameters=parameters)

    def load(self) -> tuple[Float[np.ndarray, "text output"], float, int]:
        with np.load(self._result, allow_pickle=False) as stored:
            return stored["logits"], float(stored["seconds"]), int(stored["parameters"])

    def is_tested(self, test: str) -> bool:
        """Whether logits of the test texts with this hash are stored."""
        return self._test(test).exists()

    def save_test(self, test: str, logits: Float[np.ndarray, "text output"]) -> None:
        _save_arrays(self._test(test), logits=logits)

    def load_test(self, test: str) -> Float[np.ndarray, "text output"]:
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
    """A hash of JSON-ready values that does not depend on the order of keys."""
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
        "states": [split.states.key for split in splits],
    }
    runs: list[Run] = []
    for row in rows:
        name = plain_name(row)
        for seed in seeds[: row.seeds]:
            key = digest({"row": row.name, "seed": seed, **row.describe(), **texts})
            runs.append(Run(row, seed, dataset, folder / f"{name}-seed{seed}-{key[:12]}"))
    return runs


def plain_name(row: Row) -> str:
    """The row's name in letters that folders and probes may have."""
    return re.sub(r"[^a-z0-9.]+", "-", row.name.lower()).strip("-")[:64]


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
        probe = calibrate_probe(one, dataset, name=plain_name(row), options=options).probe
        # The probe comes first: a run counts as fitted once its result is stored.
        save_probe(probe, run.probe_folder)
        run.save(one.logits, seconds, probe.record["parameters"])


def fit_baseline(run: Run) -> FittedBaseline:
    """Fits the baseline of a run with its seed, and stores the result."""
    assert isinstance(run.row, BaselineConfig)
    start = perf_counter()
    fitted = run.row.baseline.fit(run.dataset, seed=run.seed)
    # The first fit counts: a second one, for the test, has the model's files in memory.
    seconds = run.load()[1] if run.is_fitted else perf_counter() - start
    run.save(fitted.logits(run.dataset.validation), seconds, fitted.parameters)
    return fitted


@dataclass(frozen=True)
class JudgedRun:
    """One run on the test texts, calibrated."""

    seed: int
    score: float  # on validation texts, which early stopping maximises
    probabilities: Float[np.ndarray, "text output"]
    thresholds: tuple[float, ...]
    seconds: float
    parameters: int


@dataclass(frozen=True)
class JudgedRow:
    """A row of the table with its run for each seed."""

    name: str
    title: str
    is_single_pass: bool
    runs: tuple[JudgedRun, ...]

    @property
    def chosen(self) -> int:
        """The run with the best validation score; of equal runs, the first."""
        return int(np.argmax([run.score for run in self.runs]))


@dataclass(frozen=True)
class JudgedTable:
    """All rows of a table on the same texts, in the recipe's order."""

    task: Task
    labels: np.ndarray
    rows: tuple[JudgedRow, ...]

    def preferred(self, names: Collection[str]) -> str:
        """Whichever of these rows has the best mean validation score; "" if none is there."""
        rows = [row for row in self.rows if row.name in names]
        means = [float(np.mean([run.score for run in row.runs])) for row in rows]
        return rows[int(np.argmax(means))].name if rows else ""

    def part(self, texts: Int[np.ndarray, " part"]) -> "JudgedTable":
        rows = [
            replace(
                row,
                runs=tuple(replace(r, probabilities=r.probabilities[texts]) for r in row.runs),
            )
            for row in self.rows
        ]
        return JudgedTable(self.task, self.labels[texts], tuple(rows))


def judge_runs(rows: Sequence[Row], runs: Sequence[Run], split: Split) -> JudgedTable:
    """All runs on the test texts by row; a row whose runs all diverged is left out.

    Runs that were scored on these texts before are read from their files.
    """
    assert all(run.is_fitted for run in runs)
    test = digest({"labels": split.examples.content_hash, "states": split.states.key})
    missing = [run for run in runs if not run.is_tested(test)]
    trained = [run for run in missing if isinstance(run.row, ProbeConfig)]
    if trained:
        probes = [load_probe(run.probe_folder) for run in trained]
        for run, logits in zip(trained, score_split(probes, split), strict=True):
            run.save_test(test, logits)
    fits = [run for run in missing if not isinstance(run.row, ProbeConfig)]
    if fits:
        with progress("Baselines on the test", len(fits), unit="fits") as shown:
            for run in fits:
                fitted, run.fitted = run.fitted or fit_baseline(run), None
                run.save_test(test, fitted.logits(split))
                shown.advance(1)
    judged: dict[str, list[JudgedRun]] = {}
    for run in runs:
        judged.setdefault(run.row.name, []).append(_judge(run, test))
    found = [
        JudgedRow(row.name, row.title, row.is_single_pass, tuple(judged[row.name]))
        for row in rows
        if row.name in judged
    ]
    return JudgedTable(runs[0].dataset.task, split.labels, tuple(found))


def _judge(run: Run, test: str) -> JudgedRun:
    """Calibrates and chooses thresholds on validation, and applies both to the test.

    The artifact of a probe holds the same numbers.
    """
    task, labels = run.dataset.task, run.dataset.validation.labels
    logits, seconds, parameters = run.load()
    calibration = fit_calibration(suggested_calibration(task), logits, labels, task)
    return JudgedRun(
        seed=run.seed,
        score=validation_score(task, logits, labels),
        probabilities=calibration.apply(run.load_test(test)),
        thresholds=choose_thresholds(task, calibration.apply(logits), labels),
        seconds=seconds,
        parameters=parameters,
    )


def score_split(probes: Sequence[Probe], split: Split) -> list[np.ndarray]:
    """For each probe ``[text, output]`` on cached states, in float32 as when serving.

    The split must be a whole data set, as ``make_split`` gives it.
    """
    assert len(split) == len(split.states.lengths)
    scores = [np.empty((len(split), probe.task.outputs)) for probe in probes]
    with progress("Scoring", len(split), unit="texts") as shown:
        for index in range(len(split.states)):
            shard = split.states.read(index)
            for own, probe in zip(scores, probes, strict=True):
                own[shard.rows] = shard_logits(probe, shard)
            shown.advance(len(shard.rows))
    return scores
