"""Overhead against prompt length, one picture for each batch size."""
# matplotlib leaves the types of **kwargs open.
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sidelight.bench.latency.measuring import Row
from sidelight.bench.latency.subjects import Kind
from sidelight.plots import save_figure

# Paul Tol's muted palette: nine colours, told apart with any colour vision.
_COLOURS = (
    "#332288", "#cc6677", "#117733", "#88ccee", "#aa4499", "#ddcc77", "#882255", "#44aa99",
    "#999933",
)  # fmt: skip
_LINES: dict[Kind, str] = {"one pass": "-", "naive": "--", "cascade": ":"}
# Overheads below this share are drawn on a linear scale, larger ones on a logarithmic one.
_LINEAR_PERCENT = 10


def plot_latency(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Draws ``latency-batch-N.png``: percent over the first subject, by tokens of a prompt.

    Args:
        rows: Of ``compare_latency``.
        directory: Where to write; made if absent.
    """
    directory.mkdir(parents=True, exist_ok=True)
    sizes = dict.fromkeys(row.batch_size for row in rows)
    return [_plot([row for row in rows if row.batch_size == n], directory) for n in sizes]


def _plot(rows: Sequence[Row], directory: Path) -> Path:
    base, size = rows[0].subject, rows[0].batch_size
    figure = Figure(figsize=(8.6, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for kind, line in _LINES.items():
        names = dict.fromkeys(r.subject for r in rows if r.kind == kind and r.subject != base)
        # The same mechanisms stand in the same order in each kind, so they share a colour.
        for name, colour in zip(names, cycle(_COLOURS), strict=False):
            own = [row for row in rows if row.subject == name]
            _draw(axes, own, label=name, color=colour, linestyle=line)
    _finish(axes, sorted({row.mean_tokens for row in rows}))
    axes.set_title(f"Time over {base} alone, batch {size}: median and range", loc="left")
    return save_figure(figure, directory / f"latency-batch-{size}.png")


def _draw(axes: Axes, rows: Sequence[Row], **style: Any) -> None:
    tokens = [row.mean_tokens for row in rows]
    middle = [_percent(row.ratio.median) for row in rows]
    low = [_percent(row.ratio.low) for row in rows]
    high = [_percent(row.ratio.high) for row in rows]
    axes.plot(tokens, middle, marker="o", markersize=4, linewidth=1.6, **style)
    axes.vlines(tokens, low, high, color=style["color"], linewidth=0.8, alpha=0.6)


def _percent(ratio: float) -> float:
    return 100 * (ratio - 1)


def _finish(axes: Axes, tokens: Sequence[float]) -> None:
    axes.axhline(0, color="#222222", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [f"{count:.0f}" for count in tokens])
    axes.set_yscale("symlog", linthresh=_LINEAR_PERCENT)
    ticks = [0, 5, 10, 20, 50, 100, 200, 500, 1000]
    axes.set_yticks(ticks, [f"{tick:+d} %" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="Tokens of a prompt", ylabel="Overhead")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, fontsize=8)
