"""Probes trained together: stored side by side, compared, and measured on other data.

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

from sidelight.artifact import load_probe, save_probe
from sidelight.backbone import DtypeName, load_backbone
from sidelight.data.examples import LabelledExamples
from sidelight.errors import SidelightError
from sidelight.evaluation import Report, evaluate
from sidelight.manifest import MANIFEST, WEIGHTS, read_manifest
from sidelight.mechanisms.base import spec_titles
from sidelight.probe import Probe
from sidelight.storage import write_json
from sidelight.training.classifier import judge, require_responses
from sidelight.training.fit import Fit, FittedProbe
from sidelight.training.measuring import (
    beginning,
    kept_rate,
    rate_sentence,
    trained_text_warnings,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


RUNS = "runs"
_SHOWN_MISTAKES = 5
SHOWN_METRICS = ("auprc", "auroc", "f1", "accuracy", "macro_f1", "recall_at_1pct_fpr", "ece")
# The width of a table that is not shown in a terminal.
_WIDTH = 110


def write_fit(made: Fit, directory: Path) -> None:
    """Stores the best probe, every run, and the comparison (``training.json``).

    The runs of an earlier training in the folder are removed; what else lies in ``runs/`` stays.
    """
    for folder in _run_folders(directory):
        shutil.rmtree(folder)
    for name, run in _named(made):
        save_probe(run.probe, directory / RUNS / name)
    save_probe(made.best.probe, directory)
    write_json(directory / "training.json", describe_fit(made))


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


def describe_fit(made: Fit) -> dict[str, Any]:
    """The comparison on validation data, as JSON values."""
    return {
        "best": {"mechanism": made.best.probe.spec.name, "seed": made.best.seed},
        "validation": summarise(_comparison(made)),
        "runs": [
            {
                "name": name,
                "mechanism": run.probe.spec.name,
                "seed": run.seed,
                "score": run.score,
                "validation": run.report.to_dict(),
                "traffic": None if run.traffic is None else run.traffic.to_dict(),
            }
            for name, run in _named(made)
        ],
        "warnings": list(made.warnings),
    }


def fit_table(made: Fit) -> "Table":
    """The comparison on validation data, for a terminal."""
    folds = made.best.probe.record["folds"]
    title = f"All texts, each judged without it ({folds} folds)" if folds else "Validation data"
    return comparison_table(title, _comparison(made))


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


def _run_folders(directory: Path) -> list[Path]:
    """The folders of runs; ``runs`` is also where other programs keep their logs."""
    weights = sorted((directory / RUNS).glob(f"*/{WEIGHTS}"))
    return [path.parent for path in weights if (path.parent / MANIFEST).exists()]


def _comparison(made: Fit) -> dict[str, list[Report]]:
    runs = _by_title([run.probe for run in made.runs], [run.report for run in made.runs])
    return {**runs, "TF-IDF baseline": [made.baseline]}


def _by_title(probes: Sequence[Probe], reports: Sequence[Report]) -> dict[str, list[Report]]:
    """The reports of a mechanism's seeds, by a title that tells it from the others."""
    grouped: dict[str, list[Report]] = {}
    titles = spec_titles([probe.spec for probe in probes])
    for title, report in zip(titles, reports, strict=True):
        grouped.setdefault(title, []).append(report)
    return grouped


def _named(made: Fit) -> list[tuple[str, FittedProbe]]:
    """Each run with the name of its folder."""
    titles = spec_titles([run.probe.spec for run in made.runs])
    return [
        (f"{title.replace(' ', '-')}-seed{run.seed}", run)
        for title, run in zip(titles, made.runs, strict=True)
    ]


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


@dataclass(frozen=True)
class Assessment:
    """How probes did on some rows.

    Attributes:
        title: Which rows.
        chosen: The artifact's own probe: the run that validation data chose.
        probabilities: Of the chosen probe, ``[row, output]``.
        labels: As in ``LabelledExamples.labels``.
        report: Of the chosen probe.
        runs: The reports of every run trained with it, itself included, by title.
        warnings: What the user should know of the data, one sentence each.
        mistakes: The worst wrong decisions of the chosen probe, a line each.
    """

    title: str
    chosen: Probe
    probabilities: np.ndarray
    labels: np.ndarray
    report: Report
    runs: Mapping[str, Sequence[Report]]
    warnings: tuple[str, ...]
    mistakes: tuple[str, ...]

    def __str__(self) -> str:
        """The thresholds, what they let pass of ordinary traffic, and the mistakes."""
        points = self.chosen.label_thresholds.items()
        lines = [f"Threshold of '{label}': {threshold:.3f}" for label, threshold in points]
        flagged, conversations = kept_rate(self.chosen)
        if conversations:
            abstains = self.chosen.task.abstains
            lines.append(rate_sentence(flagged, conversations, abstains=abstains))
        elif lines:
            lines.append(
                "The probe keeps no figures of ordinary traffic: it was trained without background."
            )
        if self.mistakes:
            lines += ["Wrong decisions of which it was surest:", *self.mistakes]
        return "\n".join(lines)


def _mistakes(
    probe: Probe, probabilities: np.ndarray, examples: LabelledExamples, rows: np.ndarray
) -> tuple[str, ...]:
    """The wrong decisions that are farthest from right, a line each."""
    task, labels = probe.task, examples.labels[rows]
    if task.kind == "multiclass":
        holds = labels[:, None] == np.arange(task.outputs)
        decided = probabilities == probabilities.max(1, keepdims=True)
        distances = np.where(decided & ~holds, probabilities, 0)
    else:
        holds = labels.reshape(probabilities.shape).astype(bool)
        thresholds = np.array(probe.thresholds)
        distances = np.where(
            (probabilities >= thresholds) != holds, np.abs(probabilities - thresholds), 0
        )
    order = np.argsort(-distances, axis=None, kind="stable")[:_SHOWN_MISTAKES].tolist()
    wrong = [divmod(place, probabilities.shape[1]) for place in order if distances.flat[place]]
    names = task.labels[-task.outputs :]
    return tuple(
        f"  {'missed' if holds[row, output] else 'wrongly'} '{names[output]}' "
        f"{probabilities[row, output]:.2f}  {beginning(examples.items[rows[row]].text)}"
        for row, output in wrong
    )


def assess(
    directory: Path,
    examples: LabelledExamples,
    *,
    subset: str | None = None,
    model: str | None = None,
    dtype: DtypeName = "auto",
    device: str = "auto",
) -> list[Assessment]:
    """Measures a folder's probes, by one forward pass: on all rows, then on those of ``subset``.

    Args:
        directory: An artifact that ``sidelight train`` wrote.
        examples: Loaded with the task in its manifest.
        subset: A column; its true rows are reported as well.
        model: The backbone's name; None takes the one that the probe was trained under.
        dtype: Of the backbone.
        device: Of the backbone.

    Raises:
        SidelightError: The artifact, texts or backbone do not fit each other; before the backbone
            runs wherever that is possible.
    """
    probes, index = read_runs(directory)
    chosen = probes[index]
    require_responses(chosen, examples.items)
    rows = {"All rows": np.arange(len(examples))}
    if subset is not None:
        rows[subset] = np.flatnonzero(
            [is_true is True for is_true in examples.truth_values(subset)]
        )
        if not len(rows[subset]):
            raise SidelightError(
                f"No row has a true '{subset}' (1, true or yes). Name another column with --subset."
            )
    backbone = load_backbone(
        model or chosen.fingerprint.name,
        dtype=dtype,
        device=device,
        prompt_format=chosen.prompt_format,
    )
    for probe in probes:
        probe.fingerprint.require(backbone.fingerprint, probe=probe.name)
    logits = judge(backbone, probes, examples.items)
    warnings = (*examples.warnings, *trained_text_warnings(chosen.record, examples))
    assessments: list[Assessment] = []
    for title, at in rows.items():
        labels = examples.labels[at]
        probabilities = [
            probe.calibration.apply(own[at]) for probe, own in zip(probes, logits, strict=True)
        ]
        reports = [
            evaluate(probe.task, own, labels, thresholds=probe.thresholds)
            for probe, own in zip(probes, probabilities, strict=True)
        ]
        runs = _by_title(probes, reports)
        assessments.append(
            Assessment(
                title,
                chosen,
                probabilities[index],
                labels,
                reports[index],
                runs,
                warnings,
                _mistakes(chosen, probabilities[index], examples, at),
            )
        )
    return assessments


def describe(assessments: Sequence[Assessment]) -> dict[str, Any]:
    """The chosen probe's metrics on all rows at the top level, then the subset and the runs."""
    whole, *parts = assessments
    return {
        "probe": whole.chosen.name,
        "mechanism": whole.chosen.spec.name,
        **whole.report.to_dict(),
        "traffic": dict(zip(("flagged", "conversations"), kept_rate(whole.chosen), strict=True)),
        "warnings": list(whole.warnings),
        "runs": summarise(whole.runs),
        "subsets": {
            part.title: {**part.report.to_dict(), "runs": summarise(part.runs)} for part in parts
        },
    }


def plot(assessments: Sequence[Assessment], directory: Path) -> None:
    """Draws the chosen probe's plots, a folder for each set of rows."""
    from sidelight.plots import plot_report

    for one in assessments:
        plot_report(
            one.chosen.task,
            one.probabilities,
            one.labels,
            directory / one.title.lower().replace(" ", "_"),
            thresholds=one.chosen.thresholds,
            title=f"{one.chosen.name}: {one.title.lower()}",
        )
