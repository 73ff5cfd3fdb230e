"""``sidelight train``: from a labelled file to probes on disk."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from sidelight.cli import options
from sidelight.errors import SidelightError

if TYPE_CHECKING:
    from sidelight.calibration import CalibrationKind
    from sidelight.prompts import PromptFormat, Side
    from sidelight.types import OptionValue

# As ``training.settings.AUTO``, whose import takes seconds.
_AUTO = "auto"


@click.command(
    epilog=options.examples(
        "sidelight train --data train.jsonl --label toxicity --out probes/toxicity",
        "sidelight train --data train.csv --mechanism pooling,gate,attention --seeds 3 --out p",
        "sidelight train --data chats.jsonl --response answer --label refused --out probes/refusal",
        "sidelight train --data t.jsonl --mechanism attention --set attention.factor=16 --out p",
        "sidelight train --data t.jsonl --engine vllm --engine-option max_num_seqs=64 --out p",
    )
)
@options.training
@click.option("--force", is_flag=True, help="Replace the probe that --out holds.")
@options.mechanisms(
    default=_AUTO,
    help="auto (a readout and a linear solution, mixed), or a comma-separated list: attention, "
    "blend, fusion, gate, linear, pooling, readout.",
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="MECHANISM.OPTION=VALUE",
    help="An option of a mechanism; may be repeated.",
)
@click.option("--seeds", type=options.AT_LEAST_ONE, default=1, help="Probes per mechanism.")
@click.option("--name", help="Name in verdicts. [default: the output folder's]")
@click.option(
    "--reads",
    type=click.Choice(["prompt", "response", "both"]),
    help="What the probe reads. [default: response with --response, else prompt]",
)
@click.option(
    "--template/--no-template", default=True, help="Whether template tokens count as prompt."
)
@click.option(
    "--format",
    "prompt_format",
    type=click.Choice(["chat", "raw", "both"]),
    help="How texts are rendered: as chats, as they are, or both, so that the probe judges plain "
    "text too. [default: chat if the model has a template]",
)
@click.option(
    "--standardise/--no-standardise",
    default=True,
    help="Whether hidden states are standardised per layer.",
)
@click.option(
    "--calibration",
    type=click.Choice(["platt", "temperature", "isotonic", "none"]),
    help="How logits become probabilities. [default: platt; temperature for several classes]",
)
@options.threshold(default="f1")
@click.option(
    "--class-weight",
    type=click.Choice(["none", "balanced"]),
    help="Weigh classes by inverse frequency. [default: the mechanism's]",
)
@click.option(
    "--background",
    metavar="FILE",
    help="Ordinary traffic (texts or chats, without labels), which the texts are also shown in, "
    "beside the packaged set; packaged alone; or none. [default: what the model has written, or "
    "else packaged]",
)
@click.option(
    "--none/--no-none",
    default=True,
    help="Whether a probe of several classes says `none` to ordinary traffic.",
)
@click.option(
    "--learning-rate", type=float, help="Initial learning rate. [default: the mechanism's]"
)
@click.option(
    "--weight-decay", type=float, help="Weight decay of AdamW. [default: the mechanism's]"
)
@click.option(
    "--epochs", type=options.AT_LEAST_ONE, help="The most epochs. [default: the mechanism's]"
)
@click.option(
    "--batch-size",
    type=options.AT_LEAST_ONE,
    help="Texts per step. [default: 32; less for few texts]",
)
@options.engine
@options.backbone
@options.as_json
def train(
    inputs: options.TrainingInputs,
    out: Path,
    force: bool,
    mechanisms: list[str],
    assignments: tuple[str, ...],
    seeds: int,
    name: str | None,
    reads: "Side | None",
    template: bool,
    prompt_format: "PromptFormat | None",
    standardise: bool,
    calibration: "CalibrationKind | None",
    threshold: str,
    background: str | None,
    none: bool,
    runtime: options.Runtime,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train probes on a labelled file, and keep the best.

    The backbone runs once over the texts; all mechanisms and seeds train from its hidden states.
    Early stopping, threshold and calibration use validation rows only. Fewer than 1,000 rows
    without --validation are cross-fitted: all of them train the probe, and each row is scored by a
    probe that did not train on it. A killed run keeps the shards of hidden states that it finished.
    """
    assigned = _assignments(assignments, mechanisms)
    options.announce(f"Reading {inputs.data}")
    from sidelight.manifest import holds_probe, require_name

    require_name(name or out.resolve().name)
    if holds_probe(out) and not force:
        raise SidelightError(
            f"{out} holds a probe. Name another folder with --out, or replace it with --force."
        )
    from sidelight.thresholds import ThresholdRule

    rule = ThresholdRule.parse(threshold)
    # Before imports that take seconds: a wrong file or column is refused at once.
    training, validation = inputs.load()
    from sidelight.training.background import default_background, load_background

    traffic = None if background is None else load_background(background)
    options.announce("Loading the model")
    from sidelight.mechanisms.base import mechanism_names, mechanism_spec

    is_automatic = mechanisms == [_AUTO]
    specs = (
        None
        if is_automatic
        else tuple(mechanism_spec(mechanism, assigned.get(mechanism)) for mechanism in mechanisms)
    )
    from sidelight.prompts import Reads
    from sidelight.training.fit import fit
    from sidelight.training.runs import console, describe_fit, fit_table, write_fit
    from sidelight.training.settings import suggested_settings

    shared = inputs.fit_options()
    chosen = {setting: value for setting, value in settings.items() if value is not None}
    fit_options = replace(
        shared,
        mechanisms=specs,
        seeds=tuple(range(seeds)),
        settings={
            mechanism: suggested_settings(mechanism).changed(**chosen)
            for mechanism in (mechanism_names() if is_automatic else mechanisms)
        },
        standardise=standardise,
        reads=Reads(reads or shared.reads.side, template, "each_turn"),
        calibration=calibration,
        threshold=rule,
        none=none,
    )
    told = [*training.warnings, *(validation.warnings if validation is not None else ())]
    for warning in told:
        click.echo(f"Warning: {warning}", err=True)
    click.echo(f"Read {len(training)} texts. The probe will flag {training.task.flags}.", err=True)
    backbone = runtime.load_backbone(prompt_format=prompt_format)
    with runtime.state_source(backbone) as source:
        made = fit(
            backbone,
            training,
            validation,
            name=name or out.resolve().name,
            options=replace(fit_options, background=traffic or default_background(backbone)),
            source=source,
            store=lambda made: write_fit(made, out),
        )
    for warning in made.warnings:
        if warning not in told:
            click.echo(f"Warning: {warning}", err=True)
    if as_json:
        click.echo(json.dumps(describe_fit(made), indent=2))
        return
    console().print(fit_table(made))
    if made.best.traffic is not None and made.best.traffic.conversations:
        click.echo(str(made.best.traffic))
    click.echo(f"Best: {made.best.probe.spec.name}, seed {made.best.seed}. Saved to {out}")
    click.echo(f"Next: {_eval_command(out, inputs)}")


def _eval_command(out: Path, inputs: options.TrainingInputs) -> str:
    """How to evaluate the probe on a file with the same columns."""
    context = click.get_current_context()
    command = ["sidelight", "eval", str(out), "--data", "TEST_FILE"]
    for column in ("text", "label", "response"):
        if context.get_parameter_source(column) is ParameterSource.COMMANDLINE:
            command += [f"--{column}", getattr(inputs, column)]
    return shlex.join(command)


def _assignments(
    assignments: tuple[str, ...], mechanisms: list[str]
) -> "dict[str, dict[str, OptionValue]]":
    """``attention.factor=16`` as ``{"attention": {"factor": 16}}``."""
    assigned: dict[str, dict[str, OptionValue]] = {}
    for assignment in assignments:
        target, equals, value = assignment.partition("=")
        mechanism, dot, option = target.partition(".")
        if not (equals and dot):
            raise SidelightError(
                f"Cannot read --set {assignment}. Write MECHANISM.OPTION=VALUE, such as "
                "attention.factor=16."
            )
        if mechanism not in mechanisms:
            raise SidelightError(
                f"--set {assignment} needs --mechanism {mechanism} (got: {', '.join(mechanisms)})."
            )
        assigned.setdefault(mechanism, {})[option] = int(value) if value.isdigit() else value
    return assigned
