"""The look of the laboratory's pictures, drawn without a display or pyplot's global state."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe & Ito's palette, told apart with any colour vision; ours is always the first.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8}


def new_axes(width: float, height: float, title: str = "") -> tuple[Figure, Axes]:
    """A figure with one plot; save it with ``sidelight.plots.save_figure``."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    open_frame(axes)
    axes.set_title(literal(title), loc="left", fontsize=11)
    return figure, axes


def open_frame(axes: Axes) -> None:
    """Draws only the axes at the bottom and on the left."""
    axes.spines[["top", "right"]].set_visible(False)


def literal(text: str) -> str:
    """Escapes what matplotlib would interpret: a dollar sign, or an underscore at the start."""
    return text.replace("$", r"\$").lstrip("_")
