"""Reproduction of a table from its recipe: extract, fit, store; then read the test data once and
measure.

Until every row has its validation results, no test text passes through the backbone and no test
label is used.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from sidelight.data.examples import LabelledExamples
from sidelight.engines.transformers.backbone import TransformersBackbone
from sidelight.errors import SidelightError
from sidelight.storage import write_json, write_text
from sidelight.training.dataset import Split, make_split
from sidelight.training.preparing import ProbeDataset
from sidelight.training.settings import FitOptions
from sidelight.training.validation import require_same_task
from sidelight.types import Task
from sidelight_lab.datasets import DataSet, overlap_notes
from sidelight_lab.environment import environment, package_versions
from sidelight_lab.search import score_name
from sidelight_lab.tables.metrics import TableMetrics, measure_rows, preferred_row
from sidelight_lab.tables.recipes import ProbeRow, Recipe, Row
from sidelight_lab.tables.runs import Run, digest, draw_few, fit_runs, plan_runs, score_runs
from sidelight_lab.tables.writing import HOW, HOW_DRAWS, FinishedTable


@dataclass(frozen=True)
class RecipeContext:
    """A recipe and everything needed to run it.

    Attributes:
        text: The TOML of the recipe.
        directory: Folder of the table.
        load: Loads a data set by name.
        limit: Maximum rows to use of each split; None uses all.
    """

    recipe: Recipe
    text: str
    directory: Path
    backbone: TransformersBackbone
    load: Callable[[str], DataSet]
    cache_root: Path
    limit: int | None = None

    def sample(self, examples: LabelledExamples) -> LabelledExamples:
        """The rows of a split to use: all, or a sample of ``limit`` rows."""
        if self.limit is None:
            return examples
        return examples.select(examples.draw(self.limit, seed=0))

    def notes(self, data: DataSet) -> tuple[str, ...]:
        """The notes on the data, and one on the limit if there is any."""
        if self.limit is None:
            return data.notes
        return (
            *data.notes,
            f"At most {self.limit} rows of each split were used, drawn at random and stratified "
            "by class.",
        )

    def dataset(self, data: DataSet) -> ProbeDataset:
        """Training and validation texts with their hidden states."""
        training, validation = self.sample(data.training), self.sample(data.validation)
        require_same_task(training, validation)
        return ProbeDataset.held_out(
            self.backbone,
            self.extract(training, "Training texts"),
            self.extract(validation, "Validation texts"),
        )

    def extract(self, examples: LabelledExamples, title: str) -> Split:
        return make_split(
            self.backbone,
            examples,
            FitOptions(
                reads=self.recipe.reads,
                max_tokens=self.recipe.max_tokens,
                cache_root=self.cache_root,
                keep_cache=True,
            ),
            title=title,
        )

    def write_origin(self, data: DataSet) -> None:
        """Record the recipe, the environment and the data, before the work begins."""
        origin = {
            **environment(),
            "backbone": asdict(self.backbone.fingerprint),
            "recipe": asdict(self.recipe),
            "limit": self.limit,
        }
        write_text(self.directory / "recipe.toml", self.text)
        write_json(self.directory / "environment.json", origin)
        lines = (f"- {note}\n" for note in self.notes(data))
        write_text(self.directory / "data.md", "".join(lines))


def reproduce(context: RecipeContext) -> FinishedTable:
    """Make the table of a recipe; finished parts of an interrupted run are not repeated."""
    recipe, directory = context.recipe, context.directory
    rows = recipe.rows()
    for row in rows:
        # A misspelt name or a missing package is refused before hours of extraction.
        row.describe()
    data = context.load(recipe.data)
    context.write_origin(data)
    dataset = context.dataset(data)
    tried = _fit(context, rows, dataset)
    runs = [run for run in tried if run.is_fitted]
    if not runs:
        raise SidelightError("Every training run diverged. Lower the learning rates in the recipe.")

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
    results = score_runs(runs, context.extract(test, "Test texts"))
    # A row whose runs all diverged is left out.
    scored = {row.name: [run for run in results if run.row.name == row.name] for row in rows}
    scored = {name: runs for name, runs in scored.items() if runs}
    ours = preferred_row(scored, recipe.ours)
    tables: list[TableMetrics] = []
    for name, texts in {"all": np.arange(len(test)), **_subsets(context, tested)}.items():
        tables.append(
            measure_rows(
                dataset.task,
                scored,
                test.labels,
                texts,
                title=f"{tested.title}, {name}",
                metric=recipe.metric,
                ours=ours,
                are_draws=recipe.kind == "few-shot",
            )
        )
    notes = context.notes(data)
    if tested is not data:
        notes = (
            *(
                f"{source.title}: {note}"
                for source in (data, tested)
                for note in context.notes(source)
            ),
            *overlap_notes(dataset.training.examples, test),
        )
    table = FinishedTable(
        recipe.title,
        HOW_DRAWS if recipe.kind == "few-shot" else HOW,
        (*notes, *_further_notes(recipe, tried, ours, earlier)),
        tuple(tables),
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
    """Record in ``test_opened.json`` that test data is opened, before and after it is read.

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
    test_task = test.task
    if test_task != task and not test_task.kind == task.kind == "binary":
        raise SidelightError(
            f"The rows were trained on the labels {task.labels}, but the test data has "
            f"{test_task.labels}. Choose a test set with the same labels."
        )
    return replace(test, task=task)


def _further_notes(
    recipe: Recipe, tried: Sequence[Run], ours: str, earlier: Sequence[str]
) -> Iterator[str]:
    """Notes on earlier uses of the test data, on runs that diverged, and on how ours was chosen."""
    if earlier:
        yield (
            "The test data had been read before with other settings or other texts "
            f"({', '.join(earlier)}), so later changes were made with knowledge of the test "
            "results."
        )
    else:
        yield (
            "The test data had not been read before with other settings or other texts, and "
            "every row had its validation results first."
        )
    for run in tried:
        if run.has_diverged and isinstance(run.row, ProbeRow):
            rate = run.row.training_settings().learning_rate
            yield (
                f"Training '{run.row.name}' with seed {run.seed} diverged (learning rate {rate}) "
                "and is left out."
            )
    if ours and len(recipe.ours) == 1:
        yield f"Ours is '{ours}'."
    elif ours:
        yield (
            f"Ours is '{ours}': among {', '.join(recipe.ours)}, it has the best mean validation "
            f"{score_name(tried[0].dataset.task)}."
        )


def _subsets(context: RecipeContext, tested: DataSet) -> Mapping[str, Int[np.ndarray, " row"]]:
    """The positions of each subset's rows among the test texts that are used."""
    if context.limit is None:
        return tested.subsets
    drawn = tested.test.draw(context.limit, seed=0)
    left = {name: np.flatnonzero(np.isin(drawn, rows)) for name, rows in tested.subsets.items()}
    return {name: rows for name, rows in left.items() if len(rows)}
