"""How good what ``sidelight train`` makes of few labelled texts is, on texts it did not see."""

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sidelight.backbone import TransformersBackbone
from sidelight.data.examples import LabelledExamples
from sidelight.errors import SidelightError
from sidelight.mechanisms.base import spec_titles
from sidelight.metrics import decide, log_losses, measure
from sidelight.training.classifier import judge
from sidelight.training.fit import Fit, fit
from sidelight.training.settings import FitOptions
from sidelight_lab.bench.measurement import table

AUTO = "auto"
FIGURES = ("accuracy", "log loss", "ece")


def compare_candidates(
    backbone: TransformersBackbone,
    examples: LabelledExamples,
    *,
    sizes: Sequence[int],
    draws: int,
    held_out: int,
    cache_root: Path,
) -> list[dict[str, Any]]:
    """Figures of each candidate and of the one that was taken, for each size and draw.

    Args:
        backbone: The frozen LLM.
        examples: Labelled texts.
        sizes: Training texts of each class.
        draws: Draws of training texts; those that are held out are the same for all.
        held_out: Texts of each class to measure on.
        cache_root: Folder of the hidden states while training.
    """
    _require_enough(examples, max(sizes), held_out)
    shuffled = np.random.default_rng(0).permutation(len(examples))
    classes = [shuffled[examples.labels[shuffled] == own] for own in np.unique(examples.labels)]
    held = _selected(examples, [rows[:held_out] for rows in classes])
    options = FitOptions(cache_root=cache_root)
    fits: list[tuple[dict[str, int], Fit]] = []
    for size, draw in product(sizes, range(draws)):
        random = np.random.default_rng(draw)
        drawn = [random.choice(rows[held_out:], size, replace=False) for rows in classes]
        made = fit(backbone, _selected(examples, drawn), None, name="default", options=options)
        fits.append(({"size": size, "draw": draw}, made))
    # One pass over the held-out texts for all probes.
    logits = iter(judge(backbone, [run.probe for _, made in fits for run in made.runs], held.items))
    return [
        {**where, **row}
        for where, made in fits
        for row in _figures(made, held, [next(logits) for _ in made.runs])
    ]


def _require_enough(examples: LabelledExamples, size: int, held_out: int) -> None:
    if examples.task.kind == "multilabel":
        raise SidelightError("Texts are drawn class by class: choose one --label.")
    rarest = int(examples.label_counts.min())
    if rarest < size + held_out:
        raise SidelightError(
            f"Drawing {size} texts of each class beside {held_out} held out needs "
            f"{size + held_out}, but '{examples.task.labels[int(examples.label_counts.argmin())]}' "
            f"has {rarest}. Choose a smaller --sizes or --held-out, or give more data."
        )


def _selected(
    examples: LabelledExamples, rows: Sequence[Int[np.ndarray, " row"]]
) -> LabelledExamples:
    return examples.select(np.sort(np.concatenate(rows)))


def _figures(
    made: Fit, held: LabelledExamples, logits: Sequence[Float[np.ndarray, "text output"]]
) -> Iterator[dict[str, Any]]:
    """A row for each run, and one more for the run that was taken."""
    titles = spec_titles([run.probe.spec for run in made.runs])
    for title, run, own in zip(titles, made.runs, logits, strict=True):
        chance = run.probe.calibration.apply(own)
        decided = decide(held.task, chance, held.labels, thresholds=run.probe.thresholds)
        metrics = measure(decided, decided.once)
        row = {
            "accuracy": float(metrics["accuracy"][0]),
            "log loss": float(log_losses(held.task, chance, held.labels).mean()),
            "ece": float(metrics["ece"][0]),
            "printed accuracy": run.report.metrics["accuracy"].value,
        }
        yield {"row": title, **row}
        if run is made.best:
            yield {"row": AUTO, "taken": title, **row}


def candidates_table(rows: Sequence[dict[str, Any]]) -> str:
    """The mean over draws of each figure, by size and row."""
    cells: list[list[str]] = []
    for size in dict.fromkeys(row["size"] for row in rows):
        of_size = [row for row in rows if row["size"] == size]
        for title in dict.fromkeys(row["row"] for row in of_size):
            own = [row for row in of_size if row["row"] == title]
            figures = [f"{np.mean([row[key] for row in own]):.3f}" for key in _COLUMNS]
            cells.append([str(size), title, str(len(own)), *figures])
    headings = ["texts of a class", "row", "draws", *_COLUMNS]
    return table("Texts that were held out", headings, cells)


_COLUMNS = (*FIGURES, "printed accuracy")
