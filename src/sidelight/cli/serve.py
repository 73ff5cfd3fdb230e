"""``sidelight serve``: text and verdicts over HTTP."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli.engines import engine_options, load_engine, require_own_options
from sidelight.cli.options import backbone_options, examples_epilog
from sidelight.cli.serving import (
    access_of,
    access_options,
    audit_of,
    limit_options,
    limits_of,
    log_options,
    traces_of,
)

if TYPE_CHECKING:
    from sidelight.engines import Engine


@click.command(
    epilog=examples_epilog(
        "sidelight serve --probe probes/toxicity --probe probes/intent",
        "SIDELIGHT_API_KEY=secret sidelight serve --probe probes/toxicity --host 0.0.0.0",
    )
)
@click.option(
    "--probe",
    "probes",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Folder of a probe; may be repeated.",
)
@click.option(
    "--policy",
    "policy_file",
    type=click.Path(path_type=Path),
    help="TOML file that says what follows from verdicts; docs/policies.md describes it.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@log_options
@access_options
@limit_options
@engine_options
@backbone_options
def serve(
    probes: tuple[Path, ...],
    policy_file: Path | None,
    host: str,
    port: int,
    engine: str,
    **given: Any,
) -> None:
    """Serve an LLM and its probes: OpenAI-compatible, every answer with its verdicts."""
    from sidelight.artifact import load_probe
    from sidelight.server.policy import Policy, read_policy, require_fitting
    from sidelight.server.running import serve as run
    from sidelight.server.service import Service

    require_own_options(engine, given)
    loaded = [load_probe(probe) for probe in probes]
    policy = read_policy(policy_file) if policy_file else Policy()
    require_fitting(policy, loaded)

    def load() -> "Engine":
        return load_engine(engine, loaded, given)

    service = Service(
        policy=policy,
        sources={probe.name: path for probe, path in zip(loaded, probes, strict=True)},
        access=access_of(given, os.environ),
        limits=limits_of(given),
        audit=audit_of(given, os.environ),
        traces=traces_of(os.environ),
    )
    run(
        load,
        service,
        host=host,
        port=port,
        allow_anonymous=given["allow_anonymous"],
        log_level=given["log_level"],
        json_logs=given["json_logs"],
    )
