"""Compares rows on training texts alone: each fold is scored by what the other folds taught.

For choosing. The validation split and the test stay closed; a fold takes the part of validation, so
early stopping and settings are chosen on the texts that are scored, for every row alike.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from sklearn.model_selection import KFold, StratifiedKFold

from sidelight.errors import SidelightError
from sidelight.reproduction.desk import Desk
from sidelight.reproduction.fitting import Bench, Run
from sidelight.reproduction.opening import write_json, write_text
from sidelight.reproduction.recipe import Recipe
from sidelight.reproduction.rounds import Round
from sidelight.reproduction.tools import Tools
from sidelight.study import Study
from sidelight.training import validation_score


@dataclass(frozen=True)
class RowScores:
    """One row on left-out texts.

    Attributes:
        row: Its name.
        folds: Of each fold the score, the mean over seeds: average precision, or accuracy for a
            multi-class task.
    """

    row: str
    folds: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over folds."""
        return float(np.mean(self.folds))


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
        limit: Uses the first rows only; None uses all.

    Raises:
        SidelightError: Another kind of table, or a class with fewer texts than folds.
    """
    if recipe.kind != "comparison":
        raise SidelightError(
            f"Only a comparison can be cross-validated, but '{recipe.title}' is of kind "
            f"'{recipe.kind}'. Leave --folds out."
        )
    desk = Desk(recipe, directory, tools, limit)
    desk.check()
    data = desk.load(recipe.data)
    desk.write_origin(text, data)
    split = desk.extract(data.training, "Training texts")
    whole = Study(tools.backbone, split, split)
    bench = Bench(directory / "runs", recipe.max_tokens)
    scores: dict[str, list[float]] = {}
    for study in _folds(whole, folds):
        made = bench.fit_rounds(desk.rows(study), [Round(study, tuple(range(recipe.seeds)))])
        bench.rivals.clear()
        for row, score in _scores(made.all).items():
            scores.setdefault(row, []).append(score)
    found = [RowScores(row, tuple(own)) for row, own in scores.items()]
    found.sort(key=lambda one: -one.mean)
    _write(found, directory, title=f"{recipe.title}, {folds}-fold cross-validation")
    return found


def _folds(whole: Study, count: int) -> list[Study]:
    labels = whole.training.labels
    is_multilabel = whole.task.kind == "multilabel"
    if not is_multilabel and int(np.bincount(labels).min()) < count:
        raise SidelightError(
            f"A class has fewer texts than {count} folds. Ask for fewer (--folds)."
        )
    splitter = KFold if is_multilabel else StratifiedKFold
    parts = splitter(count, shuffle=True, random_state=0).split(labels, labels)
    return [
        Study(whole.backbone, whole.training.select(rest), whole.training.select(fold))
        for rest, fold in parts
    ]


def _scores(runs: Sequence[Run]) -> dict[str, float]:
    by_row: dict[str, list[float]] = {}
    for run in runs:
        logits, held_out = run.unit.load().validation_logits, run.study.validation
        score = validation_score(held_out.task, logits, held_out.labels)
        by_row.setdefault(run.unit.row, []).append(score)
    return {row: float(np.mean(own)) for row, own in by_row.items()}


def _write(found: Sequence[RowScores], directory: Path, *, title: str) -> None:
    lines = [
        f"| {one.row} | {one.mean:.4f} | {', '.join(f'{score:.4f}' for score in one.folds)} |"
        for one in found
    ]
    table = "\n".join(["| row | mean | folds |", "|---|---|---|", *lines])
    write_text(directory / "cross_validation.md", f"# {title}\n\n{table}\n")
    write_json(directory / "cross_validation.json", [asdict(one) for one in found])
