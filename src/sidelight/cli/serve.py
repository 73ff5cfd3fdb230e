"""Options of ``sidelight serve`` that say who may ask, how much, and what is logged.

``sidelight serve``: text and verdicts over HTTP.
"""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli.engines import engine_options, load_engine, require_own_options
from sidelight.cli.options import Command, backbone_options, examples_epilog
from sidelight.errors import SidelightError

if TYPE_CHECKING:
    from sidelight.engines.base import Engine
    from sidelight.server.config import Access, ServerLimits
    from sidelight.server.observe import AuditLog, Sink


_OTLP_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_KEY, _ADMIN_KEY = "SIDELIGHT_API_KEY", "SIDELIGHT_ADMIN_KEY"
_SALT = "SIDELIGHT_AUDIT_SALT"
_FILE = click.Path(path_type=Path, dir_okay=False)
_ACCESS = (
    click.option(
        "--api-key",
        "api_keys",
        multiple=True,
        help=f"Key that requests must carry; may be repeated. [env: {_KEY}]",
    ),
    click.option(
        "--api-keys-file", type=_FILE, default=None, help="File of keys, one 'ID KEY' a line."
    ),
    click.option(
        "--admin-key",
        "admin_keys",
        multiple=True,
        help=f"Key that opens /admin; may be repeated. [env: {_ADMIN_KEY}]",
    ),
    click.option(
        "--admin-keys-file", type=_FILE, default=None, help="File of such keys, 'ID KEY' a line."
    ),
    click.option(
        "--allow-anonymous",
        is_flag=True,
        help="Listen beyond this machine even without keys.",
    ),
)
_LIMITS = (
    click.option("--max-body-bytes", type=click.IntRange(1), default=4 * 2**20, show_default=True),
    click.option(
        "--max-batch-items",
        type=click.IntRange(1, 512),
        default=512,
        show_default=True,
        help="Texts of one request.",
    ),
    click.option(
        "--max-request-tokens",
        type=click.IntRange(1),
        default=None,
        help="Tokens that one request may read and write. [default: the context, per text]",
    ),
    click.option(
        "--max-concurrent",
        type=click.IntRange(1),
        default=256,
        show_default=True,
        help="Requests being answered; further ones are a 429.",
    ),
    click.option(
        "--deadline",
        type=click.FloatRange(0, min_open=True),
        default=600,
        show_default=True,
        help="Seconds until a request is given up.",
    ),
)


_LOGS = (
    click.option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        default="info",
        show_default=True,
        help="Of the server's own log.",
    ),
    click.option("--json-logs", is_flag=True, help="Log one JSON object a line."),
    click.option(
        "--audit-log", type=_FILE, default=None, help="File that every decision is appended to."
    ),
    click.option(
        "--audit-salt",
        default=None,
        help=f"Secret of the hashes in it. [env: {_SALT}; default: a new one]",
    ),
)


def access_options(command: Command) -> Command:
    """Keys: ``access_of`` reads their values."""
    return _with(_ACCESS, command)


def limit_options(command: Command) -> Command:
    """Limits of the HTTP layer: ``limits_of`` reads their values."""
    return _with(_LIMITS, command)


def log_options(command: Command) -> Command:
    """What is logged: ``audit_of`` reads the values of the audit log."""
    return _with(_LOGS, command)


def traces_of(environment: Mapping[str, str]) -> "Sink | None":
    """Who is told of each request, by OpenTelemetry's environment variables; None: nobody.

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
            f"{asked[0]} asks for traces, but OpenTelemetry is not installed. Install it with pip "
            "install 'sidelight[otel]', or set OTEL_SDK_DISABLED=true."
        ) from error
    return otlp_sink()


def audit_of(given: Mapping[str, Any], environment: Mapping[str, str]) -> "AuditLog | None":
    """Where decisions are written; None: nowhere.

    Raises:
        SidelightError: The salt is blank: anybody could compute the hashes. Or the log cannot be
            written.
    """
    from sidelight.server.observe import AuditLog

    if given["audit_log"] is None:
        return None
    salt = given["audit_salt"]
    if salt is None:
        salt = _value_in(environment, _SALT)
    elif not salt.strip():
        raise SidelightError("--audit-salt is blank. Give it a secret, or leave it out.")
    return AuditLog(
        given["audit_log"], salt=secrets.token_bytes(32) if salt is None else salt.encode()
    )


def access_of(given: Mapping[str, Any], environment: Mapping[str, str]) -> "Access":
    """Who may do what. A key in a variable counts where no option gives one of its kind.

    Raises:
        SidelightError: A variable is there and blank: nobody means that everybody is served. Or a
            key is wrong in itself.
    """
    from sidelight.server.config import Access, numbered_keys, read_keys

    users, admins = given["api_keys_file"], given["admin_keys_file"]
    own = given["api_keys"] or _key_in(environment, _KEY)
    own_admin = given["admin_keys"] or _key_in(environment, _ADMIN_KEY)
    return Access(
        keys=numbered_keys(own, prefix="api-key") + (read_keys(users) if users else ()),
        admin_keys=numbered_keys(own_admin, prefix="admin-key")
        + (read_keys(admins) if admins else ()),
    )


def limits_of(given: Mapping[str, Any]) -> "ServerLimits":
    """How much a request may take."""
    from sidelight.server.config import ServerLimits

    return ServerLimits(
        body_bytes=given["max_body_bytes"],
        batch_items=given["max_batch_items"],
        request_tokens=given["max_request_tokens"],
        concurrent=given["max_concurrent"],
        deadline_s=given["deadline"],
    )


def _key_in(environment: Mapping[str, str], name: str) -> tuple[str, ...]:
    """The key that a variable holds, as one: not click's reading, which splits at blanks."""
    key = _value_in(environment, name)
    # A line break at its end comes of a file, and no header carries one.
    return () if key is None else (key.strip(" \t\r\n"),)


def _value_in(environment: Mapping[str, str], name: str) -> str | None:
    """What a secret's variable holds: not click's reading, to which a blank one is not there."""
    value = environment.get(name)
    if value is not None and not value.strip():
        raise SidelightError(f"{name} is set and blank. Put a secret into it, or unset it.")
    return value


def _with(options: tuple[Command, ...], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


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
    from sidelight.policy.rules import Policy, read_policy, require_fitting
    from sidelight.server.app import Service
    from sidelight.server.app import serve as run

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
