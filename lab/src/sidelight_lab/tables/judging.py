"""The test, once every run is fitted: the record of its opening, logits, and probabilities.

Calibration and thresholds are fitted to validation logits, for probes and baselines alike.
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
from sidelight.data.examples import LabelledExamples
from sidelight.errors import SidelightError
from sidelight.probe import Probe
from sidelight.progress import progress
from sidelight.ragged import Ragged
from sidelight.storage import write_json
from sidelight.training.dataset import Split
from sidelight.training.optimisation import validation_score
from sidelight.types import Task
from sidelight_lab.tables.rows import ProbeConfig, Row
from sidelight_lab.tables.runs import Run, digest, fit_baseline

# Texts of one matmul: few enough that any number of columns fits in memory.
_CHUNK = 64


@dataclass(frozen=True)
class JudgedRun:
    """One run on the test texts.

    Attributes:
        score: ``validation_score`` on its validation texts, which early stopping maximises.
        probabilities: Calibrated, of all test texts.
        thresholds: As ``choose_thresholds`` gives them.
        seconds: Time of fitting.
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
        title: As the table shows it.
        is_single_pass: Whether the served LLM's own forward pass gives all that it reads.
        runs: One per seed.
    """

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
        """The same rows on some of the texts."""
        rows = [
            replace(
                row,
                runs=tuple(replace(r, probabilities=r.probabilities[texts]) for r in row.runs),
            )
            for row in self.rows
        ]
        return JudgedTable(self.task, self.labels[texts], tuple(rows))


def record_opening(
    directory: Path, *, config: str, test: str | None, versions: Mapping[str, str]
) -> list[str]:
    """Records in ``test_opened.json`` that test data is opened.

    Call it before test data is read, and again after reading but before measuring. Opening the same
    texts with the same settings is recorded once.

    Args:
        directory: Folder of the table.
        config: Hash of every run that is measured, and of how it is measured.
        test: Hash of the test texts and labels; None before they are read.
        versions: Versions of packages.

    Returns:
        When test data was opened before with other settings or other texts: choices since then have
        seen test data.
    """
    path = directory / "test_opened.json"
    entries: list[dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.exists() else []
    same = [
        place
        for place, entry in enumerate(entries)
        if entry["config"] == config and (test is None or entry.get("test") in (None, test))
    ]
    place = same[0] if same else len(entries)
    if not same:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        entries.append({"time": now, "config": config, "packages": dict(versions)})
    if test is not None:
        entries[place]["test"] = test
    write_json(path, entries)
    return [entry["time"] for entry in entries[:place]]


def fit_to_task(test: LabelledExamples, task: Task) -> LabelledExamples:
    """Test texts with the labels of the training task.

    Two binary tasks may name their labels differently: negative and positive correspond.
    """
    own = test.task
    if own != task and not own.kind == task.kind == "binary":
        raise SidelightError(
            f"The rows were trained on the labels {task.labels}, but the test data has "
            f"{own.labels}. Choose a test set with the same labels."
        )
    return replace(test, task=task)


def judge_runs(rows: Sequence[Row], runs: Sequence[Run], split: Split) -> JudgedTable:
    """All runs on the test texts by row; a row whose runs all diverged is left out.

    Runs that were scored on these texts before are read from their files.
    """
    assert all(run.is_fitted for run in runs)
    test = digest({"labels": split.examples.content_hash, "states": split.states.directory.name})
    missing = [run for run in runs if not run.is_tested(test)]
    _score_probes([run for run in missing if isinstance(run.row, ProbeConfig)], split, test)
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
    """Calibrates (Platt) and chooses thresholds on validation, and applies both to the test.

    The artifact of a probe holds the same numbers.
    """
    result, task, labels = run.load(), run.dataset.task, run.dataset.validation.labels
    calibration = fit_calibration("platt", result.validation_logits, labels, task)
    held_out = calibration.apply(result.validation_logits)
    return JudgedRun(
        seed=run.seed,
        score=validation_score(task, result.validation_logits, labels),
        probabilities=calibration.apply(run.load_test(test)),
        thresholds=choose_thresholds(task, held_out, labels),
        seconds=result.seconds,
        parameters=result.parameters,
    )


def _score_probes(runs: Sequence[Run], split: Split, test: str) -> None:
    if not runs:
        return
    probes = [load_probe(run.probe_folder) for run in runs]
    device = runs[0].dataset.backbone.device
    for run, logits in zip(runs, score_split(probes, split, device=device), strict=True):
        run.save_test(test, logits)


@torch.inference_mode()
def score_split(probes: Sequence[Probe], split: Split, *, device: torch.device) -> list[np.ndarray]:
    """For each probe ``[text, output]`` on cached states, in float32 as when serving.

    The split must be a whole data set, as ``make_split`` gives it.
    """
    assert len(split) == len(split.states.prompts)
    scores = [np.empty((len(split), probe.task.outputs)) for probe in probes]
    mechanisms = [probe.mechanism.to(device).eval() for probe in probes]
    projections = [
        (own.shift.float().to(device)[:, None], own.weight.float().to(device))
        for own in (probe.projection() for probe in probes)
    ]
    with progress("Scoring", len(split), unit="texts") as shown:
        for index in range(len(split.states)):
            shard = split.states.read(index)
            lengths, rows = shard.lengths.split(_CHUNK), shard.rows.split(_CHUNK)
            hidden = shard.hidden.split([int(own.sum()) for own in lengths], 1)
            for cached, counts, texts in zip(hidden, lengths, rows, strict=True):
                states, tokens = cached.to(device).float(), counts.to(device)
                for own, mechanism, (shift, weight) in zip(
                    scores, mechanisms, projections, strict=True
                ):
                    columns = torch.baddbmm(shift, states, weight).transpose(0, 1)  # (T, L, M)
                    logits = mechanism.finish(mechanism.summarise(Ragged(columns, tokens)))
                    own[texts] = logits.double().cpu().numpy()
                shown.advance(len(texts))
    return scores
