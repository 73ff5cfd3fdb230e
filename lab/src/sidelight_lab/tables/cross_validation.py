"""Compares rows on training texts alone: each fold is scored by what the other folds taught.

For choosing. The validation split and the test stay closed; a fold takes the part of validation, so
early stopping and settings are chosen on the texts that are scored, for every row alike.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sidelight.errors import SidelightError
from sidelight.storage import write_json, write_text
from sidelight.training.cross_fitting import class_counts, require_same_task
from sidelight.training.dataset import ProbeDataset, Split
from sidelight.training.objective import score_name, validation_score
from sidelight_lab.tables.fitting import Bench, Runs
from sidelight_lab.tables.recipes import Recipe
from sidelight_lab.tables.rounds import Round
from sidelight_lab.tables.rows import Tools
from sidelight_lab.tables.runner import Desk
from sidelight_lab.tables.writing import cell


@dataclass(frozen=True)
class RowScores:
    """One row on left-out texts.

    Attributes:
        row: Its name.
        score: What is compared; see ``validation_score``.
        folds: Of each fold, the mean over seeds; None where a training diverged.
    """

    row: str
    score: str
    folds: tuple[float | None, ...]

    @property
    def mean(self) -> float | None:
        """Over folds; None where a training diverged."""
        scores = [score for score in self.folds if score is not None]
        return float(np.mean(scores)) if len(scores) == len(self.folds) else None


def cross_validate(
    recipe: Recipe,
    directory: Path,
    *,
    text: str,
    tools: Tools,
    folds: int,
    limit: int | None = None,
) -> list[RowScores]:
    """Each row's scores, the best row first; writes ``cross_validation.md`` and ``.json``.

    Args:
        recipe: A comparison; its seeds are trained in every fold.
        directory: Of the table; what an earlier, killed run finished is not done again.
        text: The recipe's TOML, for the folder.
        tools: Backbone, data sets, search.
        folds: Two or more.
        limit: Uses so many rows only; None uses all.

    Raises:
        SidelightError: Another kind of table, or a class with fewer distinct texts than folds.
    """
    if recipe.kind != "comparison":
        raise SidelightError(
            f"Only a comparison can be cross-validated, but '{recipe.title}' is of kind "
            f"'{recipe.kind}'. Leave --folds out."
        )
    desk = Desk(recipe, directory, tools, limit)
    desk.check()
    data = desk.load(recipe.data)
    # Beside the table's own origin, which another command may have written.
    desk.write_origin(text, data, directory / "cross_validation")
    split = desk.extract(data.training, "Training texts")
    whole = ProbeDataset(tools.backbone, split, split)
    bench = Bench(directory / "runs", recipe.max_tokens)
    scores: dict[str, list[float | None]] = {}
    for number, dataset in enumerate(_folds(whole, folds), start=1):
        rows = desk.rows(dataset, searches=f"search/{folds}_folds_{number}")
        made = bench.fit_rounds(rows, [Round(dataset, tuple(range(recipe.seeds)))])
        bench.rivals.clear()
        for row, score in _scores(made).items():
            scores.setdefault(row, []).append(score)
    found = [RowScores(row, score_name(whole.task), tuple(own)) for row, own in scores.items()]
    found.sort(key=lambda one: -1.0 if one.mean is None else one.mean, reverse=True)
    some = "" if limit is None else f", at most {limit} training rows"
    title = f"{recipe.title}, {folds}-fold cross-validation{some}"
    _write(found, directory, title=title)
    return found


def _folds(whole: ProbeDataset, count: int) -> list[ProbeDataset]:
    """Each fold as the validation part of the others; equal texts are in one fold."""
    rows = np.arange(len(whole.training))
    studies: list[ProbeDataset] = []
    for fold in whole.training.examples.folds(count, seed=0):
        rest, held_out = (
            whole.training.select(np.setdiff1d(rows, fold)),
            whole.training.select(fold),
        )
        if _lacks_a_class(rest) or _lacks_a_class(held_out):
            raise SidelightError(
                f"A class has fewer distinct texts than {count} folds. Ask for fewer (--folds)."
            )
        require_same_task(rest.examples, held_out.examples)
        studies.append(ProbeDataset(whole.backbone, rest, held_out))
    return studies


def _lacks_a_class(split: Split) -> bool:
    return split.task.kind != "multilabel" and 0 in class_counts(split.task, split.labels)


def _scores(made: Runs) -> dict[str, float | None]:
    by_row: dict[str, list[float]] = {}
    for run in made.all:
        logits, held_out = run.unit.load().validation_logits, run.dataset.validation
        score = validation_score(held_out.task, logits, held_out.labels)
        by_row.setdefault(run.unit.row, []).append(score)
    means = {row: float(np.mean(own)) for row, own in by_row.items()}
    return {**means, **dict.fromkeys(run.unit.row for run in made.diverged)}


def _write(found: Sequence[RowScores], directory: Path, *, title: str) -> None:
    lines = [
        f"| {cell(one.row)} | {shown(one.mean)} | {', '.join(map(shown, one.folds))} |"
        for one in found
    ]
    table = "\n".join([f"| row | {found[0].score}, mean | folds |", "|---|---|---|", *lines])
    write_text(directory / "cross_validation.md", f"# {title}\n\n{table}\n")
    write_json(directory / "cross_validation.json", [asdict(one) for one in found])


def shown(score: float | None) -> str:
    """A score for people."""
    return "diverged" if score is None else f"{score:.4f}"
