"""Makes a table from its recipe: extract, fit, store; then open the test data once and measure.

Before every row has its validation results, no test text passes through the backbone and no test
label is compared with anything.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from sidelight.data.examples import LabelledExamples
from sidelight.errors import SidelightError
from sidelight.storage import write_json
from sidelight.training.dataset import ProbeDataset
from sidelight.training.optimisation import score_name
from sidelight.types import Task
from sidelight_lab.datasets import DataSet, overlap_notes
from sidelight_lab.environment import package_versions
from sidelight_lab.tables.context import RecipeContext
from sidelight_lab.tables.figures import TableFigures, measure_rows
from sidelight_lab.tables.recipes import ProbeConfig, Recipe, Row, build_rows
from sidelight_lab.tables.runs import (
    JudgedTable,
    Run,
    digest,
    draw_few,
    fit_runs,
    judge_runs,
    plan_runs,
)
from sidelight_lab.tables.writing import HOW, HOW_DRAWS, FinishedTable, draw_pictures


def reproduce(context: RecipeContext) -> FinishedTable:
    """Makes the table of a recipe; what an earlier, killed run finished is not repeated."""
    recipe, directory = context.recipe, context.directory
    context.check()
    data = context.load(recipe.data)
    context.write_origin(directory, data)
    dataset = context.dataset(data)
    rows = build_rows(recipe)
    tried = _fit(context, rows, dataset)
    runs = [run for run in tried if run.is_fitted]
    if not runs:
        raise SidelightError("Every training diverged. Lower the learning rates of the recipe.")

    config = digest(
        {
            "runs": sorted(run.folder.name for run in runs),
            "limit": context.limit,
            "metric": recipe.metric,
            "ours": recipe.ours,
            "test_data": recipe.test_data,
        }
    )
    _record_opening(directory, config=config, test=None)
    tested = data if recipe.test_data is None else context.load(recipe.test_data)
    test = _fit_to_task(context.sample(tested.test), dataset.task)
    earlier = _record_opening(directory, config=config, test=test.content_hash)
    judged = judge_runs(rows, runs, context.extract(test, "Test texts"))

    notes = context.notes(data.notes)
    if tested is not data:
        notes = (
            *(f"{data.title}: {note}" for note in context.notes(data.training_notes)),
            *(f"{tested.title}: {note}" for note in context.notes(tested.test_notes)),
            *overlap_notes(dataset.training.examples, test),
        )
    table = FinishedTable(
        recipe.title,
        HOW_DRAWS if recipe.kind == "few-shot" else HOW,
        (*notes, *_further_notes(recipe, tried, judged, earlier)),
        tuple(_measured(context, rows, judged, tested)),
    )
    table.write(directory)
    return table


def _fit(context: RecipeContext, rows: Sequence[Row], dataset: ProbeDataset) -> list[Run]:
    """All runs of the table: every seed on the whole training split, or each few-shot draw."""
    recipe = context.recipe
    if recipe.kind == "few-shot":
        draws = [(draw, (seed,)) for seed, draw in enumerate(draw_few(dataset, recipe))]
    else:
        draws = [(dataset, tuple(range(recipe.seeds)))]
    folder = context.directory / "runs"
    planned = [plan_runs(rows, draw, seeds, folder) for draw, seeds in draws]
    for runs in planned:
        fit_runs(runs, max_tokens=recipe.max_tokens)
    return [run for runs in planned for run in runs]


def _record_opening(directory: Path, *, config: str, test: str | None) -> list[str]:
    """Records in ``test_opened.json`` that test data is opened, before and after it is read.

    Opening the same texts (``test`` is their hash, None before they are read) with the same
    settings (``config`` is theirs) is recorded once. Returns when test data was opened before with
    others: choices since then have seen test data.
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
        entries.append({"time": now, "config": config, "packages": package_versions()})
    if test is not None:
        entries[place]["test"] = test
    write_json(path, entries)
    return [entry["time"] for entry in entries[:place]]


def _fit_to_task(test: LabelledExamples, task: Task) -> LabelledExamples:
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


def _further_notes(
    recipe: Recipe, tried: Sequence[Run], judged: JudgedTable, earlier: Sequence[str]
) -> Iterator[str]:
    """Notes on earlier uses of the test data, on runs that diverged, and on how ours was chosen."""
    if earlier:
        yield (
            "Test data had been opened before with other settings or other texts "
            f"({', '.join(earlier)}): changes since then were made with test figures in sight."
        )
    else:
        yield (
            "Test data had not been opened with other settings or other texts before, and every "
            "row had its validation results first."
        )
    for run in tried:
        if run.has_diverged and isinstance(run.row, ProbeConfig):
            yield (
                f"Training '{run.row.name}' with seed {run.seed} diverged (learning rate "
                f"{run.row.settings.learning_rate}): this run is left out."
            )
    ours = judged.preferred(recipe.ours)
    if ours and len(recipe.ours) == 1:
        yield f"Ours is '{ours}'."
    elif ours:
        yield (
            f"Ours is '{ours}': among {', '.join(recipe.ours)}, it has the best mean validation "
            f"{score_name(judged.task)}."
        )


def _measured(
    context: RecipeContext, rows: Sequence[Row], judged: JudgedTable, tested: DataSet
) -> Iterator[TableFigures]:
    """All rows measured and drawn on all test texts, then on each subset."""
    recipe = context.recipe
    parameter = recipe.sweep.parameter if recipe.sweep else ""
    ours = judged.preferred(recipe.ours)
    for name, texts in {"all": np.arange(len(judged.labels)), **_subsets(context, tested)}.items():
        part = judged.part(texts)
        figures = measure_rows(
            part,
            title=f"{tested.title}, {name}",
            metric=recipe.metric,
            ours=ours,
            are_draws=recipe.kind == "few-shot",
        )
        ending = f"{name.replace(' ', '_').replace('/', '_')}.png"
        draw_pictures(figures, rows, parameter, context.directory / "plots" / ending)
        yield figures


def _subsets(context: RecipeContext, tested: DataSet) -> Mapping[str, Int[np.ndarray, " row"]]:
    """The positions of each subset's rows among the test texts that are used."""
    if context.limit is None:
        return tested.subsets
    drawn = tested.test.draw(context.limit, seed=0)
    left = {name: np.flatnonzero(np.isin(drawn, rows)) for name, rows in tested.subsets.items()}
    return {name: rows for name, rows in left.items() if len(rows)}
