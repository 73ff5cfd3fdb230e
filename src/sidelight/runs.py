"""Probes trained together: how they are stored side by side, compared, and shown.

The best run's artifact lies in the folder itself, every run's in ``runs/``.
"""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sidelight.artifact import WEIGHTS, load_probe, save_probe
from sidelight.errors import SidelightError
from sidelight.evaluation import Report
from sidelight.fitting import Fit, Run
from sidelight.manifest import MANIFEST, read_manifest
from sidelight.mechanisms import spec_titles
from sidelight.probe import Probe
from sidelight.storage import write_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

RUNS = "runs"
SHOWN_METRICS = ("auprc", "auroc", "f1", "accuracy", "macro_f1", "recall_at_1pct_fpr", "ece")
# Of tables that no terminal shows.
_WIDTH = 110


@dataclass(frozen=True)
class Measured:
    """A row of a comparison.

    Attributes:
        name: Mechanism, with its options where they tell it from another, or baseline.
        report: Of one seed.
    """

    name: str
    report: Report


@dataclass(frozen=True)
class StoredRuns:
    """Probes that were trained together.

    Attributes:
        probes: Every run.
        chosen: Which of them the artifact itself is.
    """

    probes: tuple[Probe, ...]
    chosen: int


def check_folder(directory: Path) -> None:
    """Checks that a folder can be written, before hours of work go to it; leaves no new one.

    Raises:
        SidelightError: It cannot be written.
    """
    new = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
        for folder in new:
            folder.rmdir()
    except OSError as error:
        raise SidelightError(
            f"Cannot write to {directory}: {error.strerror}. Name another folder with --out."
        ) from error


def holds_probe(directory: Path) -> bool:
    """Whether a probe stored in the folder would replace one.

    Raises:
        SidelightError: It would replace another program's file.
    """
    has_manifest = (directory / MANIFEST).exists()
    if has_manifest and not (directory / WEIGHTS).exists():
        raise SidelightError(
            f"{directory / MANIFEST} belongs to no probe, and a probe's would replace it. Name "
            "another folder with --out."
        )
    return has_manifest


def write_fit(made: Fit, directory: Path) -> None:
    """Stores the best probe, every run, and the comparison (``training.json``).

    The runs of an earlier training in the folder are removed; what else lies in ``runs/`` stays.
    """
    for folder in _run_folders(directory):
        shutil.rmtree(folder)
    for run, title in zip(made.runs, _titles(made), strict=True):
        save_probe(run.probe, directory / RUNS / _run_name(run, title))
    save_probe(made.best.probe, directory)
    write_json(directory / "training.json", describe_fit(made))


def read_runs(directory: Path) -> StoredRuns:
    """Every run stored under an artifact, or the artifact alone where it is none of them."""
    folders = _run_folders(directory)
    hashes = [read_manifest(folder).weights_sha256 for folder in folders]
    chosen = read_manifest(directory).weights_sha256
    if chosen not in hashes:
        return StoredRuns((load_probe(directory),), 0)
    return StoredRuns(tuple(map(load_probe, folders)), hashes.index(chosen))


def describe_fit(made: Fit) -> dict[str, Any]:
    """The comparison on validation data, as JSON values."""
    return {
        "best": {"mechanism": made.best.probe.spec.name, "seed": made.best.seed},
        "validation": summarise(_measured(made)),
        "runs": [
            {
                "name": _run_name(run, title),
                "mechanism": run.probe.spec.name,
                "seed": run.seed,
                "validation": run.report.to_dict(),
            }
            for run, title in zip(made.runs, _titles(made), strict=True)
        ],
        "warnings": list(made.warnings),
    }


def fit_table(made: Fit) -> "Table":
    """The comparison on validation data, for a terminal."""
    folds = made.best.probe.record["folds"]
    title = f"All texts, each judged without it ({folds} folds)" if folds else "Validation data"
    return comparison_table(title, _measured(made))


def summarise(rows: Sequence[Measured]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and standard deviation over seeds of each metric that is defined, by name."""
    return {
        name: {
            metric: {"mean": float(np.mean(values)), "std": _spread(values)}
            for metric in SHOWN_METRICS
            if (values := _values(reports, metric))
        }
        for name, reports in _by_name(rows).items()
    }


def comparison_table(title: str, rows: Sequence[Measured]) -> "Table":
    """One line per name: mean over seeds, ± the standard deviation where there are several."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("probe")
    table.add_column("seeds", justify="right")
    for metric in SHOWN_METRICS:
        table.add_column(metric.replace("recall_at_1pct_fpr", "rec@1%fpr"), justify="right")
    for name, reports in _by_name(rows).items():
        cells = [_cell(_values(reports, metric)) for metric in SHOWN_METRICS]
        table.add_row(name, str(len(reports)), *cells)
    return table


def console() -> "Console":
    """For tables: as wide as the terminal, or wide enough for a log."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _WIDTH)


def _run_folders(directory: Path) -> list[Path]:
    """The folders of runs; ``runs`` is also where other programs keep their logs."""
    weights = sorted((directory / RUNS).glob(f"*/{WEIGHTS}"))
    return [path.parent for path in weights if (path.parent / MANIFEST).exists()]


def _measured(made: Fit) -> list[Measured]:
    titles = _titles(made)
    rows = [Measured(title, run.report) for title, run in zip(titles, made.runs, strict=True)]
    return [*rows, Measured("TF-IDF baseline", made.baseline)]


def _titles(made: Fit) -> list[str]:
    return spec_titles([run.probe.spec for run in made.runs])


def _run_name(run: Run, title: str) -> str:
    return f"{title.replace(' ', '-')}-seed{run.seed}"


def _by_name(rows: Sequence[Measured]) -> dict[str, list[Report]]:
    grouped: dict[str, list[Report]] = {}
    for row in rows:
        grouped.setdefault(row.name, []).append(row.report)
    return grouped


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
