"""Time and memory of one new token: every subject on every load, in turns."""

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch

from sidelight.progress import progress
from sidelight_lab.bench.measurement import (
    MB,
    Range,
    Record,
    interleaved,
    peak_bytes,
    ratios,
    table,
)
from sidelight_lab.bench.subjects import Kind, Load, Subject

# A timing averages as many runs as the first subject needs to fill this: one interrupt would decide
# a shorter one.
SHORTEST_S = 0.2


@dataclass(frozen=True)
class Row:
    """One subject on one load.

    Attributes:
        ms: Milliseconds per prompt, over the rounds.
        ratio: Time over the first subject's time in the same round.
        working_bytes: Peak memory beyond what was resident; None where it cannot be measured.
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
) -> list[Row]:
    """A row for every subject on every load that it accepts.

    The others are compared with the first subject, which accepts every load.
    """
    with progress("Timing", len(loads) * len(subjects) * repeats, unit="timings") as shown:
        rows: list[Row] = []
        # Memory is measured after a garbage collection, which then skips all that is alive now.
        gc.collect()
        gc.freeze()
        for load in loads:
            able = [subject for subject in subjects if subject.accepts(load)]
            shown.advance((len(subjects) - len(able)) * repeats)
            for subject in able:
                _run(subject, load)
            peaks = [peak_bytes(partial(_run, one, load), device=device) for one in able]
            start = perf_counter()
            _run(able[0], load)
            calls = max(1, math.ceil(SHORTEST_S / (perf_counter() - start)))
            actions = {one.name: partial(_run, one, load, calls=calls) for one in able}
            found = interleaved(actions, repeats=repeats, advance=shown.advance)
            rows += [
                Row(
                    subject=subject.name,
                    kind=subject.kind,
                    load=load.title,
                    batch_size=load.batch_size,
                    mean_tokens=load.mean_tokens,
                    ms=Range.of([1000 * total / calls / load.texts for total in seconds]),
                    ratio=Range.of(ratios(seconds, found[able[0].name])),
                    weights_bytes=subject.weights_bytes,
                    working_bytes=peak,
                )
                for subject, seconds, peak in zip(able, found.values(), peaks, strict=True)
            ]
        gc.unfreeze()
    return rows


def _run(subject: Subject, load: Load, *, calls: int = 1) -> None:
    for _ in range(calls):
        for batch in load.batches:
            subject.run(batch)


def latency_record(rows: Sequence[Row], conditions: Mapping[str, Any]) -> Record:
    """Three tables for each batch size: time, time over the first row's, and memory."""

    def memory(row: Row) -> str:
        if row.working_bytes is None:
            return "-"
        return (
            f"{(row.weights_bytes + row.working_bytes) / MB:,.0f} ({row.weights_bytes / MB:,.0f})"
        )

    base = rows[0].subject
    shown: dict[str, Callable[[Row], str]] = {
        "ms per text, median (range)": lambda row: row.ms.text(1),
        f"time over {base}'s, median (range)": lambda row: row.ratio.text(2),
        "peak memory, MB (weights)": memory,
    }
    sections: list[str] = []
    for size in dict.fromkeys(row.batch_size for row in rows):
        own = [row for row in rows if row.batch_size == size]
        loads = list(dict.fromkeys(row.load for row in own))
        for title, cell in shown.items():
            cells = {(row.subject, row.load): cell(row) for row in own}
            lines = [
                [subject, *(cells.get((subject, load), "-") for load in loads)]
                for subject in dict.fromkeys(row.subject for row in own)
            ]
            sections.append(table(f"Batch {size}: {title}", ["", *loads], lines))
    results = {"rows": [asdict(row) for row in rows]}
    return Record("latency", conditions, results, sections)
