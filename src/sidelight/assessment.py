"""Probes on labelled data that training did not see: one forward pass for a folder's runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sidelight.backbones import DtypeName, TransformersBackbone, load_backbone
from sidelight.bank import Bank
from sidelight.classifier import encode, require_finite, require_responses
from sidelight.data import Examples, OnMissingLabel, load_examples
from sidelight.data.truth_values import Truth, truth_values
from sidelight.errors import SidelightError
from sidelight.evaluation import Report, evaluate
from sidelight.mechanisms import spec_titles
from sidelight.plots import plot_report
from sidelight.probe import Probe
from sidelight.runs import Measured, StoredRuns, read_runs, summarise
from sidelight.scoring import score


@dataclass(frozen=True)
class Columns:
    """Names of a file's columns; see ``load_examples``."""

    text: str = "text"
    label: str = "label"
    response: str | None = None


@dataclass(frozen=True)
class Assessment:
    """How probes did on some rows.

    Attributes:
        title: Which rows.
        chosen: The artifact's own probe: the run that validation data chose.
        probabilities: Of the chosen probe, ``[row, output]``.
        labels: As in ``Examples.labels``.
        report: Of the chosen probe.
        runs: Every run trained with it, the chosen one included.
        warnings: What the user should know of the data, one sentence each.
    """

    title: str
    chosen: Probe
    probabilities: np.ndarray
    labels: np.ndarray
    report: Report
    runs: tuple[Measured, ...]
    warnings: tuple[str, ...]


def assess(
    directory: Path,
    data: str,
    *,
    columns: Columns,
    split: str | None = None,
    on_missing_label: OnMissingLabel = "error",
    subset: str | None = None,
    model: str | None = None,
    dtype: DtypeName = "auto",
    device: str = "auto",
) -> list[Assessment]:
    """The assessment on all rows, and then on the rows of ``subset`` if it is given.

    Args:
        directory: An artifact that ``sidelight train`` wrote.
        data: A file or a hub data set.
        columns: Where text, label and response are.
        split: Split of a hub data set.
        on_missing_label: Whether a row without a label is an error, or is left out.
        subset: A column; its true rows are reported as well.
        model: The backbone's name; None takes the one that the probe was trained under.
        dtype: Of the backbone.
        device: Of the backbone.

    Raises:
        SidelightError: The artifact, data or backbone do not fit each other; before the backbone
            runs where that can be told.
    """
    stored = read_runs(directory)
    chosen = stored.probes[stored.chosen]
    examples = load_examples(
        data,
        text=columns.text,
        label=columns.label,
        response=columns.response,
        split=split,
        task=chosen.task,
        on_missing_label=on_missing_label,
    )
    require_responses(chosen, examples.items)
    backbone = load_backbone(
        model or chosen.fingerprint.name,
        dtype=dtype,
        device=device,
        prompt_format=chosen.prompt_format,
    )
    rows = {"All rows": np.arange(len(examples))}
    if subset is not None:
        rows[subset] = _true_rows(examples, subset)
    logits = _all_logits(backbone, stored.probes, examples)
    return [_assess_rows(title, stored, logits, examples, at) for title, at in rows.items()]


def describe(assessments: Sequence[Assessment]) -> dict[str, Any]:
    """The chosen probe's metrics on all rows at the top level, then the subset and the runs."""
    whole, *parts = assessments
    return {
        "probe": whole.chosen.name,
        "mechanism": whole.chosen.spec.name,
        **whole.report.to_dict(),
        "warnings": list(whole.warnings),
        "runs": summarise(whole.runs),
        "subsets": {
            part.title: {**part.report.to_dict(), "runs": summarise(part.runs)} for part in parts
        },
    }


def plot(assessments: Sequence[Assessment], directory: Path) -> list[Path]:
    """Draws the chosen probe's plots, a folder for each set of rows."""
    return [
        path
        for one in assessments
        for path in plot_report(
            one.chosen.task,
            one.probabilities,
            one.labels,
            directory / one.title.lower().replace(" ", "_"),
            thresholds=one.chosen.thresholds,
            title=f"{one.chosen.name}: {one.title.lower()}",
        )
    ]


def _all_logits(
    backbone: TransformersBackbone, probes: Sequence[Probe], examples: Examples
) -> list[np.ndarray]:
    for probe in probes:
        probe.fingerprint.require(backbone.fingerprint, probe=probe.name)
    # Runs of one training share a name, which a bank does not allow.
    renamed = [replace(probe, name=f"{probe.name}/{i}") for i, probe in enumerate(probes)]
    bank = Bank(renamed, device=backbone.device)
    logits = score(backbone, bank, encode(backbone, examples.items))
    for probe, own in zip(probes, logits, strict=True):
        require_finite(probe, own, examples.items)
    return logits


def _assess_rows(
    title: str,
    stored: StoredRuns,
    logits: Sequence[np.ndarray],
    examples: Examples,
    rows: np.ndarray,
) -> Assessment:
    assert examples.labels is not None
    labels = examples.labels[rows]
    pairs = zip(stored.probes, logits, strict=True)
    probabilities = [probe.calibration.apply(own[rows]) for probe, own in pairs]
    reports = [
        evaluate(probe.task, own, labels, thresholds=probe.thresholds)
        for probe, own in zip(stored.probes, probabilities, strict=True)
    ]
    titles = spec_titles([probe.spec for probe in stored.probes])
    measured = zip(titles, reports, strict=True)
    return Assessment(
        title=title,
        chosen=stored.probes[stored.chosen],
        probabilities=probabilities[stored.chosen],
        labels=labels,
        report=reports[stored.chosen],
        runs=tuple(Measured(title, report) for title, report in measured),
        warnings=examples.warnings,
    )


def _true_rows(examples: Examples, column: str) -> np.ndarray:
    # An absent column is an error that names the known ones.
    examples.column(column)
    values = truth_values(examples, column) or ()
    rows = np.flatnonzero([value is Truth.HOLDS for value in values])
    if not len(rows):
        raise SidelightError(
            f"No row has a true '{column}' (1, true or yes). Name another column with --subset."
        )
    return rows
