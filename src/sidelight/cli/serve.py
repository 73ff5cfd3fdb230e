"""``sidelight serve``: text and verdicts over HTTP."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click
from click.core import ParameterSource
from pydantic.fields import FieldInfo

from sidelight.cli.engines import engine_options, load_engine, require_own_options
from sidelight.cli.options import PATH, Command, backbone_options, examples_epilog
from sidelight.errors import SidelightError
from sidelight.server.config import ServerConfig, read_config

if TYPE_CHECKING:
    from sidelight.server.observe import Sink

_OTLP_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_TYPES: dict[Any, Any] = {
    int: click.INT,
    float: click.FLOAT,
    Path: PATH,
}


def _option(name: str, field: FieldInfo) -> Any:
    """The option of a field; the configuration checks what the type of the option does not."""
    kinds = get_args(field.annotation) or (field.annotation,)
    is_flag = field.annotation is bool
    is_choice = get_origin(field.annotation) is Literal
    return click.option(
        f"--{name.replace('_', '-')}",
        name,
        type=click.Choice(kinds) if is_choice else _TYPES.get(kinds[0], click.STRING),
        is_flag=is_flag,
        multiple=field.default == (),
        default=field.default,
        show_default=not is_flag and field.default not in (None, ()),
        help=field.description,
    )


def _config_options(command: Command) -> Command:
    for name, field in reversed(ServerConfig.model_fields.items()):
        if field.description is not None:
            command = _option(name, field)(command)
    return command


@click.command(
    epilog=examples_epilog(
        "sidelight serve --probe probes/toxicity --probe probes/intent",
        "SIDELIGHT_API_KEY=secret sidelight serve --probe probes/toxicity --host 0.0.0.0",
        "sidelight serve --config server.toml",
    )
)
@_config_options
@engine_options
@backbone_options
@click.pass_context
def serve(context: click.Context, **values: Any) -> None:
    """Serve an LLM and its probes: OpenAI-compatible, every answer with its verdicts.

    An option wins over its environment variable, and that over the file of --config.
    """
    from sidelight.artifact import load_probe
    from sidelight.policy.rules import require_policy_applies
    from sidelight.server.app import serve as run

    config = read_config(
        **{
            name: value
            for name, value in values.items()
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        }
    )
    require_own_options(config.engine, config.engine_option)
    loaded = [load_probe(folder) for folder in config.probe]
    require_policy_applies(config.loaded_policy, loaded)
    if not loaded:
        click.echo("Warning: no probe is named (--probe), so no text is judged.", err=True)
    run(
        lambda: load_engine(
            config.engine,
            loaded,
            model=config.model,
            dtype=config.dtype,
            device=config.device,
            options=config.engine_option,
        ),
        config,
        sources={probe.name: path for probe, path in zip(loaded, config.probe, strict=True)},
        traces=traces_of(os.environ),
    )


def traces_of(environment: Mapping[str, str]) -> "Sink | None":
    """What takes traces, by OpenTelemetry's environment variables; None if they ask for none.

    Raises:
        SidelightError: Traces are asked for, but what sends them is not installed.
    """
    is_off = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if is_off or environment.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return None
    asked = [name for name in _OTLP_ENDPOINTS if environment.get(name)]
    if not asked:
        return None
    try:
        from sidelight.server.otel import otlp_sink
    except ImportError as error:
        raise SidelightError(
            f"{asked[0]} asks for traces, but OpenTelemetry is not installed. Run pip install "
            "'sidelight[otel]', or set OTEL_SDK_DISABLED=true."
        ) from error
    return otlp_sink()
