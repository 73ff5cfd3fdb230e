"""Makes a table from its recipe: extract, fit, store; then, once, open the test data and measure.

No test text or label is read before every row has its validation results.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sidelight.data import Examples
from sidelight.prompts import Reads
from sidelight.reproduction.data import FirstRows, LabelledData
from sidelight.reproduction.environment import environment, package_versions
from sidelight.reproduction.fitting import Bench
from sidelight.reproduction.judging import Scored
from sidelight.reproduction.opening import opening_note, record_opening
from sidelight.reproduction.recipe import Recipe
from sidelight.reproduction.reporting import report
from sidelight.reproduction.results import digest
from sidelight.reproduction.rounds import Round, make_rounds
from sidelight.reproduction.rows import Found, Rows, build_rows
from sidelight.reproduction.testing import Runs, fit_to_task, judge_rows, score_runs
from sidelight.reproduction.tools import Tools, suggested
from sidelight.reproduction.writing import HOW, HOW_DRAWS, Made, write_origin, write_tables
from sidelight.study import Split, Study, make_split


def reproduce(
    recipe: Recipe, directory: Path, *, text: str, tools: Tools, limit: int | None = None
) -> Made:
    """Makes the table of a recipe; what an earlier, killed run finished is not done again.

    Args:
        recipe: Of any kind but ``latency``.
        directory: Of the table.
        text: The recipe's TOML, for the folder.
        tools: Backbone, data sets, search.
        limit: Uses the first rows of each part only; None uses all.

    Raises:
        SidelightError: The recipe names what does not exist, or the data does not fit it.
    """
    # A misspelt name or a missing package is refused before hours of extraction.
    for row in build_rows(recipe, suggested).baselines:
        row.baseline.require()
    desk = _Desk(recipe, directory, tools, limit)
    data = desk.load(recipe.data)
    desk.write_origin(text, data)
    study = desk.study(data)
    rows = build_rows(recipe, lambda mechanism: desk.search(study, mechanism))
    bench = Bench(directory / "runs", recipe.max_tokens)
    runs = _fit(rows, make_rounds(recipe, study), bench)
    earlier = record_opening(directory, config=_config(recipe, runs), versions=package_versions())
    measured = data if recipe.test_data is None else desk.load(recipe.test_data)
    split = desk.extract(fit_to_task(measured.test, study.task), "Test texts")
    judged = judge_rows(rows, runs, score_runs(runs, split, bench))
    scored = Scored(study.task, split.labels, judged)
    made = Made(
        recipe.title,
        HOW_DRAWS if recipe.kind == "few-shot" else HOW,
        (
            *dict.fromkeys((*data.notes, *measured.notes)),
            opening_note(earlier),
            *_choice_notes(recipe, scored),
        ),
        report(recipe, rows, scored, measured, directory / "plots"),
    )
    write_tables(made, directory)
    return made


def _fit(rows: Rows, rounds: Sequence[Round], bench: Bench) -> Runs:
    """Fits what is missing; all probes of a round in one call."""
    probes = [bench.probe_runs(rows, at) for at in rounds]
    baselines = [bench.baseline_runs(rows, at) for at in rounds]
    for probe_runs, baseline_runs in zip(probes, baselines, strict=True):
        bench.train(probe_runs)
        bench.fit(baseline_runs)
    return Runs(
        tuple(run for runs in probes for run in runs),
        tuple(run for runs in baselines for run in runs),
    )


def _choice_notes(recipe: Recipe, scored: Scored) -> tuple[str, ...]:
    if len(recipe.ours) < 2:
        return ()
    return (
        f"Ours is '{scored.preferred(recipe.ours)}': of {', '.join(recipe.ours)} the row with the "
        "best mean validation score.",
    )


def _config(recipe: Recipe, runs: Runs) -> str:
    """A hash of all runs, and of how they are compared."""
    folders = sorted(run.unit.folder.name for run in runs.all)
    compared = {"metric": recipe.metric, "ours": recipe.ours, "test_data": recipe.test_data}
    return digest({"runs": folders, **compared})


@dataclass(frozen=True)
class _Desk:
    """A recipe with the tools to follow it."""

    recipe: Recipe
    directory: Path
    tools: Tools
    limit: int | None

    def load(self, name: str) -> LabelledData:
        data = self.tools.load(name)
        return data if self.limit is None else FirstRows(data, self.limit)

    def write_origin(self, text: str, data: LabelledData) -> None:
        made_with = environment(self.tools.backbone.fingerprint)
        as_run = {"recipe": asdict(self.recipe), "limit": self.limit}
        write_origin(
            self.directory, recipe=text, environment={**made_with, **as_run}, notes=data.notes
        )

    def study(self, data: LabelledData) -> Study:
        return Study(
            self.tools.backbone,
            self.extract(data.training, "Training texts"),
            self.extract(data.validation, "Validation texts"),
        )

    def extract(self, examples: Examples, title: str) -> Split:
        reads = self.recipe.reads
        return make_split(
            self.tools.backbone,
            examples,
            reads=Reads(reads.side, reads.template),
            max_tokens=self.recipe.max_tokens,
            cache_root=self.tools.cache_root,
            title=title,
        )

    def search(self, study: Study, mechanism: str) -> Found:
        folder = self.directory / "search"
        folder.mkdir(parents=True, exist_ok=True)
        return self.tools.search(study, mechanism, folder / f"{mechanism}.journal")
