"""Probes trained together: stored side by side, and compared.

The best run's artifact lies in the folder itself, every run's in ``runs/``.
"""

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from sidelight.artifact import load_probe, save_probe
from sidelight.evaluation import Report, SpanReport
from sidelight.manifest import MANIFEST, WEIGHTS, read_manifest
from sidelight.mechanisms.base import spec_titles
from sidelight.probe import Probe
from sidelight.storage import write_json
from sidelight.training.traffic import Traffic

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


RUNS, _COMPARISON = "runs", "training.json"
SHOWN_METRICS = ("auprc", "auroc", "f1", "accuracy", "macro_f1", "recall_at_1pct_fpr", "ece")
# The width of a table that is not shown in a terminal.
_WIDTH = 110


@dataclass(frozen=True)
class FittedProbe:
    """One trained probe.

    Attributes:
        probe: Ready to serve.
        score: ``validation_score`` of its final logits; the best run is chosen by it.
        report: Its figures on validation data, each text calibrated without it.
        losses: The log loss of each validation text, likewise.
        traffic: Its figures in ordinary traffic; None if it was trained without.
        spans: Its figures of the spans of validation texts, by thresholds that other texts gave;
            None if it labels whole texts.
    """

    probe: Probe
    score: float
    report: Report
    losses: Float[np.ndarray, " text"]
    traffic: Traffic | None = None
    spans: SpanReport | None = None

    @property
    def seed(self) -> int:
        """The seed that it was trained with."""
        return self.probe.record["seed"]


@dataclass(frozen=True)
class Fit:
    """Everything that one call to ``fit`` made.

    Attributes:
        runs: One per mechanism and seed.
        best: The best run of the mechanism whose mean validation score is the best.
        baseline: The figures of TF-IDF with logistic regression on the same validation texts; None
            for spans.
        warnings: What the user should know, one sentence each.
    """

    runs: tuple[FittedProbe, ...]
    best: FittedProbe
    baseline: Report | None
    warnings: tuple[str, ...]

    @property
    def by_folder(self) -> dict[str, FittedProbe]:
        """The runs by the names of their folders."""
        titles = spec_titles([run.probe.spec for run in self.runs])
        return {
            f"{title.replace(' ', '-')}-seed{run.seed}": run
            for title, run in zip(titles, self.runs, strict=True)
        }

    @property
    def comparison(self) -> dict[str, list[Report]]:
        """The reports of each mechanism's seeds, and of the baseline, by title."""
        runs = by_title([run.probe for run in self.runs], [run.report for run in self.runs])
        return runs if self.baseline is None else {**runs, "TF-IDF baseline": [self.baseline]}

    def to_dict(self) -> dict[str, Any]:
        """The comparison on validation data, as JSON values."""
        return {
            "best": {"mechanism": self.best.probe.spec.name, "seed": self.best.seed},
            "validation": summarise(self.comparison),
            "runs": [
                {
                    "name": name,
                    "mechanism": run.probe.spec.name,
                    "seed": run.seed,
                    "score": run.score,
                    "validation": run.report.to_dict(),
                    "traffic": None if run.traffic is None else run.traffic.to_dict(),
                    **({} if run.spans is None else {"spans": run.spans.to_dict()}),
                }
                for name, run in self.by_folder.items()
            ],
            "warnings": list(self.warnings),
        }

    def table(self) -> "Table":
        """The comparison on validation data, for a terminal."""
        if self.best.spans is not None:
            return self.best.spans.table()
        folds = self.best.probe.record["folds"]
        title = f"All texts, each judged without it ({folds} folds)" if folds else "Validation data"
        return comparison_table(title, self.comparison)

    def __str__(self) -> str:
        """The figures in ordinary traffic, and the best run."""
        traffic, spec = self.best.traffic, self.best.probe.spec
        best = f"Best: {spec.name}, seed {self.best.seed}."
        if self.best.spans is not None:
            best += f" Tokens that it looks ahead: {spec.options['lookahead']}."
        return f"{traffic}\n{best}" if traffic is not None and traffic.conversations else best


def write_fit(result: Fit, directory: Path) -> None:
    """Stores the best probe, every run, and the comparison (``training.json``).

    The runs of an earlier training in the folder are removed; what else lies in ``runs/`` stays.
    """
    remove_training(directory)
    for name, run in result.by_folder.items():
        save_probe(run.probe, directory / RUNS / name)
    save_probe(result.best.probe, directory)
    write_json(directory / _COMPARISON, result.to_dict())


def remove_training(directory: Path) -> None:
    """Removes what ``write_fit`` has written beside a probe."""
    for folder in _run_folders(directory):
        shutil.rmtree(folder)
    (directory / _COMPARISON).unlink(missing_ok=True)


def read_runs(directory: Path) -> tuple[Sequence[Probe], int]:
    """The probes that were trained together, and the index of the one that is the artifact itself.

    The artifact alone if it is none of the stored runs.
    """
    folders = _run_folders(directory)
    # What decides; a recalibrated probe has the weights of its run, and decides otherwise.
    deciding = attrgetter("weights_sha256", "calibration", "thresholds")
    runs = [deciding(read_manifest(folder)) for folder in folders]
    chosen = deciding(read_manifest(directory))
    if chosen not in runs:
        return [load_probe(directory)], 0
    return [load_probe(folder) for folder in folders], runs.index(chosen)


def _run_folders(directory: Path) -> list[Path]:
    """The folders of runs; ``runs`` is also where other programs keep their logs."""
    weights = sorted((directory / RUNS).glob(f"*/{WEIGHTS}"))
    return [path.parent for path in weights if (path.parent / MANIFEST).exists()]


def by_title(probes: Sequence[Probe], reports: Sequence[Report]) -> dict[str, list[Report]]:
    """The reports of a mechanism's seeds, by a title that tells it from the others."""
    grouped: dict[str, list[Report]] = {}
    titles = spec_titles([probe.spec for probe in probes])
    for title, report in zip(titles, reports, strict=True):
        grouped.setdefault(title, []).append(report)
    return grouped


def summarise(comparison: Mapping[str, Sequence[Report]]) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation over seeds of each metric that is defined, by title."""
    return {
        name: {
            metric: {"mean": float(np.mean(values)), "std": _spread(values)}
            for metric in SHOWN_METRICS
            if (values := _values(reports, metric))
        }
        for name, reports in comparison.items()
    }


def comparison_table(title: str, comparison: Mapping[str, Sequence[Report]]) -> "Table":
    """A line for each probe: mean over seeds, ± the standard deviation if there are several."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("probe")
    table.add_column("seeds", justify="right")
    for metric in SHOWN_METRICS:
        table.add_column(metric.replace("recall_at_1pct_fpr", "rec@1%fpr"), justify="right")
    for name, reports in comparison.items():
        cells = [_cell(_values(reports, metric)) for metric in SHOWN_METRICS]
        table.add_row(name, str(len(reports)), *cells)
    return table


def console() -> "Console":
    """A console for tables, as wide as the terminal or wide enough for a log."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _WIDTH)


def _values(reports: Sequence[Report], metric: str) -> list[float]:
    values = [report.metrics[metric].value for report in reports]
    return [value for value in values if value is not None]


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean}±{_spread(values):.3f}"


def _spread(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
