"""Pictures of a table: bars with intervals, precision-recall curves, and curves of a sweep."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, precision_recall_curve

from sidelight.plots import save_figure
from sidelight_lab.plots import COLOURS, LEGEND, LEGEND_BESIDE, literal, new_axes
from sidelight_lab.tables.figures import RowFigures, Spread, TableFigures
from sidelight_lab.tables.judging import JudgedTable
from sidelight_lab.tables.rows import ProbeConfig
from sidelight_lab.tables.writing import heading

_PLAIN, _FAINT = "#7d9bb5", "#d0d0d0"


def draw_bars(figures: TableFigures, path: Path) -> None:
    """The mean of each row, its seeds as dots, and the chosen seed's 95 % interval."""
    height = 0.32 * len(figures.rows) + 1.4
    figure, axes = new_axes(7.2, height, figures.title)
    ends: list[float | None] = []
    for place, row in enumerate(figures.rows):
        spread, chosen = row.spread(figures.metric), row.chosen.metrics[figures.metric]
        ends += [*spread.values, chosen.low]
        if spread.mean is None:
            continue
        colour = COLOURS[0] if row.row.name == figures.ours else _PLAIN
        axes.barh(place, spread.mean, height=0.62, color=colour)
        values = [value for value in spread.values if value is not None]
        axes.plot(values, [place] * len(values), ".", color="black", markersize=4)
        if chosen.low is not None and chosen.high is not None:
            axes.hlines(place, chosen.low, chosen.high, color="black", linewidth=1)
    axes.set_yticks(range(len(figures.rows)), [literal(row.row.title) for row in figures.rows])
    axes.invert_yaxis()
    axes.set_xlabel(heading(figures.metric))
    # Differences between rows are small beside the values.
    lowest = min((value for value in ends if value is not None), default=0.0)
    axes.set_xlim(left=max(0.0, lowest - 0.05))
    save_figure(figure, path)


def draw_precision_recall(judged: JudgedTable, path: Path, *, ours: str, title: str) -> None:
    """Curves of each row's chosen seed: ours and the best others in colour, the rest in grey."""
    figure, axes = new_axes(7.6, 4.6, title)
    chances = {row.name: row.runs[row.chosen].probabilities[:, 0] for row in judged.rows}
    areas = {
        name: float(average_precision_score(judged.labels, own)) for name, own in chances.items()
    }
    ranked = sorted(judged.rows, key=lambda row: (row.name != ours, -areas[row.name]))
    for place, row in enumerate(ranked):
        curve = precision_recall_curve(judged.labels, chances[row.name])
        precision, recall = (values[::-1] for values in curve[:2])
        rises = np.diff(recall, prepend=-1) > 0
        style: dict[str, Any] = {"color": _FAINT, "linewidth": 0.8, "zorder": 1}
        if place < len(COLOURS):
            label = f"{areas[row.name]:.3f}  {literal(row.title)}"
            style = {"color": COLOURS[place], "zorder": 2, "label": label}
        axes.step(recall[rises], precision[rises], where="pre", **style)
    axes.set(xlabel="Recall", ylabel="Precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(title="AUPRC", **LEGEND_BESIDE)
    save_figure(figure, path)


def draw_sweep(
    figures: TableFigures, path: Path, *, probes: Mapping[str, ProbeConfig], parameter: str
) -> None:
    """The metric on the test (solid) and the validation score (dashed) over the swept values."""
    lines: dict[str, list[RowFigures]] = {}
    for row in figures.rows:
        lines.setdefault(probes[row.row.name].line, []).append(row)
    figure, axes = new_axes(7.2, 4.4, figures.title)
    # Values are usually powers of a number, so they stand at equal distances.
    values = list(dict.fromkeys(str(probe.swept) for probe in probes.values()))
    for number, (name, rows) in enumerate(lines.items()):
        # Rows whose runs all diverged are missing.
        places = [values.index(str(probes[row.row.name].swept)) for row in rows]
        tested = [row.spread(figures.metric) for row in rows]
        spans = [one.deviation for one in tested]
        colour = COLOURS[number % len(COLOURS)]
        axes.errorbar(
            places, _means(tested), yerr=spans, color=colour, marker="o", label=literal(name)
        )
        held_out = _means([row.validation for row in rows])
        axes.plot(places, held_out, color=colour, linestyle="--", linewidth=1)
    axes.set_xticks(range(len(values)), values)
    axes.plot([], [], color="black", linestyle="--", linewidth=1, label="validation")
    axes.set(xlabel=parameter.replace("_", " "), ylabel=heading(figures.metric))
    axes.legend(**LEGEND)
    save_figure(figure, path)


def _means(spreads: list[Spread]) -> list[float]:
    return [np.nan if one.mean is None else one.mean for one in spreads]
