"""Makes a table from its recipe: extract, fit, store; then open the test data once and measure.

Before every row has its validation results, no test text passes through the backbone and no test
label is compared with anything.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from sidelight.errors import SidelightError
from sidelight.training.dataset import ProbeDataset
from sidelight.training.optimisation import score_name
from sidelight_lab.datasets import DataSet, overlap_notes
from sidelight_lab.tables.context import RecipeContext, package_versions
from sidelight_lab.tables.figures import TableFigures, measure_rows
from sidelight_lab.tables.judging import JudgedTable, fit_to_task, judge_runs, record_opening
from sidelight_lab.tables.pictures import draw_bars, draw_precision_recall, draw_sweep
from sidelight_lab.tables.recipes import Recipe
from sidelight_lab.tables.rows import ProbeConfig, Row
from sidelight_lab.tables.runs import Run, digest, draw_few, fit_runs, plan_runs
from sidelight_lab.tables.writing import HOW, HOW_DRAWS, FinishedTable


def reproduce(context: RecipeContext) -> FinishedTable:
    """Makes the table of a recipe; what an earlier, killed run finished is not repeated."""
    recipe, directory = context.recipe, context.directory
    context.check()
    data = context.load(recipe.data)
    context.write_origin(data, directory)
    dataset = context.dataset(data)
    rows = context.rows(dataset)
    tried = _fit(context, rows, dataset)
    runs = [run for run in tried if run.is_fitted]
    if not runs:
        raise SidelightError("Every training diverged. Lower the learning rates of the recipe.")

    config, versions = _hash(recipe, runs, context.limit), package_versions()
    record_opening(directory, config=config, test=None, versions=versions)
    tested = data if recipe.test_data is None else context.load(recipe.test_data)
    test = fit_to_task(context.sample(tested.test), dataset.task)
    earlier = record_opening(directory, config=config, test=test.content_hash, versions=versions)
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


def _hash(recipe: Recipe, runs: Sequence[Run], limit: int | None) -> str:
    """A hash of all runs, of how they are compared, and of how many test texts are read."""
    return digest(
        {
            "runs": sorted(run.folder.name for run in runs),
            "limit": limit,
            "metric": recipe.metric,
            "ours": recipe.ours,
            "test_data": recipe.test_data,
        }
    )


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
    recipe, plots = context.recipe, context.directory / "plots"
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
        draw_bars(figures, plots / f"bars_{ending}")
        # Without a positive text there is no recall to draw.
        if part.task.kind == "binary" and part.labels.any():
            path = plots / f"precision_recall_{ending}"
            draw_precision_recall(part, path, ours=ours, title=figures.title)
        if recipe.sweep is not None:
            probes = {row.name: row for row in rows if isinstance(row, ProbeConfig)}
            path = plots / f"sweep_{ending}"
            draw_sweep(figures, path, probes=probes, parameter=recipe.sweep.parameter)
        yield figures


def _subsets(context: RecipeContext, tested: DataSet) -> Mapping[str, Int[np.ndarray, " row"]]:
    """The positions of each subset's rows among the test texts that are used."""
    if context.limit is None:
        return tested.subsets
    drawn = tested.test.draw(context.limit, seed=0)
    left = {name: np.flatnonzero(np.isin(drawn, rows)) for name, rows in tested.subsets.items()}
    return {name: rows for name, rows in left.items() if len(rows)}
