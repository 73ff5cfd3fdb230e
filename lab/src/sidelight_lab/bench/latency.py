"""Times and memory of all subjects on all loads, in turn.

Rows as tables: loads across, subjects down, one set of tables for each batch size.

The figures with what they were measured on, as files.

Overhead against prompt length, one picture for each batch size.
"""

import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sidelight.backbone import TransformersBackbone
from sidelight.plots import save_figure
from sidelight.progress import Progress, progress
from sidelight.storage import write_text
from sidelight_lab.bench.latency_subjects import Kind, Load, Subject
from sidelight_lab.bench.timing import interleaved, peak_bytes

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Range:
    """Median, smallest and largest of the rounds."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Range":
        """The range of one or more values."""
        return Range(median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """One subject on one load.

    Attributes:
        subject: Its name.
        kind: How it classifies.
        load: Title of the load.
        batch_size: Prompts of a batch.
        mean_tokens: Of a prompt.
        ms: Milliseconds per prompt.
        ratio: Over the first subject's time in the same round.
        weights_bytes: What must be resident.
        working_bytes: Peak beyond what was resident before; None where it cannot be measured.
    """

    subject: str
    kind: Kind
    load: str
    batch_size: int
    mean_tokens: float
    ms: Range
    ratio: Range
    weights_bytes: int
    working_bytes: int | None


def compare_latency(
    subjects: Sequence[Subject],
    loads: Sequence[Load],
    *,
    repeats: int,
    device: torch.device,
    shortest_s: float = 0.2,
) -> tuple[Row, ...]:
    """Rows of every subject on every load that it accepts.

    On each load, every round times all subjects one after the other, each round beginning with
    another one, so that neither the machine's drift nor the order favours any.

    Args:
        subjects: The first is what the others are compared with, and accepts every load.
        loads: What is run.
        repeats: Rounds.
        device: Where the subjects run.
        shortest_s: A timing averages as many runs as the first subject needs to fill this, since
            one interrupt would decide a shorter one.
    """
    with progress("Timing", len(loads) * len(subjects) * repeats, unit="timings") as shown:
        rows: list[Row] = []
        for load in loads:
            able = [subject for subject in subjects if all(map(subject.accepts, load.batches))]
            shown.advance((len(subjects) - len(able)) * repeats)
            runs = [partial(_run, subject, load) for subject in able]
            for run in runs:
                run()
            peaks = [peak_bytes(run, device=device) for run in runs]
            calls = _calls(runs[0], shortest_s)
            seconds = _rounds(runs, calls=calls, repeats=repeats, shown=shown)
            rows += map(partial(_row, load, seconds[0]), able, seconds, peaks)
        return tuple(rows)


def _row(
    load: Load,
    base: Sequence[float],
    subject: Subject,
    seconds: Sequence[float],
    peak: int | None,
) -> Row:
    return Row(
        subject=subject.name,
        kind=subject.kind,
        load=load.title,
        batch_size=load.batch_size,
        mean_tokens=load.mean_tokens,
        ms=Range.of([1000 * own / load.texts for own in seconds]),
        ratio=Range.of([own / other for own, other in zip(seconds, base, strict=True)]),
        weights_bytes=subject.weights_bytes,
        working_bytes=peak,
    )


def _run(subject: Subject, load: Load) -> None:
    for batch in load.batches:
        subject.run(batch)


def _calls(run: Callable[[], None], shortest_s: float) -> int:
    start = perf_counter()
    run()
    return max(1, math.ceil(shortest_s / (perf_counter() - start)))


def _rounds(
    runs: Sequence[Callable[[], None]], *, calls: int, repeats: int, shown: Progress
) -> list[list[float]]:
    """Seconds of one call of each run, in each round."""
    timed = {str(i): partial(_several, run, calls, shown) for i, run in enumerate(runs)}
    names = list(timed)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeats):
        first = number % len(names)
        order = {name: timed[name] for name in names[first:] + names[:first]}
        for name, (total,) in interleaved(order, repeats=1).items():
            seconds[name].append(total / calls)
    return list(seconds.values())


def _several(run: Callable[[], None], calls: int, shown: Progress) -> None:
    for _ in range(calls):
        run()
    shown.advance(1)


_MB = 1e6


@dataclass(frozen=True)
class Grid:
    """A table of text.

    Attributes:
        title: What the cells hold.
        columns: Heads; the first is of the lines' names.
        lines: Cells, a name first.
    """

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The title in bold and a Markdown table."""
        rule = ("---", *("---:" for _ in self.columns[1:]))
        lines = [f"| {' | '.join(cells)} |" for cells in (self.columns, rule, *self.lines)]
        return "\n".join([f"**{self.title}**", "", *lines])

    def table(self) -> "Table":
        """For a terminal."""
        from rich.table import Table

        table = Table(title=self.title, title_justify="left")
        for place, column in enumerate(self.columns):
            table.add_column(column, justify="right" if place else "left")
        for cells in self.lines:
            table.add_row(*cells)
        return table


def grids(rows: Sequence[Row]) -> list[Grid]:
    """Time, time over the first subject's, and memory, for each batch size."""
    made: list[Grid] = []
    for size in dict.fromkeys(row.batch_size for row in rows):
        own = [row for row in rows if row.batch_size == size]
        base = own[0].subject
        made += [
            _grid(f"Batch {size}: ms per text, median (range)", own, _time),
            _grid(f"Batch {size}: time over {base}'s, median (range)", own, _ratio),
            _grid(f"Batch {size}: peak memory, MB (of it weights)", own, _memory),
        ]
    return made


def _grid(title: str, rows: Sequence[Row], show: Callable[[Row], str]) -> Grid:
    cells = {(row.subject, row.load): show(row) for row in rows}
    loads = list(dict.fromkeys(row.load for row in rows))
    subjects = list(dict.fromkeys(row.subject for row in rows))
    lines = tuple((name, *(cells.get((name, load), "-") for load in loads)) for name in subjects)
    return Grid(title, ("", *loads), lines)


def _time(row: Row) -> str:
    return _range(row.ms, digits=1)


def _ratio(row: Row) -> str:
    return _range(row.ratio, digits=2)


def _memory(row: Row) -> str:
    if row.working_bytes is None:
        return "-"
    weights = row.weights_bytes / _MB
    return f"{weights + row.working_bytes / _MB:,.0f} ({weights:,.0f})"


def _range(values: Range, *, digits: int) -> str:
    return f"{values.median:.{digits}f} ({values.low:.{digits}f} to {values.high:.{digits}f})"


Condition = str | int | float


@dataclass(frozen=True)
class Record:
    """What was measured, and on what.

    Attributes:
        conditions: Of the run.
        rows: The figures; the first row of a load is what the others are compared with.
    """

    conditions: Mapping[str, Condition]
    rows: tuple[Row, ...]

    def to_json(self) -> str:
        """Everything, for programs."""
        rows = [asdict(row) for row in self.rows]
        return json.dumps({"conditions": dict(self.conditions), "rows": rows}, indent=2) + "\n"

    def to_markdown(self) -> str:
        """The conditions in a line, then the tables."""
        line = ", ".join(f"{name} {value}" for name, value in self.conditions.items())
        return "\n\n".join([line, *(grid.markdown() for grid in grids(self.rows))]) + "\n"

    def save(self, directory: Path) -> None:
        """Writes ``latency.json`` and ``latency.md``; the folder is made if absent."""
        write_text(directory / "latency.json", self.to_json())
        write_text(directory / "latency.md", self.to_markdown())


def conditions(backbone: TransformersBackbone, *, repeats: int) -> dict[str, Condition]:
    """What the figures depend on.

    Args:
        backbone: The LLM.
        repeats: Rounds.
    """
    device = backbone.device
    is_gpu = device.type == "cuda"
    return {
        "model": backbone.name,
        "fingerprint": backbone.fingerprint.digest,
        "dtype": backbone.fingerprint.dtype,
        "device": torch.cuda.get_device_name(device) if is_gpu else platform.machine(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "load before": round(os.getloadavg()[0], 2),
        "rounds": repeats,
        **{package: version(package) for package in ("torch", "transformers", "sidelight")},
    }


# matplotlib leaves the types of **kwargs open.
# pyright: reportUnknownMemberType=false


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
