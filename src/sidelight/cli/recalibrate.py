"""``sidelight recalibrate``: fit a probe to new traffic without training."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli import options
from sidelight.cli.runtime import Runtime
from sidelight.errors import FingerprintMismatchError, SidelightError
from sidelight.guards import is_guard
from sidelight.probes.hub import is_on_hub

if TYPE_CHECKING:
    from sidelight.data.examples import LabelledExamples
    from sidelight.data.loading import OnMissingLabel
    from sidelight.probes.card import ProbeCard
    from sidelight.probes.probe import Probe
    from sidelight.statistics.thresholds import ThresholdRule
    from sidelight.training.recalibration import Recalibrated


@click.command(
    epilog=options.examples(
        "sidelight recalibrate probes/toxicity --data recent.jsonl",
        "sidelight recalibrate probes/toxicity --data recent.jsonl --label toxic --out probes/new",
        "sidelight recalibrate probes/toxicity --threshold fpr=0.01 --out probes/strict",
    )
)
@click.argument("probe", type=options.PATH)
@options.optional_data
@options.columns
@options.missing_label
@options.threshold(show_default="what they were chosen for before")
@options.new_folder("--out", help="Output folder. [default: PROBE-recalibrated]")
@click.option("--force", is_flag=True, help="Replace the probe in the --out folder.")
@click.option(
    "--name", help="Name of the new probe, to serve it next to the old one. [default: unchanged]"
)
@options.backbone
@options.as_json
def recalibrate(
    probe: Path,
    data: str | None,
    missing_label: "OnMissingLabel",
    threshold: str | None,
    out: Path | None,
    force: bool,
    name: str | None,
    runtime: Runtime,
    as_json: bool,
    **columns: Any,
) -> None:
    """Fit a probe's probabilities and thresholds to new traffic, without training.

    Labelled texts set the calibration and the thresholds, as in training. Without --data, the
    thresholds move to the --threshold objective on the held-out curve in the card. The original
    probe is unchanged; the card of the new probe records what it was recalibrated on.
    """
    from sidelight.probes.card import read_card, require_free, require_name
    from sidelight.statistics.thresholds import ThresholdRule
    from sidelight.training.recalibration import recalibrate as refit
    from sidelight.training.recalibration import require_recalibratable

    rule = None if threshold is None else ThresholdRule.parse(threshold)
    _require_aim(data, rule)
    if is_guard(probe) or is_on_hub(probe):
        if out is None:
            raise SidelightError(f"Name a folder for the recalibrated {probe} with --out.")
        probe = runtime.probe_folder(probe)
    folder = out or probe.resolve().with_name(f"{probe.resolve().name}-recalibrated")
    require_free(folder, force=force)
    if name is not None:
        require_name(name)
    # Before slow imports and model loading, so that a wrong probe is refused immediately.
    card = read_card(probe)
    require_recalibratable(card, rule, by_texts=data is not None)
    columns["on_missing_label"] = missing_label
    examples = None if data is None else _new_texts(data, card, **columns)
    options.announce("Loading the probe" if examples is None else "Loading the model")
    from sidelight.probes.artifact import load_probe, save_probe

    loaded = load_probe(probe)
    if examples is None:
        recalibrated = refit(loaded, rule=rule)
    else:
        classifier = runtime.load_classifier(probe)
        trained_on, copy = loaded.card.backbone, classifier.backbone.fingerprint
        if trained_on.differences(copy):
            raise FingerprintMismatchError(
                f"'{loaded.name}' is accepted on {copy.name}, but cannot be recalibrated on it, "
                f"because the new probe would belong to {trained_on.name}. Recalibrate it on "
                f"{trained_on.name}, or train a probe on the copy."
            )
        recalibrated = refit(loaded, examples, classifier.logits(examples.items), rule=rule)
    save_probe(
        recalibrated.probe if name is None else recalibrated.probe.changed(name=name), folder
    )
    _report(loaded, recalibrated, folder, as_json=as_json)


def _require_aim(data: str | None, rule: "ThresholdRule | None") -> None:
    if data is None and rule is None:
        raise SidelightError(
            "There is nothing to recalibrate by. Name labelled texts with --data, or a rule for "
            "the thresholds with --threshold."
        )


def _new_texts(data: str, card: "ProbeCard", **columns: Any) -> "LabelledExamples":
    """Load the labelled texts, and check that the probe can classify them and was not trained on
    them.
    """
    options.announce(f"Reading {data}")
    from sidelight.data.loading import load_examples
    from sidelight.training.recalibration import require_new_texts
    from sidelight.training.validation import require_side

    examples = load_examples(data, task=card.task, **columns)
    require_side(card, examples.items)
    require_new_texts(card, examples)
    return examples


def _report(before: "Probe", recalibrated: "Recalibrated", folder: Path, *, as_json: bool) -> None:
    """Print the metrics and thresholds before and after."""
    from sidelight.cli.show import print_reports, summary

    *_, entry = recalibrated.probe.card.training.recalibrations
    if as_json:
        values = entry.model_dump(mode="json")
        click.echo(json.dumps({"out": str(folder), **values}, indent=2))
        return
    if recalibrated.reports is not None:
        title = f"{recalibrated.reports[0].rows:,} labelled texts, each calibrated without it"
        old, new = recalibrated.reports
        print_reports(title, {"before": old, "after": new})
        click.echo(f"Before: {summary(old, (0, 0))}\nAfter: {summary(new, (0, 0))}")
    what = entry.what
    click.echo(f"{what[0].upper()}{what[1:]}.")
    curves = recalibrated.probe.card.training.curves
    for (label, threshold), now in zip(
        before.card.label_thresholds.items(), recalibrated.probe.thresholds, strict=True
    ):
        click.echo(f"Threshold of '{label}': {threshold:.3f} before, {now:.3f} now.")
        if recalibrated.reports is None and label in curves:
            (found, false), (found_now, false_now) = map(curves[label].at, (threshold, now))
            click.echo(
                "On the texts that the probe was calibrated on, it finds "
                f"{found_now} of {curves[label].positives} '{label}' texts ({found} before) and "
                f"flags {false_now} of {curves[label].negatives} others ({false} before)."
            )
    click.echo(f"Saved to {folder}")
