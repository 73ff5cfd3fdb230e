"""The test, once every run is fitted: scores what was stored, and judges it."""

from collections.abc import Sequence
from dataclasses import replace

from sidelight.artifact import load_probe
from sidelight.baselines import BASELINES
from sidelight.data import Examples
from sidelight.errors import SidelightError
from sidelight.progress import progress
from sidelight.reproduction.fitting import Bench, ProbeRun, Run, Runs
from sidelight.reproduction.judging import Judged, JudgedRow, RunLogits, judge
from sidelight.reproduction.results import PROBE, digest
from sidelight.reproduction.rows import BaselineConfig, Rows
from sidelight.reproduction.scoring import score_split
from sidelight.study import Split
from sidelight.types import Task


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
    device = runs[0].study.backbone.device
    for run, logits in zip(runs, score_split(probes, split, device=device), strict=True):
        run.unit.save_test(test, logits)


def _judge(run: Run, test: str) -> Judged:
    result = run.unit.load()
    validation = run.study.validation
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
