"""``sidelight train``: from a labelled file to probes on disk."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from sidelight.cli.engines import encoding_backbone, engine_options, state_source
from sidelight.cli.options import (
    TrainingInputs,
    backbone_options,
    examples_epilog,
    json_option,
    mechanism_option,
    training_options,
)
from sidelight.errors import SidelightError

if TYPE_CHECKING:
    from sidelight.backbone import DtypeName
    from sidelight.calibration import CalibrationKind
    from sidelight.mechanisms.base import OptionValue
    from sidelight.prompts import PromptFormat, Side

# As ``training.settings.AUTO``, whose import takes seconds.
_AUTO = "auto"


@click.command(
    epilog=examples_epilog(
        "sidelight train --data train.jsonl --label toxicity --out probes/toxicity",
        "sidelight train --data train.csv --mechanism pooling,gate,attention --seeds 3 --out p",
        "sidelight train --data chats.jsonl --response answer --label refused --out probes/refusal",
        "sidelight train --data t.jsonl --mechanism attention --set attention.factor=16 --out p",
        "sidelight train --data t.jsonl --engine vllm --engine-option max_num_seqs=64 --out p",
    )
)
@training_options
@mechanism_option(
    default=_AUTO,
    help="auto: what suits the number of texts. Or several with commas of attention, blend, "
    "fusion, gate, pooling, readout.",
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="MECHANISM.OPTION=VALUE",
    help="An option of a mechanism; may be repeated.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Probes per mechanism.",
)
@click.option("--name", default=None, help="Name in verdicts. [default: the output folder's]")
@click.option(
    "--reads",
    type=click.Choice(["prompt", "response", "both"]),
    default=None,
    help="What the probe reads. [default: response with --response, else prompt]",
)
@click.option(
    "--template/--no-template",
    default=True,
    show_default=True,
    help="Whether chat-template tokens count as prompt.",
)
@click.option(
    "--format",
    "prompt_format",
    type=click.Choice(["chat", "raw"]),
    default=None,
    help="How texts are rendered. [default: chat where the model has a template]",
)
@click.option(
    "--standardise/--no-standardise",
    default=True,
    show_default=True,
    help="Whether hidden states are standardised per layer.",
)
@click.option(
    "--calibration",
    type=click.Choice(["platt", "temperature", "isotonic", "none"]),
    default="platt",
    show_default=True,
    help="From logits to probabilities.",
)
@click.option(
    "--class-weight",
    type=click.Choice(["none", "balanced"]),
    default=None,
    help="Weigh classes by inverse frequency. [default: the mechanism's]",
)
@click.option(
    "--long-inputs",
    is_flag=True,
    help="Learn to find a text among others: for labels that a part of a text can have.",
)
@click.option("--learning-rate", type=float, default=None, help="[default: the mechanism's]")
@click.option("--weight-decay", type=float, default=None, help="[default: the mechanism's]")
@click.option(
    "--epochs", type=click.IntRange(min=1), default=None, help="At most. [default: the mechanism's]"
)
@click.option("--batch-size", type=click.IntRange(min=1), default=None, help="[default: 32]")
@engine_options
@backbone_options
@json_option
def train(
    inputs: TrainingInputs,
    out: Path,
    mechanisms: list[str],
    assignments: tuple[str, ...],
    seeds: int,
    name: str | None,
    reads: "Side | None",
    template: bool,
    prompt_format: "PromptFormat | None",
    standardise: bool,
    calibration: "CalibrationKind",
    long_inputs: bool,
    engine: str,
    engine_option: dict[str, Any],
    model: str | None,
    dtype: "DtypeName",
    device: str,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train probes on a labelled file, and keep the best.

    The backbone runs once over the texts; all mechanisms and seeds train from its hidden states.
    Early stopping, threshold and calibration use validation rows only. Fewer than 1,000 rows
    without --validation are cross-fitted: all of them train the probe, and each is judged by one
    that it did not train. A killed run keeps the shards of activations that it finished.
    """
    # Before imports that take seconds: a misspelt name is refused at once.
    from sidelight.mechanisms.base import mechanism_names, mechanism_spec

    assigned = _assignments(assignments, mechanisms)
    is_automatic = mechanisms == [_AUTO]
    specs = (
        None
        if is_automatic
        else tuple(mechanism_spec(mechanism, assigned.get(mechanism)) for mechanism in mechanisms)
    )
    training, validation = inputs.load()
    from sidelight.prompts import Reads
    from sidelight.training.fit import fit
    from sidelight.training.runs import (
        check_folder,
        console,
        describe_fit,
        fit_table,
        holds_probe,
        write_fit,
    )
    from sidelight.training.settings import suggested_settings

    chosen = {setting: value for setting, value in settings.items() if value is not None}
    shared = inputs.fit_options()
    options = replace(
        shared,
        mechanisms=specs,
        seeds=tuple(range(seeds)),
        settings={
            mechanism: suggested_settings(mechanism).changed(**chosen)
            for mechanism in (mechanism_names() if is_automatic else mechanisms)
        },
        long_inputs=long_inputs,
        standardise=standardise,
        reads=Reads(side=reads or shared.reads.side, template=template),
        calibration=calibration,
    )
    check_folder(out)
    if holds_probe(out):
        click.echo(f"Warning: the probe in {out} will be replaced.", err=True)
    backbone = encoding_backbone(
        engine, model, dtype=dtype, device=device, prompt_format=prompt_format
    )
    with state_source(engine, backbone, engine_option) as source:
        made = fit(
            backbone,
            training,
            validation,
            name=name or out.resolve().name,
            options=options,
            source=source,
            store=lambda made: write_fit(made, out),
        )
    for warning in made.warnings:
        click.echo(f"Warning: {warning}", err=True)
    if as_json:
        click.echo(json.dumps(describe_fit(made), indent=2))
        return
    console().print(fit_table(made))
    click.echo(f"Best: {made.best.probe.spec.name}, seed {made.best.seed}. Saved to {out}")
    click.echo(f"Next: {_eval_command(out, inputs)}")


def _eval_command(out: Path, inputs: TrainingInputs) -> str:
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
    options: dict[str, dict[str, OptionValue]] = {}
    for assignment in assignments:
        target, equals, value = assignment.partition("=")
        mechanism, dot, option = target.partition(".")
        if not (equals and dot) or mechanism not in mechanisms:
            raise SidelightError(
                f"Cannot read --set {assignment}: write MECHANISM.OPTION=VALUE for one of the "
                f"chosen mechanisms ({', '.join(mechanisms)}), such as attention.factor=16, and "
                f"choose that one: --mechanism {mechanism if dot else 'attention'}."
            )
        options.setdefault(mechanism, {})[option] = int(value) if value.isdigit() else value
    return options
