"""Tables and pictures of a finished test: all its texts, then each subset.

What a recipe asks for, fetched: data sets, hidden states, rows.

Makes a table from its recipe: extract, fit, store; then, once, open the test data and measure.

No test text passes through the backbone, and no test label is compared with anything, before every
row has its validation results.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sidelight.data.examples import Examples
from sidelight.errors import SidelightError
from sidelight.prompts import Reads
from sidelight.training.cross_fitting import require_same_task
from sidelight.training.dataset import ProbeDataset, Split, make_split
from sidelight.training.objective import score_name
from sidelight_lab.tables.figures import TableFigures, measure_rows
from sidelight_lab.tables.fitting import Bench, Runs, digest
from sidelight_lab.tables.judging import (
    Scored,
    fit_to_task,
    judge_rows,
    opening_note,
    record_opening,
    record_test,
    score_runs,
)
from sidelight_lab.tables.pictures import draw_bars, draw_precision_recall, draw_sweep
from sidelight_lab.tables.recipes import Recipe
from sidelight_lab.tables.rounds import LabelledData, Sampled, make_rounds, transfer_notes
from sidelight_lab.tables.rows import Found, Rows, Tools, build_rows, suggested
from sidelight_lab.tables.writing import (
    HOW,
    HOW_DRAWS,
    Made,
    environment,
    package_versions,
    write_origin,
    write_tables,
)


def report(
    recipe: Recipe, rows: Rows, scored: Scored, data: LabelledData, pictures: Path
) -> tuple[TableFigures, ...]:
    """Measures all rows on the test texts and on each subset, and draws each.

    Args:
        recipe: The table.
        rows: Its rows.
        scored: The rows on all test texts.
        data: Names the subsets.
        pictures: Folder to draw to.
    """
    parts = {"all": np.arange(len(scored.labels)), **data.subsets}
    ours = scored.preferred(recipe.ours)
    return tuple(
        _part(recipe, rows, scored.part(texts), pictures, ours=ours, title=data.title, name=name)
        for name, texts in parts.items()
    )


def _part(
    recipe: Recipe,
    rows: Rows,
    scored: Scored,
    pictures: Path,
    *,
    ours: str,
    title: str,
    name: str,
) -> TableFigures:
    title = f"{title}, {name}"
    figures = measure_rows(
        scored,
        title=title,
        metric=recipe.metric,
        ours=ours,
        are_draws=recipe.kind == "few-shot",
    )
    place = name.replace(" ", "_").replace("/", "_")
    draw_bars(figures, pictures / f"bars_{place}.png")
    # Without a positive text there is no recall to draw.
    if scored.task.kind == "binary" and scored.labels.any():
        path = pictures / f"precision_recall_{place}.png"
        draw_precision_recall(scored, path, ours=ours, title=title)
    if recipe.sweep is not None:
        draw_sweep(
            figures,
            pictures / f"sweep_{place}.png",
            configs={row.name: row for row in rows.probes},
            parameter=recipe.sweep.parameter,
        )
    return figures


@dataclass(frozen=True)
class Desk:
    """A recipe with the tools to follow it.

    Attributes:
        recipe: The table.
        directory: Of the table.
        tools: Backbone, data sets, search.
        limit: Uses so many rows of each part only; None uses all.
    """

    recipe: Recipe
    directory: Path
    tools: Tools
    limit: int | None

    def check(self) -> None:
        """Refuses a misspelt name or a missing package, before hours of extraction."""
        for row in build_rows(self.recipe, suggested).baselines:
            row.baseline.require()

    def load(self, name: str) -> LabelledData:
        """A data set, or a sample of it."""
        data = self.tools.load(name)
        return data if self.limit is None else Sampled(data, self.limit)

    def write_origin(self, text: str, data: LabelledData, folder: Path | None = None) -> None:
        """Says what the table is made from, and with what: in its own folder, or in another."""
        made_with = environment(self.tools.backbone.fingerprint)
        as_run = {"recipe": asdict(self.recipe), "limit": self.limit}
        write_origin(
            folder or self.directory,
            recipe=text,
            environment={**made_with, **as_run},
            notes=data.notes if self.recipe.test_data is None else data.training_notes,
        )

    def dataset(self, data: LabelledData) -> ProbeDataset:
        """Training and validation texts with their hidden states.

        Raises:
            SidelightError: Validation texts of another task, or that cannot choose between rows.
        """
        require_same_task(data.training, data.validation)
        return ProbeDataset(
            self.tools.backbone,
            self.extract(data.training, "Training texts"),
            self.extract(data.validation, "Validation texts"),
        )

    def extract(self, examples: Examples, title: str) -> Split:
        """Texts with their hidden states."""
        reads = self.recipe.reads
        return make_split(
            self.tools.backbone,
            examples,
            reads=Reads(reads.side, reads.template),
            max_tokens=self.recipe.max_tokens,
            cache_root=self.tools.cache_root,
            title=title,
        )

    def rows(self, dataset: ProbeDataset, *, searches: str = "search") -> Rows:
        """The rows, searched on the study where the recipe says so.

        Args:
            study: What to search on.
            searches: Where in the folder the trials are kept; one place for each study.
        """
        folder = self.directory / searches
        return build_rows(self.recipe, lambda mechanism: self._search(dataset, mechanism, folder))

    def _search(self, dataset: ProbeDataset, mechanism: str, folder: Path) -> Found:
        folder.mkdir(parents=True, exist_ok=True)
        return self.tools.search(dataset, mechanism, folder / f"{mechanism}.journal")


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
    dataset = desk.dataset(data)
    rows = desk.rows(dataset)
    bench = Bench(directory / "runs", recipe.max_tokens)
    runs = bench.fit_rounds(rows, make_rounds(recipe, dataset))
    if not runs.all:
        raise SidelightError("Every training diverged: lower the learning rates of the recipe.")
    config, versions = _config(recipe, runs, limit), package_versions()
    record_opening(directory, config=config, versions=versions)
    measured = data if recipe.test_data is None else desk.load(recipe.test_data)
    test = fit_to_task(measured.test, dataset.task)
    earlier = record_test(directory, config=config, test=test.content_hash, versions=versions)
    split = desk.extract(test, "Test texts")
    judged = judge_rows(rows, runs, score_runs(runs, split, bench))
    scored = Scored(dataset.task, split.labels, judged)
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
