"""Makes a table from its recipe: extract, fit, store; then, once, open the test data and measure.

No test text passes through the backbone, and no test label is compared with anything, before every
row has its validation results.
"""

from pathlib import Path

from sidelight.errors import SidelightError
from sidelight.reproduction.data import transfer_notes
from sidelight.reproduction.desk import Desk
from sidelight.reproduction.environment import package_versions
from sidelight.reproduction.fitting import Bench
from sidelight.reproduction.judging import Scored
from sidelight.reproduction.opening import opening_note, record_opening, record_test
from sidelight.reproduction.recipe import Recipe
from sidelight.reproduction.reporting import report
from sidelight.reproduction.results import digest
from sidelight.reproduction.rounds import make_rounds
from sidelight.reproduction.testing import Runs, fit_to_task, judge_rows, score_runs
from sidelight.reproduction.tools import Tools
from sidelight.reproduction.writing import HOW, HOW_DRAWS, Made, write_tables
from sidelight.training import score_name


def reproduce(
    recipe: Recipe, directory: Path, *, text: str, tools: Tools, limit: int | None = None
) -> Made:
    """Makes the table of a recipe; what an earlier, killed run finished is not done again.

    Args:
        recipe: Of any kind but ``latency``.
        directory: Of the table.
        text: The recipe's TOML, for the folder.
        tools: Backbone, data sets, search.
        limit: Uses so many rows of each part only; None uses all.

    Raises:
        SidelightError: The recipe names what does not exist, or the data does not fit it.
    """
    desk = Desk(recipe, directory, tools, limit)
    desk.check()
    data = desk.load(recipe.data)
    desk.write_origin(text, data)
    study = desk.study(data)
    rows = desk.rows(study)
    bench = Bench(directory / "runs", recipe.max_tokens)
    runs = bench.fit_rounds(rows, make_rounds(recipe, study))
    if not runs.all:
        raise SidelightError("Every training diverged: lower the learning rates of the recipe.")
    config, versions = _config(recipe, runs, limit), package_versions()
    record_opening(directory, config=config, versions=versions)
    measured = data if recipe.test_data is None else desk.load(recipe.test_data)
    test = fit_to_task(measured.test, study.task)
    earlier = record_test(directory, config=config, test=test.content_hash, versions=versions)
    split = desk.extract(test, "Test texts")
    judged = judge_rows(rows, runs, score_runs(runs, split, bench))
    scored = Scored(study.task, split.labels, judged)
    made = Made(
        recipe.title,
        HOW_DRAWS if recipe.kind == "few-shot" else HOW,
        (
            *(data.notes if measured is data else transfer_notes(data, measured)),
            opening_note(earlier),
            *_divergence_notes(runs),
            *_choice_notes(recipe, scored),
        ),
        report(recipe, rows, scored, measured, directory / "plots"),
    )
    write_tables(made, directory)
    return made


def _choice_notes(recipe: Recipe, scored: Scored) -> tuple[str, ...]:
    ours = scored.preferred(recipe.ours)
    if not ours:
        return ()
    if len(recipe.ours) < 2:
        return (f"Ours is '{ours}'.",)
    return (
        f"Ours is '{ours}': of {', '.join(recipe.ours)} the row with the best mean validation "
        f"{score_name(scored.task)}.",
    )


def _divergence_notes(runs: Runs) -> tuple[str, ...]:
    return tuple(
        f"Training '{run.unit.row}' with seed {run.unit.seed} diverged (learning rate "
        f"{run.config.settings.learning_rate}): this run is left out."
        for run in runs.diverged
    )


def _config(recipe: Recipe, runs: Runs, limit: int | None) -> str:
    """A hash of all runs, of how they are compared, and of how many test texts are read."""
    folders = sorted(run.unit.folder.name for run in runs.all)
    compared = {"metric": recipe.metric, "ours": recipe.ours, "test_data": recipe.test_data}
    return digest({"runs": folders, "limit": limit, **compared})
