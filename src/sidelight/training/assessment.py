"""Probes of one training, measured on labelled rows that it did not see."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from sidelight.backbone import DtypeName, load_backbone
from sidelight.data.examples import LabelledExamples
from sidelight.errors import SidelightError
from sidelight.evaluation import Report, evaluate
from sidelight.probe import Probe
from sidelight.training.classifier import judge, require_responses
from sidelight.training.measuring import trained_text_warnings
from sidelight.training.runs import by_title, read_runs, summarise
from sidelight.training.traffic import beginning, kept_rate, rate_sentence

_SHOWN_MISTAKES = 5


@dataclass(frozen=True)
class Assessment:
    """How the probes did on some rows.

    Attributes:
        title: Which rows.
        examples: The rows.
        probe: The artifact's own: the run that validation data chose.
        probabilities: Its probabilities.
        report: Its figures.
        runs: The reports of every run trained with it, itself included, by title.
    """

    title: str
    examples: LabelledExamples
    probe: Probe
    probabilities: Float[np.ndarray, "row output"]
    report: Report
    runs: Mapping[str, Sequence[Report]]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know of the rows, one sentence each."""
        warnings = trained_text_warnings(self.probe.record, self.examples)
        return (*self.examples.warnings, *warnings)

    @property
    def mistakes(self) -> list[str]:
        """The wrong decisions of which the probe was surest, a line each."""
        task, probabilities = self.probe.task, self.probabilities
        if task.kind == "multiclass":
            holds = self.examples.labels[:, None] == np.arange(task.outputs)
            thresholds = np.zeros(task.outputs)
            is_wrong = (probabilities == probabilities.max(1, keepdims=True)) & ~holds
        else:
            holds = self.examples.labels.reshape(probabilities.shape).astype(bool)
            thresholds = np.array(self.probe.thresholds)
            is_wrong = (probabilities >= thresholds) != holds
        distances = np.where(is_wrong, np.abs(probabilities - thresholds), 0)
        order = np.argsort(-distances, axis=None, kind="stable")[:_SHOWN_MISTAKES].tolist()
        worst = [divmod(place, task.outputs) for place in order if distances.flat[place]]
        names = task.labels[-task.outputs :]
        return [
            f"  {'missed' if holds[row, output] else 'wrongly'} '{names[output]}' "
            f"{probabilities[row, output]:.2f}  {beginning(self.examples.items[row].text)}"
            for row, output in worst
        ]

    def __str__(self) -> str:
        """The thresholds, what they let pass of ordinary traffic, and the mistakes."""
        thresholds = self.probe.label_thresholds.items()
        lines = [f"Threshold of '{label}': {threshold:.3f}" for label, threshold in thresholds]
        flagged, conversations = kept_rate(self.probe)
        if conversations:
            abstains = self.probe.task.abstains
            lines.append(rate_sentence(flagged, conversations, abstains=abstains))
        elif lines:
            lines.append(
                "The probe keeps no figures of ordinary traffic: it was trained without background."
            )
        if mistakes := self.mistakes:
            lines += ["Wrong decisions of which it was surest:", *mistakes]
        return "\n".join(lines)


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
    every = np.arange(len(examples))
    rows = {"All rows": every}
    if subset is not None:
        rows[subset] = every[[value is True for value in examples.truth_values(subset)]]
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
    pairs = zip(probes, judge(backbone, probes, examples.items), strict=True)
    probabilities = [probe.calibration.apply(logits) for probe, logits in pairs]
    assessments: list[Assessment] = []
    for title, selected in rows.items():
        labels = examples.labels[selected]
        reports = [
            evaluate(probe.task, values[selected], labels, thresholds=probe.thresholds)
            for probe, values in zip(probes, probabilities, strict=True)
        ]
        assessments.append(
            Assessment(
                title,
                examples if selected is every else examples.select(selected),
                chosen,
                probabilities[index][selected],
                reports[index],
                by_title(probes, reports),
            )
        )
    return assessments


def describe(assessments: Sequence[Assessment]) -> dict[str, Any]:
    """The chosen probe's metrics on all rows at the top level, then the subset and the runs."""
    whole, *subsets = assessments
    return {
        "probe": whole.probe.name,
        "mechanism": whole.probe.spec.name,
        **whole.report.to_dict(),
        "traffic": dict(zip(("flagged", "conversations"), kept_rate(whole.probe), strict=True)),
        "warnings": list(whole.warnings),
        "runs": summarise(whole.runs),
        "subsets": {
            subset.title: {**subset.report.to_dict(), "runs": summarise(subset.runs)}
            for subset in subsets
        },
    }


def plot(assessments: Sequence[Assessment], directory: Path) -> None:
    """Draws the chosen probe's plots, a folder for each set of rows."""
    from sidelight.plots import plot_report

    for assessment in assessments:
        plot_report(
            assessment.probe.task,
            assessment.probabilities,
            assessment.examples.labels,
            directory / assessment.title.lower().replace(" ", "_"),
            thresholds=assessment.probe.thresholds,
            title=f"{assessment.probe.name}: {assessment.title.lower()}",
        )
