"""Compares rows on training texts alone: each fold is scored by what the other folds taught.

This is for choosing: the validation split and the test stay closed. The fold serves as validation
data, so early stopping and settings are chosen on the scored texts, in the same way for every row.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from tabulate import tabulate

from sidelight.errors import SidelightError
from sidelight.storage import write_json, write_text
from sidelight.training.dataset import ProbeDataset, Split, require_same_task
from sidelight.training.optimisation import score_name, validation_score
from sidelight_lab.tables.context import RecipeContext
from sidelight_lab.tables.runs import Run, fit_runs, plan_runs
from sidelight_lab.tables.writing import cell


@dataclass(frozen=True)
class RowScores:
    """One row on left-out texts."""

    row: str
    score: str  # its name; see ``validation_score``
    folds: tuple[float | None, ...]  # the means over seeds; None where a training diverged

    @property
    def mean(self) -> float | None:
        return _mean(self.folds)

    def cells(self) -> tuple[str, str, str]:
        """Name, mean and folds for people."""
        mean, *folds = (
            "diverged" if score is None else f"{score:.4f}" for score in (self.mean, *self.folds)
        )
        return self.row, mean, ", ".join(folds)


def cross_validate(context: RecipeContext, *, folds: int) -> list[RowScores]:
    """Each row's scores, the best row first; writes ``cross_validation.md`` and ``.json``.

    Every seed is trained in every fold. What an earlier, killed run finished is not repeated.
    """
    recipe, directory = context.recipe, context.directory
    if recipe.kind != "comparison":
        raise SidelightError(
            f"Only a comparison can be cross-validated, but '{recipe.title}' is of kind "
            f"'{recipe.kind}'. Leave --folds out."
        )
    context.check()
    data = context.load(recipe.data)
    # In a folder of its own: the table itself may have written its origin already.
    context.write_origin(directory / "cross_validation", data)
    split = context.extract(context.sample(data.training), "Training texts")
    scores: dict[str, list[float | None]] = {}
    whole = ProbeDataset(context.backbone, split, split)
    for number, dataset in enumerate(_folds(whole, folds), start=1):
        rows = context.rows(dataset, searches=f"search/{folds}_folds_{number}")
        runs = plan_runs(rows, dataset, range(recipe.seeds), directory / "runs")
        fit_runs(runs, max_tokens=recipe.max_tokens)
        for row in rows:
            own = [_score(run) for run in runs if run.row is row]
            scores.setdefault(row.name, []).append(_mean(own))
    name = score_name(whole.task)
    found = [RowScores(row, name, tuple(own)) for row, own in scores.items()]
    found.sort(key=lambda one: -1.0 if one.mean is None else one.mean, reverse=True)
    some = "" if context.limit is None else f", at most {context.limit} training rows"
    cells = [list(map(cell, one.cells())) for one in found]
    table = tabulate(cells, ["row", f"{name}, mean", "folds"], "pipe", disable_numparse=True)
    title = f"# {recipe.title}, {folds}-fold cross-validation{some}"
    write_text(directory / "cross_validation.md", f"{title}\n\n{table}\n")
    write_json(directory / "cross_validation.json", [asdict(one) for one in found])
    return found


def _folds(whole: ProbeDataset, count: int) -> list[ProbeDataset]:
    """Each fold as the validation part of the others; equal texts are in one fold."""
    datasets: list[ProbeDataset] = []
    rows = np.arange(len(whole.training))
    for fold in whole.training.examples.folds(count, seed=0):
        rest, held_out = (whole.training.select(own) for own in (np.setdiff1d(rows, fold), fold))
        if _lacks_a_class(rest) or _lacks_a_class(held_out):
            raise SidelightError(
                f"A class has fewer distinct texts than {count} folds. Choose fewer (--folds)."
            )
        require_same_task(rest.examples, held_out.examples)
        datasets.append(ProbeDataset(whole.backbone, rest, held_out))
    return datasets


def _lacks_a_class(split: Split) -> bool:
    return split.task.kind != "multilabel" and 0 in split.examples.label_counts


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return float(np.mean(known)) if len(known) == len(scores) else None


def _score(run: Run) -> float | None:
    if run.has_diverged:
        return None
    held_out = run.dataset.validation
    return validation_score(held_out.task, run.load().validation_logits, held_out.labels)
