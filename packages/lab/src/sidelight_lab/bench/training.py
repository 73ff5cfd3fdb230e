"""Time, memory and disk space of training, by number of texts and storage of states.

Each training run has a separate process, whose peak memory is measured.
"""

import json
import os
import resource
import tempfile
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, Literal, cast

import numpy as np
import torch
from matplotlib.figure import Figure

from sidelight.data.examples import LabelledExamples
from sidelight.data.loading import load_examples
from sidelight.engines.transformers.backbone import load_backbone
from sidelight.errors import SidelightError
from sidelight.progress import progress
from sidelight.states.reader import Reader
from sidelight.storage import write_json
from sidelight.training.background import load_background
from sidelight.training.fit import fit
from sidelight.training.keeping import gpu_pass_s
from sidelight.training.settings import FitOptions, suggested_settings
from sidelight_lab.bench.measurement import Record, conditions, table
from sidelight_lab.tables.runs import digest

States = Literal["disk", "stream"]
# The paper's training set and backbone: texts, tokens, blocks and width.
_WILDGUARD = (87_000, 20_000_000)
_LLAMA_3B = (28, 3072)
_SAMPLE_S = 0.5
# Windows of background traffic are positive if they have this word.
_WORD = "the"


@dataclass(frozen=True)
class Workload:
    """The workload of each training run.

    Attributes:
        model: Model, as in ``sidelight train``.
        words: Number of words per text.
        epochs: Passes over the texts.
        layers: Number of hidden states to read per token; None means all.
        memory: Maximum memory for hidden states, in GiB.
        threads: Number of threads.
    """

    model: str
    words: int
    epochs: int
    layers: int | None
    memory: float
    threads: int


@dataclass(frozen=True)
class Measured:
    """The measured cost of one training run.

    Attributes:
        states: How hidden states were stored.
        texts: Number of texts.
        tokens: Total number of tokens whose states are read.
        passes: Mean number of times that the model read a text.
        seconds: Training time, excluding loading the model.
        cpu_s: CPU seconds.
        memory_gb: Peak memory of the process.
        disk_gb: Peak disk space of the hidden states.
        auroc: AUROC on held-out texts.
    """

    states: States
    texts: int
    tokens: int
    passes: float
    seconds: float
    cpu_s: float
    memory_gb: float
    disk_gb: float
    auroc: float | None


def short_texts(count: int, words: int, *, seed: int = 0) -> LabelledExamples:
    """Distinct runs of words of the packaged background, labelled by whether they have one word.

    Raises:
        SidelightError: There are not enough texts.
    """
    runs: dict[str, bool] = {}
    for conversation in load_background("packaged").conversations:
        for message in conversation:
            words_of_message = message.content.split()
            for start in range(0, len(words_of_message) - words + 1, words):
                run = words_of_message[start : start + words]
                runs[" ".join(run)] = _WORD in run
    if len(runs) < count:
        raise SidelightError(
            f"The packaged background has {len(runs):,} texts of {words} words, but {count:,} "
            "were requested. Request fewer or shorter texts."
        )
    chosen = np.random.default_rng(seed).permutation(len(runs))[:count]
    texts = [*runs.items()]
    return load_examples([{"text": texts[i][0], "label": int(texts[i][1])} for i in chosen])


@dataclass
class _Counted:
    """A backbone that counts the tokens that it reads."""

    backbone: Any
    texts: int = 0
    tokens: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backbone, name)

    def states(self, cache: Any, rows: Sequence[int], advance: Any) -> Any:
        self.texts += len(rows)
        self.tokens += sum(cache.lengths[row] for row in rows)
        return self.backbone.states(cache, rows, advance)


@contextmanager
def _largest(folder: Path) -> Generator[list[int]]:
    """Track the peak size of a folder inside the block, in bytes."""
    most, ends = [0], threading.Event()

    def sample() -> None:
        while not ends.wait(_SAMPLE_S):
            most[0] = max(most[0], _bytes(folder))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        ends.set()
        thread.join()


def _bytes(folder: Path) -> int:
    size = 0
    # Folders and files may be removed meanwhile.
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += os.path.getsize(os.path.join(parent, name))
    return size


def train_once(states: States, texts: int, workload: Workload) -> tuple[Measured, dict[str, Any]]:
    """Run one training. Call this in a new process.

    Returns:
        The measured cost, and the conditions.
    """
    torch.set_num_threads(workload.threads)
    backbone = load_backbone(workload.model, device="cpu", for_probing=True)
    counted = _Counted(backbone)
    examples = short_texts(texts, workload.words)
    settings = replace(
        suggested_settings("readout"),
        epochs=workload.epochs,
        least_steps=0,
        layers=workload.layers,
    )
    with tempfile.TemporaryDirectory() as folder, _largest(Path(folder)) as disk:
        options = FitOptions(
            settings=settings,
            states=states,
            cache_root=Path(folder),
            memory_bytes=int(workload.memory * 2**30),
        )
        began, cpu = perf_counter(), process_time()
        result = fit(cast(Reader, counted), examples, None, name="bench", options=options)
        seconds, cpu_s = perf_counter() - began, process_time() - cpu
    passes = counted.texts / texts
    measured = Measured(
        states=states,
        texts=texts,
        tokens=round(counted.tokens / passes),
        passes=passes,
        seconds=seconds,
        cpu_s=cpu_s,
        memory_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        disk_gb=disk[0] / 1e9,
        auroc=result.report.metrics["auroc"].value,
    )
    return measured, conditions(backbone, {})


def measure_training(
    texts: Sequence[int], kinds: Sequence[States], workload: Workload, *, out: Path | None = None
) -> Record:
    """Train on each number of texts with each kind of states, each time in a new process.

    Args:
        texts: Numbers of texts.
        kinds: Ways to store hidden states.
        workload: Workload of each training run.
        out: Folder of the finished training runs, for resuming.
    """
    path = None
    if out is not None:
        path = out / "training" / f"{digest(asdict(workload))[:12]}.json"
    found: dict[str, Any] = {}
    if path is not None and path.exists():
        found = json.loads(path.read_text("utf-8"))
    works = [*product(kinds, texts)]
    with progress("Training", len(works), unit="trainings") as advance:
        for states, count in works:
            name = f"{states} {count}"
            if name not in found:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                    measured, where = process.submit(train_once, states, count, workload).result()
                found[name] = {"measured": asdict(measured), "where": where}
                if path is not None:
                    write_json(path, found)
            advance(1)
    runs = [Measured(**found[f"{states} {count}"]["measured"]) for states, count in works]
    where = found[f"{kinds[0]} {texts[0]}"]["where"] | asdict(workload) | {"background": "none"}
    hours = {states: _estimated_hours(_passes(runs, states)) for states in kinds}
    results = {"trainings": [asdict(run) for run in runs], "estimated_gpu_hours": hours}
    record = Record("training", where, results, [_table(runs), _estimate(hours)])
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        plot_training(runs).savefig(out / "training.svg", metadata={"Date": None})
    return record


def _passes(runs: Sequence[Measured], states: States) -> float:
    return max(run.passes for run in runs if run.states == states)


def _table(runs: Sequence[Measured]) -> str:
    headings = (
        "hidden states",
        "texts",
        "tokens",
        "passes",
        "seconds per 1,000 texts",
        "CPU seconds per 1,000 texts",
        "peak memory, GB",
        "peak disk, GB",
    )
    rows = [
        (
            run.states,
            f"{run.texts:,}",
            f"{run.tokens:,}",
            f"{run.passes:.1f}",
            f"{1000 * run.seconds / run.texts:.1f}",
            f"{1000 * run.cpu_s / run.texts:.1f}",
            f"{run.memory_gb:.2f}",
            f"{run.disk_gb:.2f}",
        )
        for run in runs
    ]
    return table("Training by number of texts", headings, rows)


def _estimated_hours(passes: float) -> float:
    """Hours of one GPU for the paper's training set and backbone, without the probe's own work."""
    return passes * _WILDGUARD[1] * gpu_pass_s(*_LLAMA_3B) / 3600


def _estimate(hours: Mapping[str, float]) -> str:
    texts, tokens = _WILDGUARD
    cells = ", ".join(f"{value:.1f} hours ({states})" for states, value in hours.items())
    return (
        f"Estimate, not measured: Llama-3.2-3B on one GPU reads {texts:,} texts of {tokens:,} "
        f"tokens in as many passes in {cells}."
    )


def plot_training(runs: Sequence[Measured]) -> Figure:
    """CPU seconds per 1,000 texts, memory and disk by the number of texts."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    panels: dict[str, Callable[[Measured], float]] = {
        "CPU seconds per 1,000 texts": lambda run: 1000 * run.cpu_s / run.texts,
        "Peak memory (GB)": lambda run: run.memory_gb,
        "Peak disk (GB)": lambda run: run.disk_gb,
    }
    for axes, (title, value) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for states in dict.fromkeys(run.states for run in runs):
            runs_of_states = [run for run in runs if run.states == states]
            axes.plot(
                [run.texts for run in runs_of_states],
                [*map(value, runs_of_states)],
                marker="o",
                label=states,
            )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("texts")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    return figure
