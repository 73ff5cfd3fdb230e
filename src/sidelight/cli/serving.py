"""Options of ``sidelight serve`` that say who may ask, how much, and what is logged."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli.options import Command

if TYPE_CHECKING:
    from sidelight.server.keys import Access
    from sidelight.server.limits import ServerLimits

_FILE = click.Path(path_type=Path, dir_okay=False)
_ACCESS = (
    click.option(
        "--api-key",
        "api_keys",
        multiple=True,
        envvar="SIDELIGHT_API_KEY",
        help="Key that requests must carry; may be repeated. [env: SIDELIGHT_API_KEY]",
    ),
    click.option(
        "--api-keys-file", type=_FILE, default=None, help="File of keys, one 'ID KEY' a line."
    ),
    click.option(
        "--admin-key",
        "admin_keys",
        multiple=True,
        envvar="SIDELIGHT_ADMIN_KEY",
        help="Key that opens /admin; may be repeated. [env: SIDELIGHT_ADMIN_KEY]",
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


def access_options(command: Command) -> Command:
    """Keys: ``access_of`` reads their values."""
    return _with(_ACCESS, command)


def limit_options(command: Command) -> Command:
    """Limits of the HTTP layer: ``limits_of`` reads their values."""
    return _with(_LIMITS, command)


def access_of(given: Mapping[str, Any]) -> "Access":
    """Who may do what."""
    from sidelight.server.keys import Access, numbered_keys, read_keys

    users, admins = given["api_keys_file"], given["admin_keys_file"]
    return Access(
        keys=numbered_keys(given["api_keys"], prefix="api-key")
        + (read_keys(users) if users else ()),
        admin_keys=numbered_keys(given["admin_keys"], prefix="admin-key")
        + (read_keys(admins) if admins else ()),
    )


def limits_of(given: Mapping[str, Any]) -> "ServerLimits":
    """How much a request may take."""
    from sidelight.server.limits import ServerLimits

    return ServerLimits(
        body_bytes=given["max_body_bytes"],
        batch_items=given["max_batch_items"],
        request_tokens=given["max_request_tokens"],
        concurrent=given["max_concurrent"],
        deadline_s=given["deadline"],
    )


def _with(options: tuple[Command, ...], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command
