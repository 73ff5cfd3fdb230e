"""``sidelight serve``: text and verdicts over HTTP."""

import signal
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import click
from click.core import ParameterSource

from sidelight.cli import options
from sidelight.cli.runtime import Runtime
from sidelight.server.config import ServerConfig, read_config


def _config_options(command: options.Command) -> options.Command:
    """An option for each field of the configuration, which validates what types do not."""
    for name, field in reversed(ServerConfig.model_fields.items()):
        if field.description is None:
            continue
        kinds = get_args(field.annotation) or (field.annotation,)
        kind = options.PATH if kinds[0] is Path else kinds[0] if kinds[0] in (int, float) else str
        is_choice = get_origin(field.annotation) is Literal
        is_flag = field.annotation is bool
        command = click.option(
            f"--{name.replace('_', '-')}",
            name,
            type=click.Choice(kinds) if is_choice else kind,
            is_flag=is_flag,
            multiple=field.default == (),
            default=field.default,
            show_default=not is_flag and field.default not in (None, ()),
            help=field.description,
        )(command)
    return command


def _end(*_: object) -> NoReturn:
    sys.exit(0)


@click.command(
    epilog=options.examples(
        "sidelight serve --probe probes/toxicity --probe probes/intent",
        "SIDELIGHT_API_KEY=secret sidelight serve --probe probes/toxicity --host 0.0.0.0",
        "sidelight serve --config server.toml",
    )
)
@_config_options
@options.engine
@options.engine_option
@options.model
@options.tokenizer
@options.dtype
@options.device
@click.pass_context
def serve(context: click.Context, **values: Any) -> None:
    """Serve an LLM and its probes over an OpenAI-compatible API, with verdicts in every answer.

    Options override environment variables, which override the --config file.
    """
    # Process 1, as in a container, ignores signals without a handler.
    signal.signal(signal.SIGTERM, _end)
    from sidelight.probes.card import read_card, require_distinct_names

    config = read_config(
        **{
            name: value
            for name, value in values.items()
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        }
    )
    names = {field.name for field in fields(Runtime)}
    runtime = Runtime(serves=True, **config.model_dump(include=names))
    # Before slow imports, so that wrong files and folders are refused immediately.
    config = config.model_copy(update={"probe": tuple(runtime.probe_folders(config.probe))})
    require_distinct_names([read_card(folder).name for folder in config.probe])
    policy, _ = config.loaded_policy, config.access
    from sidelight.policy.rules import require_policy_applies
    from sidelight.probes.artifact import load_probe
    from sidelight.server.app import serve as run

    loaded = [load_probe(folder) for folder in config.probe]
    require_policy_applies(policy, loaded)
    model = runtime.model_of(loaded)
    if not loaded:
        click.echo("Warning: no probe is named (--probe), so no text is classified.", err=True)
    if (serve_there := runtime.backend_of(model).serve) is not None:
        serve_there(config, model, loaded)
        return
    run(partial(runtime.load_engine, loaded), config)
