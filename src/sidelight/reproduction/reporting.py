"""Tables and pictures of a finished test: all its texts, then each subset."""

from pathlib import Path

import numpy as np

from sidelight.reproduction.data import LabelledData
from sidelight.reproduction.figures import TableFigures, measure_rows
from sidelight.reproduction.judging import Scored
from sidelight.reproduction.pictures import draw_bars, draw_precision_recall, draw_sweep
from sidelight.reproduction.recipe import Recipe
from sidelight.reproduction.rows import Rows


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
