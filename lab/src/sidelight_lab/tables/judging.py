"""From a run's logits to decided probabilities: calibration and threshold are validation's.

The record of when test data was opened: once, and if more often, for all to see.

The logits of many probes on cached hidden states: the test's forward pass is not run twice.

The test, once every run is fitted: scores what was stored, and judges it.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from sidelight.artifact import load_probe
from sidelight.calibration import choose_thresholds, fit_calibration
from sidelight.data.examples import Examples
from sidelight.errors import SidelightError
from sidelight.probe import Probe
from sidelight.progress import progress
from sidelight.ragged import Ragged
from sidelight.standardisation import Projection
from sidelight.states.cache import Shard
from sidelight.storage import write_json
from sidelight.training.dataset import Split
from sidelight.training.objective import validation_score
from sidelight.types import Task
from sidelight_lab.baselines import BASELINES
from sidelight_lab.tables.fitting import PROBE, Bench, ProbeRun, Run, Runs, digest
from sidelight_lab.tables.rows import BaselineConfig, Rows


@dataclass(frozen=True)
class Judged:
    """One run on the test texts.

    Attributes:
        seed: Of the run.
        score: What early stopping maximised, on its validation texts.
        probabilities: Calibrated, of all test texts.
        thresholds: As ``choose_thresholds`` gives them.
        seconds: That fitting took.
        parameters: Numbers that were fitted and are kept.
    """

    seed: int
    score: float
    probabilities: Float[np.ndarray, "text output"]
    thresholds: tuple[float, ...]
    seconds: float
    parameters: int


@dataclass(frozen=True)
class JudgedRow:
    """A row of the table with all its runs.

    Attributes:
        name: Of the row.
        title: As the table shows it.
        is_single_pass: Whether the served LLM's own forward pass gives all that it reads.
        runs: One per seed.
    """

    name: str
    title: str
    is_single_pass: bool
    runs: tuple[Judged, ...]

    @property
    def chosen(self) -> int:
        """The run with the best validation score; the first of equals."""
        return int(np.argmax([run.score for run in self.runs]))


@dataclass(frozen=True)
class Scored:
    """All rows of a table on the same texts.

    Attributes:
        task: The classes.
        labels: Of the texts.
        rows: In the recipe's order.
    """

    task: Task
    labels: np.ndarray
    rows: tuple[JudgedRow, ...]

    def preferred(self, names: Collection[str]) -> str:
        """Of these rows the one with the best mean validation score; "" where none is there."""
        rows = [row for row in self.rows if row.name in names]
        means = [float(np.mean([run.score for run in row.runs])) for row in rows]
        return rows[int(np.argmax(means))].name if rows else ""

    def part(self, texts: Int[np.ndarray, " part"]) -> "Scored":
        """The same rows on some of the texts."""

        def cut(run: Judged) -> Judged:
            return replace(run, probabilities=run.probabilities[texts])

        rows = tuple(replace(row, runs=tuple(map(cut, row.runs))) for row in self.rows)
        return Scored(self.task, self.labels[texts], rows)


@dataclass(frozen=True)
class RunLogits:
    """What one run said of its validation texts and of the test texts."""

    validation: Float[np.ndarray, "held_out output"]
    validation_labels: np.ndarray
    test: Float[np.ndarray, "text output"]


def judge(task: Task, logits: RunLogits, *, seed: int, seconds: float, parameters: int) -> Judged:
    """Calibrates (Platt) and chooses the threshold on validation, applies both to the test.

    Probes and baselines are treated alike; a probe's artifact holds the same numbers.

    Args:
        task: The classes.
        logits: Of the run.
        seed: Of the run.
        seconds: That fitting took.
        parameters: Numbers that were fitted and are kept.
    """
    labels = logits.validation_labels
    calibration = fit_calibration("platt", logits.validation, labels, task)
    thresholds = choose_thresholds(task, calibration.apply(logits.validation), labels)
    score = validation_score(task, logits.validation, labels)
    probabilities = calibration.apply(logits.test)
    return Judged(seed, score, probabilities, thresholds, seconds, parameters)


OPENED = "test_opened.json"


@dataclass(frozen=True)
class Opening:
    """One look at the test data.

    Attributes:
        time: UTC, ISO 8601.
        config: Hash of every run that was measured, and of how.
        test: Hash of the test texts and labels; None where a kill came before they were read.
    """

    time: str
    config: str
    test: str | None


def record_opening(directory: Path, *, config: str, versions: Mapping[str, str]) -> None:
    """Notes that test data is opened now, before anything of it is read.

    A run with the settings of an earlier opening is not noted: ``record_test`` is, where it reads
    other texts.

    Args:
        directory: Of the table.
        config: Hash of every run that is measured, and of how.
        versions: Of packages.
    """
    entries = _entries(directory)
    if config not in [entry["config"] for entry in entries]:
        _add(directory, entries, {"config": config, "packages": dict(versions)})


def record_test(
    directory: Path, *, config: str, test: str, versions: Mapping[str, str]
) -> tuple[Opening, ...]:
    """Notes which texts were opened, once they are read and before they are measured on.

    Args:
        directory: Of the table.
        config: As ``record_opening`` noted it.
        test: Hash of the test texts and labels.
        versions: Of packages.

    Returns:
        Earlier openings with other settings or other texts: rows chosen after one of them have seen
        test data.
    """
    entries = _entries(directory)
    open_ones = [one for one in entries if one["config"] == config and one.get("test") is None]
    if (config, test) not in [(entry["config"], entry.get("test")) for entry in entries]:
        if open_ones:
            open_ones[0]["test"] = test
            write_json(directory / OPENED, entries)
        else:
            _add(directory, entries, {"config": config, "test": test, "packages": dict(versions)})
    known = [Opening(one["time"], one["config"], one.get("test")) for one in entries]
    return tuple(known[: [(one.config, one.test) for one in known].index((config, test))])


def opening_note(earlier: tuple[Opening, ...]) -> str:
    """What the table says of it."""
    if not earlier:
        return (
            "Test data had not been opened with other settings or other texts before, and every "
            "row had its validation results first."
        )
    times = ", ".join(one.time for one in earlier)
    return (
        f"Test data had been opened before with other settings or other texts ({times}): what was "
        "changed since was changed with test figures in sight."
    )


def _entries(directory: Path) -> list[dict[str, Any]]:
    path = directory / OPENED
    return json.loads(path.read_text("utf-8")) if path.exists() else []


def _add(directory: Path, entries: list[dict[str, Any]], entry: Mapping[str, Any]) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entries.append({"time": now, **entry})
    write_json(directory / OPENED, entries)


# Texts of one matmul: what is projected of them fits memory with any number of columns.
_CHUNK = 64


@torch.inference_mode()
def score_split(probes: Sequence[Probe], split: Split, *, device: torch.device) -> list[np.ndarray]:
    """For each probe ``[text, output]``, in float32 as when serving.

    Args:
        probes: Of the split's backbone.
        split: A whole data set, as ``make_split`` gives it.
        device: Where to compute.
    """
    assert len(split) == len(split.states.prompts)
    logits = [np.empty((len(split), probe.task.outputs)) for probe in probes]
    projections = [probe.projection() for probe in probes]
    with progress("Scoring", len(split), unit="texts") as shown:
        for index in range(len(split.states)):
            for chunk in _chunks(split.states.read(index)):
                states = _on(chunk, device)
                for own, probe, projection in zip(logits, probes, projections, strict=True):
                    own[chunk.rows] = _logits(probe, projection, states)
                shown.advance(len(chunk.rows))
    return logits


def _logits(probe: Probe, projection: Projection, states: Shard) -> np.ndarray:
    device = states.hidden.device
    columns = torch.baddbmm(
        projection.shift.float().to(device)[:, None],
        states.hidden,
        projection.weight.float().to(device),
    )  # (L, T, M)
    mechanism = probe.mechanism.to(device).eval()
    state = mechanism.summarise(Ragged(columns.transpose(0, 1), states.lengths))
    return mechanism.finish(state).double().cpu().numpy()


def _chunks(shard: Shard) -> list[Shard]:
    lengths, rows = shard.lengths.split(_CHUNK), shard.rows.split(_CHUNK)
    hidden = shard.hidden.split([int(own.sum()) for own in lengths], 1)
    return [Shard(*parts) for parts in zip(hidden, lengths, rows, strict=True)]


def _on(shard: Shard, device: torch.device) -> Shard:
    return Shard(shard.hidden.to(device).float(), shard.lengths.to(device), shard.rows)


def fit_to_task(test: Examples, task: Task) -> Examples:
    """Test texts with the labels of the training task.

    Two binary tasks are the same question under other names: negative and positive correspond.

    Raises:
        SidelightError: The tasks differ otherwise.
    """
    own = test.task
    if own != task and not (own is not None and own.kind == task.kind == "binary"):
        raise SidelightError(
            f"Trained on the labels {task.labels}, but the test data has {own and own.labels}. "
            "Choose a test set with the same labels."
        )
    return replace(test, task=task)


def score_runs(runs: Runs, split: Split, bench: Bench) -> list[Judged]:
    """The runs on the test texts, those that were scored before out of their files.

    Args:
        runs: All of them fitted.
        split: The test.
        bench: Where they were fitted.
    """
    assert all(run.unit.is_fitted for run in runs.all)
    test = _hash(split)
    _score_probes([run for run in runs.probes if not run.unit.is_tested(test)], split, test)
    fits = [run for run in runs.baselines if not run.unit.is_tested(test)]
    if fits:
        with progress("Baselines on the test", len(fits), unit="fits") as shown:
            for run in fits:
                run.unit.save_test(test, bench.rival(run).logits(split))
                shown.advance(1)
    return [_judge(run, test) for run in runs.all]


def judge_rows(rows: Rows, runs: Runs, judged: Sequence[Judged]) -> tuple[JudgedRow, ...]:
    """The runs gathered by row, in the order of the table; a row is left out if all diverged."""
    by_row: dict[str, list[Judged]] = {}
    for run, one in zip(runs.all, judged, strict=True):
        by_row.setdefault(run.unit.row, []).append(one)
    probes = [(row.name, row.name, True) for row in rows.probes]
    baselines = [(row.name, _title(row), row.baseline.is_single_pass) for row in rows.baselines]
    return tuple(
        JudgedRow(name, title, is_single_pass, tuple(by_row[name]))
        for name, title, is_single_pass in (*probes, *baselines)
        if name in by_row
    )


def _score_probes(runs: Sequence[ProbeRun], split: Split, test: str) -> None:
    if not runs:
        return
    probes = [load_probe(run.unit.folder / PROBE) for run in runs]
    device = runs[0].dataset.backbone.device
    for run, logits in zip(runs, score_split(probes, split, device=device), strict=True):
        run.unit.save_test(test, logits)


def _judge(run: Run, test: str) -> Judged:
    result = run.unit.load()
    validation = run.dataset.validation
    logits = RunLogits(result.validation_logits, validation.labels, run.unit.load_test(test))
    return judge(
        validation.task,
        logits,
        seed=run.unit.seed,
        seconds=result.seconds,
        parameters=result.parameters,
    )


def _hash(split: Split) -> str:
    return digest({"labels": split.examples.content_hash, "states": split.states.directory.name})


def _title(row: BaselineConfig) -> str:
    """The baseline's own title, unless the recipe gave the row another name than the key."""
    return row.baseline.title if BASELINES.get(row.name) is type(row.baseline) else row.name
