"""``sidelight train``: train a probe on a labelled file."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource

from sidelight.cli import options
from sidelight.cli.runtime import Runtime
from sidelight.errors import SidelightError, warnings_ignored
from sidelight.storage import only_writer

if TYPE_CHECKING:
    from sidelight.data.examples import LabelledExamples
    from sidelight.models.conversation import PromptFormat
    from sidelight.training.settings import FitOptions
    from sidelight.types import MechanismSpec

# Equal to ``training.settings.AUTO``, whose import takes seconds.
_AUTO = "auto"


@click.command(
    epilog=options.examples(
        "sidelight train --data train.jsonl --label toxicity --out probes/toxicity",
        "sidelight train --data chats.jsonl --response answer --label refused --out probes/refusal",
        "sidelight train --data t.jsonl --mechanism attention --set attention.factor=16 --out p",
        "sidelight train --data t.jsonl --set epochs=12 --set class_weight=balanced --out p",
        "sidelight train --data letters.jsonl --spans entities --out probes/pii",
        "sidelight train --data guard:injection,mine.jsonl --out probes/injection",
    )
)
@options.training(
    "Training options: batch_size, calibration, class_weight, context_tokens, epochs, format, "
    "layer_weights, layers, learning_rate, least_steps, none, normalise, patience, prefixes, "
    "reads, seed, standardise, template, weight_decay. Mechanism options: MECHANISM.OPTION, such "
    "as attention.factor. See docs/reference.md."
)
@click.option("--force", is_flag=True, help="Replace an existing probe in the --out folder.")
@click.option(
    "--mechanism",
    default=_AUTO,
    help="Mechanism: auto (readout, or spans with --spans), attention, gate, pooling, readout, or "
    "spans.",
)
@click.option(
    "--spans",
    metavar="COLUMN",
    help="Column with labelled spans, to train on spans instead of whole texts: lists of {start, "
    "end, label}, in characters of the text or of the response.",
)
@click.option("--name", help="Probe name in verdicts. [default: that of the output folder]")
@options.threshold(default="f1")
@click.option(
    "--background",
    metavar="FILE",
    help="Background traffic to train with: a file of ordinary, unlabelled texts or chats (added "
    "to the packaged set), packaged, or none. [default: packaged]",
)
@options.engine
@options.backbone
@options.as_json
def train(
    inputs: options.TrainingInputs,
    out: Path,
    force: bool,
    mechanism: str,
    assigned: dict[str, str],
    spans: str | None,
    name: str | None,
    threshold: str,
    background: str | None,
    runtime: Runtime,
    as_json: bool,
) -> None:
    """Train a probe on a labelled file.

    The backbone runs once over the texts, and the probe is trained on its hidden states. Early
    stopping, the threshold and calibration use validation rows only. With fewer than 1,000 rows and
    no --validation, training cross-fits: the probe is trained on all rows, and each row is scored
    by a probe that was not trained on it. Run the same command again to resume an interrupted run.
    """
    from sidelight.data.examples import LabelledExamples, SpanExamples
    from sidelight.data.guards import span_column

    spans = span_column(inputs.data, spans)
    examples = SpanExamples if spans else LabelledExamples
    _require_agreement(inputs, mechanism, assigned, spans, background)
    # Before texts and models are loaded, so that a misspelt name or value is refused immediately.
    from sidelight.probes.card import require_free, require_name
    from sidelight.statistics.thresholds import ThresholdRule
    from sidelight.training.background import load_background
    from sidelight.training.validation import choose_validation

    fit_options, prompt_format = _fit_options(inputs, mechanism, assigned, examples)
    fit_options = replace(fit_options, threshold=ThresholdRule.parse(threshold))
    if background not in (None, "none") and fit_options.reads.includes_response:
        raise SidelightError(
            "--background contains only prompts, but the probe would read responses. Leave "
            "--background out."
        )
    name = name or out.resolve().name
    require_name(name)
    require_free(out, force=force)
    traffic = load_background((background or "packaged") if examples.takes_contexts else "none")
    fit_options = replace(fit_options, background=traffic)
    options.announce(f"Reading {inputs.data}")
    training, validation = inputs.load(spans)
    click.echo(f"Read {len(training)} texts. The probe will flag {training.task.flags}.", err=True)
    with warnings_ignored():
        choose_validation(training, validation, fit_options)
    options.announce("Loading the model")
    from sidelight.cli.show import print_fit
    from sidelight.training.fit import fit

    with runtime.reader(prompt_format) as reader, only_writer(out):
        # Another run may have finished in the meantime.
        require_free(out, force=force)
        result = fit(reader, training, validation, name=name, options=fit_options, out=out)
    if as_json:
        click.echo(json.dumps(options.with_warnings(result.to_dict()), indent=2))
        return
    print_fit(result)
    click.echo(f"Saved to {out}")
    click.echo(f"Next: {_eval_command(out)}")


def _require_agreement(
    inputs: options.TrainingInputs,
    mechanism: str,
    assigned: Mapping[str, str],
    spans: str | None,
    background: str | None,
) -> None:
    """Refuse contradictory options."""
    for target in assigned:
        owner, dot, _ = target.partition(".")
        if dot and owner != mechanism:
            raise SidelightError(f"--set {target} needs --mechanism {owner} (got: {mechanism}).")
    if spans is not None and any((background, inputs.positive)):
        raise SidelightError(
            "--background and --positive apply only to labels of whole texts. Leave them out, or "
            "leave --spans out."
        )


def _fit_options(
    inputs: options.TrainingInputs,
    mechanism: str,
    assigned: Mapping[str, str],
    examples: type["LabelledExamples"],
) -> tuple["FitOptions", "PromptFormat | None"]:
    """The training options and the prompt format from ``--set``."""
    from sidelight.training.settings import named_mechanism, suggested_settings

    settings = {setting: text for setting, text in assigned.items() if "." not in setting}
    chosen = options.typed(settings, _kinds())
    spec = None if mechanism == _AUTO else _spec(mechanism, assigned)
    side = chosen.pop("reads", "response" if inputs.response else "prompt")
    if side != "prompt" and inputs.response is None:
        raise SidelightError(
            f"--set reads={side} needs a column of responses. Name it with --response COLUMN."
        )
    prompt_format = chosen.pop("format", None)
    layers = chosen.pop("layers", "all")
    fit_options = inputs.fit_options()
    fit_options = replace(
        fit_options,
        mechanism=spec,
        reads=replace(fit_options.reads, side=side, template=chosen.pop("template", True)),
        calibration=chosen.pop("calibration", None),
        none=chosen.pop("none", True),
        context_tokens=chosen.pop("context_tokens", None),
        early_exit=layers == _AUTO,
        # The rest are optimisation settings.
        settings=suggested_settings(named_mechanism(mechanism, examples)).changed(
            layers=layers if isinstance(layers, int) else None, **chosen
        ),
    )
    return fit_options, prompt_format


def _eval_command(out: Path) -> str:
    """The command that evaluates the probe on a file with the same columns."""
    context = click.get_current_context()
    command = ["sidelight", "eval", str(out), "--data", "TEST_FILE"]
    for column in ("text", "label", "response", "spans"):
        if context.get_parameter_source(column) is ParameterSource.COMMANDLINE:
            command += [f"--{column}", context.params[column]]
    return shlex.join(command)


def _spec(mechanism: str, assigned: Mapping[str, str]) -> "MechanismSpec":
    """The mechanism with its options, ``MECHANISM.OPTION``."""
    from sidelight.probes.mechanisms.base import mechanism_spec

    values = {
        name.partition(".")[2]: int(text) if text.isdigit() else text
        for name, text in assigned.items()
        if "." in name
    }
    return mechanism_spec(mechanism, values)


def _kinds() -> dict[str, Any]:
    """The types of the training options of ``--set``."""
    from pydantic import PositiveInt

    from sidelight.models.conversation import PromptFormat, Side
    from sidelight.statistics.calibration import CalibrationKind
    from sidelight.training.settings import TrainingSettings

    kinds: dict[str, Any] = {field.name: field.type for field in fields(TrainingSettings)}
    switches = dict.fromkeys(("none", "template"), bool)
    return {
        **kinds,
        **switches,
        "calibration": CalibrationKind,
        "context_tokens": PositiveInt,
        "format": PromptFormat,
        "layers": PositiveInt | Literal["auto", "all"],
        "reads": Side,
    }
