"""Options that say which engine runs the model, and the engines that they stand for."""

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli.options import Command, option
from sidelight.errors import SidelightError

if TYPE_CHECKING:
    from sidelight.backbone import DtypeName, TransformersBackbone
    from sidelight.engines.base import Engine
    from sidelight.probe import Probe
    from sidelight.prompts import PromptFormat
    from sidelight.states.extraction import StateSource


def _assigned(
    _context: click.Context, _option: click.Parameter, value: tuple[str, ...]
) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for assignment in value:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise click.BadParameter(
                f"got '{assignment}', wanted NAME=VALUE, such as max_num_seqs=64."
            )
        try:
            options[name] = json.loads(text)
        except ValueError:
            # A text needs no quotes.
            options[name] = text
    return options


engine_option_option = option(
    "--engine-option",
    multiple=True,
    callback=_assigned,
    metavar="NAME=VALUE",
    help="Option of vLLM's engine, such as max_num_seqs=64; may be repeated.",
)


def engine_options(command: Command) -> Command:
    """Which engine, and its own options."""
    engine = option(
        "--engine",
        type=click.Choice(["transformers", "vllm"]),
        default="transformers",
        help="What runs the model; docs/vllm.md says how to install vLLM.",
    )
    return engine(engine_option_option(command))


def require_own_options(engine: str, options: Mapping[str, Any]) -> None:
    """Refuses options of vLLM's engine for another one."""
    if engine != "vllm" and options:
        raise SidelightError("--engine-option is for vLLM: give --engine vllm, or leave it out.")


def require_own_device(device: str) -> None:
    """Refuses a device for vLLM."""
    if device != "auto":
        raise SidelightError("vLLM chooses its device itself; leave --device out.")


def load_engine(
    engine: str,
    probes: "Sequence[Probe]",
    *,
    model: str | None,
    dtype: "DtypeName",
    device: str,
    options: Mapping[str, Any],
) -> "Engine":
    """An engine with its model and these probes.

    Without a name of a model, it is the one that the first probe was trained on. ``options`` are
    those of vLLM's engine.
    """
    model = model or (probes[0].fingerprint.name if probes else "smollm2")
    if engine == "vllm":
        from sidelight.vllm.engine import load_vllm_engine

        require_own_device(device)
        return load_vllm_engine(model, probes, dtype=dtype, options=options)
    from sidelight.backbone import load_backbone
    from sidelight.engines.transformers import TransformersEngine
    from sidelight.probe import common_format

    backbone = load_backbone(model, dtype=dtype, device=device, prompt_format=common_format(probes))
    return TransformersEngine(backbone, probes)


def encoding_backbone(
    engine: str,
    model: str | None,
    *,
    dtype: "DtypeName",
    device: str,
    prompt_format: "PromptFormat | None",
) -> "TransformersBackbone":
    """The backbone that encodes texts, and that runs them if the engine is transformers."""
    from sidelight.backbone import load_backbone

    if engine == "vllm":
        require_own_device(device)
        device = "cpu"
    return load_backbone(
        model or "smollm2", dtype=dtype, device=device, prompt_format=prompt_format
    )


@contextmanager
def state_source(
    engine: str, backbone: "TransformersBackbone", options: Mapping[str, Any]
) -> "Generator[StateSource]":
    """What computes hidden states for training; an engine of vLLM ends with the block."""
    require_own_options(engine, options)
    if engine == "vllm":
        from sidelight.vllm.offline import VllmSource

        with closing(VllmSource(backbone, options=options)) as source:
            yield source
    else:
        from sidelight.states.extraction import BackboneSource

        yield BackboneSource(backbone)
