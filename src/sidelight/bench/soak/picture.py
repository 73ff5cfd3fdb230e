"""Memory and open files of the server over the visits."""
# matplotlib leaves the types of **kwargs open.
# pyright: reportUnknownMemberType=false

from pathlib import Path

from matplotlib.figure import Figure

from sidelight.bench.soak.record import Record
from sidelight.plots import save_figure

# Of Okabe & Ito's palette, told apart with any colour vision.
_MEMORY, _FILES = "#0072b2", "#d55e00"


def plot_soak(record: Record, directory: Path) -> Path:
    """Draws ``soak.png``: the bursts of connections on the left, the requests on the right.

    Args:
        record: Of a run.
        directory: Where to write; made if absent.
    """
    directory.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(9.2, 5.2), layout="constrained")
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    phases = (record.connections, record.requests)
    for (memory, files), phase in zip(zip(*grid, strict=True), phases, strict=True):
        visits = [sample.visits for sample in phase.samples]
        memory.plot(visits, [s.resident_mb for s in phase.samples], color=_MEMORY, linewidth=1.2)
        files.plot(visits, [s.descriptors for s in phase.samples], color=_FILES, linewidth=1.2)
        memory.set_title(phase.title, loc="left")
        files.set_xlabel(phase.title)
        for axes in (memory, files):
            axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set(ylabel="Resident memory, MB", ylim=(0, None))
    grid[1][0].set(ylabel="Open files", ylim=(0, None))
    slope = record.slope
    figure.suptitle(
        f"{slope.value:+.2f} MB per 1,000 requests after warm-up ({slope.low:+.2f} to "
        f"{slope.high:+.2f})",
        x=0.01,
        horizontalalignment="left",
    )
    return save_figure(figure, directory / "soak.png")
