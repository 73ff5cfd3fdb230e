"""How many responses each detector has caught after each token."""
# matplotlib leaves the types of **kwargs open.
# pyright: reportUnknownMemberType=false

from pathlib import Path

from matplotlib.figure import Figure

from sidelight.bench.streaming.record import Record
from sidelight.plots import save_figure

# Okabe & Ito's palette, told apart with any colour vision.
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")


def plot_streaming(record: Record, directory: Path) -> Path:
    """Draws ``streaming.png``: solid lines for what is to be caught, dotted ones for the rest.

    Args:
        record: Of a comparison.
        directory: Where to write; made if absent.
    """
    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for row, colour in zip(record.rows, _COLOURS, strict=True):
        tokens = range(1, len(row.caught) + 1)
        axes.step(tokens, row.caught, where="post", color=colour, linewidth=1.8, label=row.title)
        axes.step(tokens, row.alarmed, where="post", color=colour, linewidth=1.2, linestyle=":")
    axes.set_xscale("log")
    axes.set(xlabel="Tokens of the response", ylabel="Share of responses caught", ylim=(0, 1))
    axes.set_title("To be caught (solid), and the others: false alarms (dotted)", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    return save_figure(figure, directory / "streaming.png")
