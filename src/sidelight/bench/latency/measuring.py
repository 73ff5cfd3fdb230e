"""Times and memory of all subjects on all loads, in turn."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter

import torch

from sidelight.bench.latency.loads import Load
from sidelight.bench.latency.subjects import Kind, Subject
from sidelight.bench.memory import peak_bytes
from sidelight.bench.timing import interleaved
from sidelight.progress import Progress, progress


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
