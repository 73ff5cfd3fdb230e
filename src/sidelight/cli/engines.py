"""Options that say which engine runs the model, and how it is made."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli.options import Command

if TYPE_CHECKING:
    from sidelight.engines import Engine
    from sidelight.probe import Probe


def _options(
    _context: click.Context, _option: click.Parameter, value: tuple[str, ...]
) -> dict[str, Any]:
    return dict(map(_option_of, value))


def _option_of(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.BadParameter(f"'{text}' is not like max_num_seqs=64.")
    try:
        return name, json.loads(value)
    except ValueError:
        # A text needs no quotes.
        return name, value


def engine_options(command: Command) -> Command:
    """Which engine, and what it is told: ``load_engine`` reads their values."""
    engine = click.option(
        "--engine",
        type=click.Choice(["transformers", "vllm"]),
        default="transformers",
        show_default=True,
        help="What runs the model; docs/vllm.md says how to install vLLM.",
    )
    return engine(engine_option_option(command))


engine_option_option = click.option(
    "--engine-option",
    "engine_options",
    multiple=True,
    callback=_options,
    metavar="NAME=VALUE",
    help="Option of vLLM's engine, such as max_num_seqs=64; may be repeated.",
)


def load_engine(engine: str, probes: "Sequence[Probe]", given: Mapping[str, Any]) -> "Engine":
    """The engine, its model loaded.

    Args:
        engine: Its name.
        probes: Probes to serve.
        given: Values of ``backbone_options`` and ``--engine-option``.
    """
    model = given["model"] or (probes[0].fingerprint.name if probes else "smollm2")
    make = {"transformers": _transformers, "vllm": _vllm}[engine]
    return make(model, probes, given)


def _transformers(model: str, probes: "Sequence[Probe]", given: Mapping[str, Any]) -> "Engine":
    from sidelight.backbones import load_backbone
    from sidelight.engines import TransformersEngine

    backbone = load_backbone(
        model,
        dtype=given["dtype"],
        device=given["device"],
        prompt_format=probes[0].prompt_format if probes else None,
    )
    return TransformersEngine(backbone, probes)


def _vllm(model: str, probes: "Sequence[Probe]", given: Mapping[str, Any]) -> "Engine":
    from sidelight.engines.vllm import load_vllm_engine
    from sidelight.errors import SidelightError

    if given["device"] != "auto":
        raise SidelightError("vLLM chooses its device itself; leave --device out.")
    return load_vllm_engine(model, probes, dtype=given["dtype"], options=given["engine_options"])
