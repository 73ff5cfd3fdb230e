"""Options that say which engine runs the model, and how it is made."""

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli.options import Command

if TYPE_CHECKING:
    from sidelight.backbone import TransformersBackbone
    from sidelight.engines.base import Engine
    from sidelight.probe import Probe
    from sidelight.states.extraction import StateSource


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


def require_own_options(engine: str, given: Mapping[str, Any]) -> None:
    """Checks that vLLM's options are not given to another engine.

    Args:
        engine: Its name.
        given: Values of ``--engine-option``.

    Raises:
        SidelightError: They are.
    """
    from sidelight.errors import SidelightError

    if engine != "vllm" and given["engine_options"]:
        raise SidelightError("--engine-option is for vLLM: give --engine vllm, or leave it out.")


def _transformers(model: str, probes: "Sequence[Probe]", given: Mapping[str, Any]) -> "Engine":
    from sidelight.backbone import load_backbone
    from sidelight.engines.transformers import TransformersEngine
    from sidelight.probe import common_format

    backbone = load_backbone(
        model,
        dtype=given["dtype"],
        device=given["device"],
        prompt_format=common_format(probes),
    )
    return TransformersEngine(backbone, probes)


@contextmanager
def state_source(
    engine: str, backbone: "TransformersBackbone", given: Mapping[str, Any]
) -> "Generator[StateSource]":
    """What computes hidden states for training; it ends with the block.

    Args:
        engine: Its name.
        backbone: Of ``encoding_backbone``.
        given: Values of ``--engine-option``.
    """
    require_own_options(engine, given)
    if engine == "vllm":
        from sidelight.vllm.offline import VllmSource

        with closing(VllmSource(backbone, options=given["engine_options"])) as source:
            yield source
    else:
        from sidelight.states.extraction import BackboneSource

        yield BackboneSource(backbone)


def encoding_backbone(engine: str, given: Mapping[str, Any]) -> "TransformersBackbone":
    """The backbone that encodes texts, and that runs them where the engine is its own.

    Args:
        engine: Its name.
        given: Values of ``backbone_options`` and ``prompt_format``.
    """
    from sidelight.backbone import load_backbone

    if engine == "vllm":
        require_own_device(given)
    return load_backbone(
        given["model"] or "smollm2",
        dtype=given["dtype"],
        device="cpu" if engine == "vllm" else given["device"],
        prompt_format=given["prompt_format"],
    )


def require_own_device(given: Mapping[str, Any]) -> None:
    """Checks that vLLM is not told its device.

    Args:
        given: Values of ``backbone_options``.

    Raises:
        SidelightError: It is.
    """
    from sidelight.errors import SidelightError

    if given["device"] != "auto":
        raise SidelightError("vLLM chooses its device itself; leave --device out.")


def _vllm(model: str, probes: "Sequence[Probe]", given: Mapping[str, Any]) -> "Engine":
    from sidelight.vllm.engine import load_vllm_engine

    require_own_device(given)
    return load_vllm_engine(model, probes, dtype=given["dtype"], options=given["engine_options"])
