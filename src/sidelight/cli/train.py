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
    backbone_options,
    examples_epilog,
    json_option,
    load_labelled,
    mechanism_option,
    reading_options,
    training_options,
)
from sidelight.errors import SidelightError

if TYPE_CHECKING:
    from sidelight.mechanisms.base import MechanismSpec, OptionValue
    from sidelight.training.settings import FitOptions, TrainingSettings


# As ``fitting.AUTO``, whose import takes seconds.
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
def train(out: Path, as_json: bool, engine: str, **given: Any) -> None:
    """Train probes on a labelled file, and keep the best.

    The backbone runs once over the texts; all mechanisms and seeds train from what it showed.
    Early stopping, threshold and calibration use validation rows only. Fewer than 1,000 rows
    without --validation are cross-fitted: all of them train the probe, and each is judged by one
    that it did not train. A killed run keeps the shards of activations that it finished.
    """
    # Before imports that take seconds: what is misspelt is told at once.
    specs = _specs(given)
    training, validation = load_labelled(given)
    from sidelight.training.fit import fit
    from sidelight.training.runs import (
        check_folder,
        console,
        describe_fit,
        fit_table,
        holds_probe,
        write_fit,
    )

    options = _options(given, specs)
    check_folder(out)
    if holds_probe(out):
        click.echo(f"Warning: the probe in {out} will be replaced.", err=True)
    backbone = encoding_backbone(engine, given)
    with state_source(engine, backbone, given) as source:
        name = given["name"] or out.resolve().name
        made = fit(
            backbone,
            training,
            validation,
            name=name,
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
    click.echo(f"Next: {_eval_command(out, given)}")


def _eval_command(out: Path, given: dict[str, Any]) -> str:
    """How the probe is judged on a file with the same columns."""
    context = click.get_current_context()
    command = ["sidelight", "eval", str(out), "--data", "TEST_FILE"]
    for name in ("text", "label", "response"):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            command += [f"--{name}", given[name]]
    return shlex.join(command)


def _specs(given: dict[str, Any]) -> "tuple[MechanismSpec, ...] | None":
    """What is to be trained, with its options; None where the number of texts decides."""
    from sidelight.mechanisms.base import mechanism_spec

    names = given["mechanisms"]
    assigned = _assignments(given["assignments"], names)
    if names == [_AUTO]:
        return None
    return tuple(mechanism_spec(name, assigned.get(name)) for name in names)


def _options(given: dict[str, Any], specs: "tuple[MechanismSpec, ...] | None") -> "FitOptions":
    from sidelight.mechanisms.base import mechanism_names
    from sidelight.prompts import Reads

    shared = reading_options(given)
    names = mechanism_names() if specs is None else [spec.name for spec in specs]
    return replace(
        shared,
        mechanisms=specs,
        seeds=tuple(range(given["seeds"])),
        settings={name: _settings(name, given) for name in names},
        long_inputs=given["long_inputs"],
        standardise=given["standardise"],
        reads=Reads(side=given["reads"] or shared.reads.side, template=given["template"]),
        calibration=given["calibration"],
    )


def _settings(mechanism: str, given: dict[str, Any]) -> "TrainingSettings":
    from sidelight.training.settings import suggested_settings

    names = ("learning_rate", "weight_decay", "epochs", "batch_size", "class_weight")
    chosen = {name: given[name] for name in names if given[name] is not None}
    return suggested_settings(mechanism).changed(**chosen)


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
