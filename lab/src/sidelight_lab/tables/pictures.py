"""Pictures of a table: bars with intervals, precision-recall curves, and curves of a sweep.

Draws on figures of its own, without a display or pyplot's global state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sidelight.metrics import decide, walk
from sidelight.plots import save_figure
from sidelight_lab.tables.figures import RowFigures, Spread, TableFigures
from sidelight_lab.tables.judging import JudgedRow, Scored
from sidelight_lab.tables.rows import ProbeConfig
from sidelight_lab.tables.writing import heading

# matplotlib leaves the types of **kwargs open.
# pyright: reportUnknownMemberType=false


# Okabe & Ito's palette, told apart with any colour vision; ours is always the first.
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_PLAIN, _FAINT = "#7d9bb5", "#d0d0d0"


def draw_bars(figures: TableFigures, path: Path) -> Path:
    """The mean of each row, its seeds as dots, and the chosen seed's 95 % interval."""
    height = 0.32 * len(figures.rows) + 1.4
    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = _axes(figure)
    for place, row in enumerate(figures.rows):
        _draw_bar(axes, place, row, figures.metric, is_ours=row.row.name == figures.ours)
    axes.set_yticks(range(len(figures.rows)), [_plain(row.row.title) for row in figures.rows])
    axes.invert_yaxis()
    axes.set_xlabel(heading(figures.metric))
    axes.set_xlim(left=_left_end(figures))
    axes.set_title(_plain(figures.title), loc="left", fontsize=11)
    return save_figure(figure, path)


def draw_precision_recall(scored: Scored, path: Path, *, ours: str, title: str) -> Path:
    """Curves of each row's chosen seed: ours and the best others in colour, the rest behind.

    Args:
        scored: Rows of a binary task.
        path: Where to write.
        ours: Name of our row.
        title: Of the picture.
    """
    curves = sorted((_curve(scored, row) for row in scored.rows), key=lambda one: -one.area)
    first = sorted(curves, key=lambda curve: curve.name != ours)
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axes = _axes(figure)
    for curve in first[len(_COLOURS) :]:
        axes.step(curve.recall, curve.precision, where="pre", color=_FAINT, linewidth=0.8)
    for curve, colour in zip(first, _COLOURS, strict=False):
        label = f"{curve.area:.3f}  {_plain(curve.title)}"
        axes.step(curve.recall, curve.precision, where="pre", color=colour, label=label)
    axes.set(xlabel="Recall", ylabel="Precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title(_plain(title), loc="left", fontsize=11)
    axes.legend(
        title="AUPRC", frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1)
    )
    return save_figure(figure, path)


def draw_sweep(
    figures: TableFigures, path: Path, *, configs: Mapping[str, ProbeConfig], parameter: str
) -> Path:
    """The metric on the test (solid) and the validation score (dashed) over the swept values.

    Args:
        figures: A row for each probe and value.
        path: Where to write.
        configs: By name of the row.
        parameter: That was swept.
    """
    lines: dict[str, list[RowFigures]] = {}
    for row in figures.rows:
        lines.setdefault(configs[row.row.name].line, []).append(row)
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = _axes(figure)
    # Values are a few powers of something as a rule, so they stand at equal distances.
    values = list(dict.fromkeys(str(config.swept) for config in configs.values()))
    for number, (name, rows) in enumerate(lines.items()):
        # A row whose every run diverged is not there.
        places = np.array([values.index(str(configs[row.row.name].swept)) for row in rows])
        colour = _COLOURS[number % len(_COLOURS)]
        _draw_line(axes, places, rows, figures.metric, name=name, colour=colour)
    axes.set_xticks(range(len(values)), values)
    axes.plot([], [], color="black", linestyle="--", linewidth=1, label="validation")
    axes.set(xlabel=parameter.replace("_", " "), ylabel=heading(figures.metric))
    axes.set_title(_plain(figures.title), loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)


def _draw_line(
    axes: Axes,
    places: Int[np.ndarray, " value"],
    rows: Sequence[RowFigures],
    metric: str,
    *,
    name: str,
    colour: str,
) -> None:
    spreads = [row.spread(metric) for row in rows]
    axes.errorbar(
        places,
        _means(spreads),
        yerr=[one.deviation for one in spreads],
        color=colour,
        marker="o",
        label=_plain(name),
    )
    validation = _means([row.validation for row in rows])
    axes.plot(places, validation, color=colour, linestyle="--", linewidth=1)


def _means(spreads: Sequence[Spread]) -> Float[np.ndarray, " value"]:
    return np.array([np.nan if one.mean is None else one.mean for one in spreads])


@dataclass(frozen=True)
class _Curve:
    name: str
    title: str
    recall: Float[np.ndarray, " step"]
    precision: Float[np.ndarray, " step"]

    @property
    def area(self) -> float:
        """The average precision: each step reaches back to the one before."""
        return float((np.diff(self.recall) * self.precision[1:]).sum())


def _curve(scored: Scored, row: JudgedRow) -> _Curve:
    run = row.runs[row.chosen]
    decided = decide(scored.task, run.probabilities, scored.labels, thresholds=run.thresholds)
    walked = walk(decided.rankings[decided.headline][0], decided.once)
    recall = walked.recalled[:, 0] / walked.positives[0]
    precision = walked.recalled[:, 0] / (walked.recalled + walked.alarms)[:, 0]
    return _Curve(row.name, row.title, np.append(0, recall), np.append(precision[0], precision))


def _draw_bar(axes: Axes, place: int, row: RowFigures, metric: str, *, is_ours: bool) -> None:
    spread, chosen = row.spread(metric), row.chosen.metrics[metric]
    if spread.mean is None:
        return
    colour = _COLOURS[0] if is_ours else _PLAIN
    axes.barh(place, spread.mean, height=0.62, color=colour)
    values = [value for value in spread.values if value is not None]
    axes.plot(values, [place] * len(values), ".", color="black", markersize=4)
    if chosen.low is not None and chosen.high is not None:
        axes.hlines(place, chosen.low, chosen.high, color="black", linewidth=1)


def _left_end(figures: TableFigures) -> float:
    """A little left of all that is drawn: differences between rows are small beside the values."""
    seen = [value for row in figures.rows for value in row.spread(figures.metric).values]
    seen += [row.chosen.metrics[figures.metric].low for row in figures.rows]
    lowest = min((value for value in seen if value is not None), default=0.0)
    return max(0.0, lowest - 0.05)


def _axes(figure: Figure) -> Axes:
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _plain(text: str) -> str:
    # A dollar sign starts a formula in matplotlib.
    return text.replace("$", r"\$")
